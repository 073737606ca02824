"""Ways to damage a safetensors file or a JSON file; all chance comes from the generator that is handed in."""

import json
from collections.abc import Callable
from random import Random
from typing import Any


Damage = Callable[[bytes, Random], bytes]

HEADER = 8
"""Bytes before a safetensors header, which hold its length."""

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "weight",
        "default",
        "none",
        "all",
        "neuron",
        "all-linear",
        "(",
        "([a-z_.]+)+!",
        "[",
        ".*",
        "\\",
        "../../x",
    ),
    *("\0", "\u202e", "\ud83d\ude00", "é" * 300, "x" * 5000, "__class__", "fps_values", "LORA", "os.system"),
)
NAMES = (
    *("lm_head", "wte", "base_layer", "fps_values", "fps_columns", "fps_row_counts", "fps_bias", "original_module"),
    *("modules_to_save", "default", "older", "head", "hidden", "norm", "convolution_of_the_embedding_stage", "stage"),
    *("hidden.base_layer", "head.original_module", "head.modules_to_save.older", "ead", "h.*", ".", "e", "second"),
)
"""What a config may come to name: modules, parts of adapters, ends of names, and nothing."""
DTYPES = (
    *("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "F64", "I64", "U64"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "X9", "", 5),
)


# --- bytes ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, chance: Random) -> bytes:
    """Flip single bits."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64)) if data else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, chance: Random) -> bytes:
    """Replace a run of bytes by one byte, or by chance."""
    start = chance.randrange(len(data) + 1)
    length = min(chance.choice((1, 2, 4, 16, 256)), len(data) - start)
    filling = chance.choice((b"\0" * length, b"\xff" * length, chance.randbytes(length)))
    return data[:start] + filling + data[start + length :]


def insert(data: bytes, chance: Random) -> bytes:
    """Put bytes in."""
    start = chance.randrange(len(data) + 1)
    return data[:start] + chance.randbytes(chance.choice((1, 1, 4, 100, 5000))) + data[start:]


def delete(data: bytes, chance: Random) -> bytes:
    """Take bytes out."""
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.choice((1, 1, 2, 8, 200)) :]


def truncate(data: bytes, chance: Random) -> bytes:
    """Cut the end off."""
    return data[: chance.randrange(len(data) + 1)]


def splice(data: bytes, chance: Random) -> bytes:
    """Copy one part of the file over another."""
    start, length = chance.randrange(len(data) + 1), chance.choice((1, 4, 16, 64, 400))
    target = chance.randrange(len(data) + 1)
    part = data[start : start + length]
    return data[:target] + part + data[target + len(part) * chance.randrange(2) :]


BYTES: tuple[Damage, ...] = (flip, overwrite, insert, delete, truncate, splice)


# --- JSON -----------------------------------------------------------------------------------------------------------


def anything(chance: Random, depth: int = 0) -> Any:
    """Any JSON value, now and then a nested one."""
    kind = chance.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return chance.choice(NUMBERS)
    if kind < 4:
        return chance.choice(TEXTS)
    if kind == 4:
        return chance.choice((None, True, False))
    if kind == 5:
        return [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(TEXTS): anything(chance, depth + 1) for _ in range(chance.randrange(4))}


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers and keys within a JSON value, at any depth."""
    found: list[tuple[Any, Any]] = []
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def damage_json(value: Any, chance: Random) -> Any:
    """Replace, remove, rename, copy or nudge values anywhere in a JSON value, in place."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        inside = places(value)
        if not inside:
            return anything(chance)
        if chance.random() < 0.02:
            return chance.choice((anything(chance), [value]))
        container, key = chance.choice(inside)
        kind = chance.randrange(6)
        if kind == 0:
            container[key] = anything(chance)
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[chance.choice((*TEXTS, f"{key}x", str(key)[:-1], str(key).upper()))] = container.pop(key)
        elif kind == 3:
            other, place = chance.choice(inside)
            if (
                isinstance(other, list)
                and not -len(other) <= place < len(other)
                or place not in other
                and isinstance(other, dict)
            ):
                continue
            container[key] = json.loads(json.dumps(other[place]))
        elif kind == 4 and isinstance(container[key], int):
            container[key] += chance.choice((-1, 1, 2, 1000, 2**20, 2**40))
        else:
            container[key] = chance.choice((chance.choice(NUMBERS), chance.choice(TEXTS)))
    return value


def damage_json_text(data: bytes, chance: Random) -> bytes:
    """Damage what a JSON file says; now and then its depth, or the length of a number."""
    special = chance.randrange(60)
    if special == 0:
        depth = chance.choice((50, 500, 5000, 200_000))
        return data.replace(b"null", b"[" * depth + b"]" * depth, 1)
    if special == 1:
        return data.replace(b"0", b"9" * chance.choice((20, 400, 5000)), 1)
    if special == 2:
        return data.replace(b"{", b'{"format_version": 2, "format_version": 7, ', 1)
    if special < 9:
        return damage_names(data, chance)
    return json.dumps(damage_json(json.loads(data), chance)).encode()


def damage_names(data: bytes, chance: Random) -> bytes:
    """Let the config name other modules, to be trained whole or with entries, and now and then list their tensors."""
    content = json.loads(data)
    names = [chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2)))]
    kind = chance.randrange(6)
    if kind < 3:
        content["modules_to_save"] = names if kind else [*content["modules_to_save"], *names]
    elif kind == 3:
        allocation = content["record"]["allocation"]
        allocation |= {name: chance.choice(list(allocation.values())) for name in names}
    elif kind == 4:
        content["target_modules"] = chance.choice((names, None, "all-linear", "dummy-target-modules"))
        content["modules_to_save"] = None
    else:
        content["task_type"] = chance.choice(("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))
    if chance.random() < 0.5:
        content["record"]["whole_tensors"] = [f"{name}.{own}" for name in names for own in ("weight", "bias")]
    return json.dumps(content).encode()


# --- safetensors ----------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of an intact file."""
    end = HEADER + int.from_bytes(data[:HEADER], "little")
    return json.loads(data[HEADER:end]), data[end:]


def join(header: Any, tensors: bytes) -> bytes:
    """A file with that header, right or wrong."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(HEADER, "little") + text + tensors


def damage_length(data: bytes, chance: Random) -> bytes:
    """Let the header claim another length."""
    length = int.from_bytes(data[:HEADER], "little")
    claim = chance.choice((0, 1, length - 1, length + 1, len(data), 2**20, 2**32, 2**40, 2**63, 2**64 - 1))
    return claim.to_bytes(HEADER, "little") + data[HEADER:]


def damage_header(data: bytes, chance: Random) -> bytes:
    """Change dtype, shape, offsets or name of some tensors, so that some still fit their bytes."""
    header, tensors = split(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        name = chance.choice([key for key in header if isinstance(header[key], dict)] or ["none"])
        entry = header.setdefault(name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        kind = chance.randrange(8)
        if kind == 0:
            entry["dtype"] = chance.choice(DTYPES)
        elif kind == 1:
            entry["shape"] = chance.choice(([], [0], [1], [1, -1], [2**40], [2**32, 2**32], entry.get("shape"), "x",
                                            [2**63], [1] * 100, [0, 2**60]))  # fmt: skip
        elif kind == 2:
            entry["data_offsets"] = [chance.choice((0, 1, 4, 8, len(tensors), 2**40, -1, 2**64)) for _ in range(2)]
        elif kind == 3:
            other = chance.choice(list(header))
            header[name], header[other] = header[other], header[name]
        elif kind == 4:
            fresh = chance.choice((*TEXTS, f"{name}.default", name.replace("hidden", "head"), name.rpartition(".")[0]))
            header[fresh] = header.pop(name)
        elif kind == 5:
            del header[name]
        elif kind == 6:
            header["__metadata__"] = anything(chance)
        else:
            _reinterpret(entry, chance)
    return join(header, tensors)


def _reinterpret(entry: dict[str, Any], chance: Random) -> None:
    """Another dtype or shape for the same number of bytes."""
    alike = {1: ("U8", "I8", "BOOL", "F8_E4M3"), 2: ("U16", "I16", "F16", "BF16"), 4: ("F32", "I32", "U32"),
             8: ("F64", "I64", "U64", "C64")}  # fmt: skip
    for size, names in alike.items():
        if entry.get("dtype") in names:
            other = chance.choice(tuple(alike))
            count = 1
            for length in entry["shape"] if isinstance(entry.get("shape"), list) else ():
                count *= length
            if count * size % other == 0:
                entry["dtype"] = chance.choice(alike[other])
                entry["shape"] = chance.choice(([count * size // other], [1, count * size // other]))
            return


def damage_data(data: bytes, chance: Random) -> bytes:
    """Damage the tensors' bytes alone."""
    header, tensors = split(data)
    changed = chance.choice((flip, overwrite))(tensors, chance)
    return join(header, changed)


SAFETENSORS: tuple[Damage, ...] = (*BYTES, damage_length, damage_header, damage_header, damage_data, damage_data)
JSON: tuple[Damage, ...] = (*BYTES[:2], truncate, *[damage_json_text] * 9)
