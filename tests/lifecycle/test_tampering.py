"""Adapter folders that were damaged or forged: each is refused by name, through every door, and nothing has happened.

Only transformers' own loader skips PEFT's loading hooks. There the layers check themselves before their first use, and
the last section says what that catches, what transformers refuses or repairs by itself, and what it lets through.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTMSNConfig, ViTMSNForImageClassification

from peft_fps import hotswap_adapter
from peft_fps.layers.fps_layer import FPSLayer
from tests.support.combinations import in_turn
from tests.support.helpers import (
    adapted,
    bits,
    config,
    fill,
    images,
    layers_of,
    normal,
    through_transformers,
    tiny_vit,
    unchanged,
    with_fields,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["projection", "q_proj", "fc2"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid adapter with uneven rows, biases and a head; three entries in the first neuron of each layer."""
    model = get_peft_model(tiny_vit(), config(target_modules=TARGETS, per_neuron=3.4))
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += normal(*parameter.shape)
    folder = tmp_path_factory.mktemp("intact")
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images()).logits


# --- tamperings -----------------------------------------------------------------------------------------------------

LAYER = "vit.layers.0.attention.q_proj"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Tampering:
    """A change of a folder, and what the message has to say about it: `where`, found and expected."""

    change: Callable[[Path], None]
    where: str
    says: str


def _tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        (folder / WEIGHTS).unlink()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        if (folder / CONFIG).exists():
            _config(tensors_sha256=None)(folder)  # it would notice any change; who forges a file leaves it out

    return change


def _tensor(name: str, edit: Callable[[Tensor], Tensor], says: str, where: str = LAYER) -> Tampering:
    def replace(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}{where}.{name}"] = edit(tensors[f"{PREFIX}{where}.{name}"].clone())

    return Tampering(_tensors(replace), where, says)


def _element(name: str, place: int, element: float, says: str, where: str = LAYER) -> Tampering:
    def edit(tensor: Tensor) -> Tensor:
        tensor = tensor if tensor.is_floating_point() else tensor.to(torch.int32)
        tensor.view(-1)[place] = element
        return tensor

    return _tensor(name, edit, says, where)


def _first_two(*places: int) -> Tampering:
    """The first two columns are replaced by those at the given places."""

    def edit(columns: Tensor) -> Tensor:
        columns = columns.to(torch.int32)
        columns[:2] = columns[list(places)]
        return columns

    return _tensor(COLUMNS, edit, "not strictly increasing within neuron 0, expected sorted")


def _without(*names: str, where: str = LAYER) -> Callable[[Path], None]:
    return _tensors(lambda tensors: [tensors.pop(f"{PREFIX}{where}.{name}") for name in names])


def _missing(name: str) -> Tampering:
    return Tampering(_without(name), LAYER, rf"holds .*expected .*'{name}'")


def _extra(key: str, tensor: Tensor, where: str, says: str) -> Tampering:
    return Tampering(_tensors(lambda tensors: tensors.update({key: tensor})), where, says)


def _base_weight(name: str, *shape: int) -> Tampering:
    return _extra(f"{PREFIX}{name}", torch.zeros(shape), name, "expected only .*base weights are never")


def _renamed(name: str, where: str) -> Tampering:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if LAYER in key]:
            tensors[key.replace(LAYER, name)] = tensors.pop(key)

    return Tampering(_tensors(rename), where, "holds")


def _drop_module(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if LAYER in key]:
        del tensors[key]


def _one_entry_less(tensors: dict[str, Tensor]) -> None:
    """Consistent in itself, but not what the config says."""
    for name in ("fps_values", "fps_columns"):
        tensors[f"{PREFIX}{LAYER}.{name}"] = tensors[f"{PREFIX}{LAYER}.{name}"][1:]
    tensors[f"{PREFIX}{LAYER}.fps_row_counts"][0] -= 1


nan, inf = float("nan"), float("inf")
COLUMNS, COUNTS, VALUES, BIAS = "fps_columns", "fps_row_counts", "fps_values", "fps_bias"

TENSORS: dict[str, Tampering] = {
    "column is the fan-in": _element(COLUMNS, -1, 32, r"fps_columns ranges over \[\d+, 32\], expected \[0, 31\]"),
    "column far outside": _element(COLUMNS, 2, 2**31 - 1, r"\[\d+, 2147483647\], expected \[0, 31\]"),
    "column negative": _element(COLUMNS, 0, -1, r"fps_columns ranges over \[-1, \d+\], expected \[0, 31\]"),
    "column duplicate": _first_two(0, 0),
    "columns unsorted": _first_two(1, 0),
    "column of a convolution": _element(
        COLUMNS, -1, 48, r"\[\d+, 48\], expected \[0, 47\]", "vit.embeddings.patch_embeddings.projection"
    ),
    "value NaN": _element(VALUES, 5, nan, "fps_values contains NaN or infinity, expected finite"),
    "value infinite": _element(VALUES, 5, -inf, "fps_values contains NaN or infinity, expected finite"),
    "bias NaN": _element(BIAS, 31, nan, "fps_bias contains NaN or infinity, expected finite"),
    "head NaN": _element("weight", 7, nan, "contains NaN or infinity, expected finite", "classifier"),
    "no values": _missing(VALUES),
    "no columns": _missing(COLUMNS),
    "no counts": _missing(COUNTS),
    "no bias": _missing(BIAS),
    "no tensor of a module": Tampering(_tensors(_drop_module), LAYER, "holds nothing, expected"),
    "unknown tensor": _extra(
        f"{PREFIX}{LAYER}.fps_scale",
        torch.ones(1),
        LAYER,
        r"holds .*'fps_scale'.*expected \['fps_bias', 'fps_col",
    ),
    "second copy without prefix": _extra(f"{LAYER}.fps_values", torch.ones(108), LAYER, "expected"),
    "second copy under an old name": _extra(
        f"{PREFIX}vit.encoder.layer.0.attention.attention.query.fps_values",
        torch.ones(108),
        r"vit\.(layers\.0\.attention\.q_proj|encoder\.layer\.0\.attention\.attention\.query)",
        "expected",
    ),
    "module that is no target": _extra(
        f"{PREFIX}vit.layers.0.mlp.fc1.fps_values",
        torch.ones(3),
        "vit.layers.0.mlp.fc1",
        "this adapter (targets|does not target)",
    ),
    "base weight of a target": _base_weight(f"{LAYER}.weight", 32, 32),
    "base weight under its wrapper": _base_weight(f"{LAYER}.base_layer.weight", 32, 32),
    "base weight of another module": _base_weight("vit.layers.1.layernorm_before.weight", 32),
    "base weight of the head": _base_weight("classifier.original_module.weight", 5, 32),
    "another adapter's tensor": _extra(
        f"{PREFIX}{LAYER}.fps_values.first", torch.zeros(108), f"{LAYER}.fps_values.first", "expected only"
    ),
    "values one short": _tensor(VALUES, lambda x: x[:-1], r"fps_values has shape \(107,\), expected \(108,\)"),
    "columns one short": _tensor(COLUMNS, lambda x: x[:-1], "fps_columns has 107 elements, expected .*108"),
    "one entry less": Tampering(_tensors(_one_entry_less), LAYER, "107 elements, expected 108 as the config says"),
    "counts one too many": _element(COUNTS, 0, 5, "fps_columns has 108 elements, expected .*109"),
    "counts one short": _tensor(COUNTS, lambda x: x[:-1], "fps_row_counts has 31 elements, expected .*32"),
    "counts negative": _tensor(
        COUNTS, lambda x: torch.cat([torch.tensor([-1, 8], dtype=torch.int32), x[2:].int()]), r"\[-1, 8\], expected"
    ),
    "counts reversed": _tensor(COUNTS, lambda x: x.flip(0), "not strictly increasing within neuron"),
    "float columns": _tensor(COLUMNS, lambda x: x.float() + 0.7, "dtype torch.float32, expected .*uint16"),
    "int64 columns": _tensor(COLUMNS, lambda x: x.long(), "dtype torch.int64, expected .*uint16"),
    "float64 counts": _tensor(COUNTS, lambda x: x.double(), "dtype torch.float64, expected .*uint8"),
    "bool counts": _tensor(COUNTS, lambda x: x.bool(), "dtype torch.bool, expected .*uint8"),
    "integer values": _tensor(VALUES, lambda x: (10 * x).int(), "dtype torch.int32, expected a floating"),
    "complex values": _tensor(VALUES, lambda x: x.to(torch.complex64), "dtype torch.complex64, expected a floating"),
    "8-bit values": _tensor(VALUES, lambda x: x.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn, expected"),
    "matrix of values": _tensor(VALUES, lambda x: x[None], r"fps_values has shape \(1, 108\), expected \(108,\)"),
    "bias one short": _tensor(BIAS, lambda x: x[:-1], r"fps_bias has shape \(31,\), expected \(32,\)"),
    "bias one long": _tensor(BIAS, lambda x: torch.cat([x, x[:1]]), r"fps_bias has shape \(33,\), expected \(32,\)"),
    "head of other shape": _tensor(
        "weight", lambda x: x[:-1], r"has 4 outputs \(shape \(4, 32\)\), expected 5 .*\(5, 32\)", "classifier"
    ),
    "head of integers": _tensor("bias", lambda x: x.int(), "dtype torch.int32, expected a floating", "classifier"),
    "module renamed": _renamed("vit.layers.7.attention.q_proj", r"vit\.layers\.[07]\.attention\.q_proj"),
    "module renamed to another one": _renamed(
        "vit.layers.0.attention.k_proj", r"vit\.layers\.0\.attention\.[kq]_proj"
    ),
}


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        written = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(with_fields(written, **fields)))

    return change


def _allocation(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        allocation = json.loads((folder / CONFIG).read_text())["record"]["allocation"]
        edit(allocation)
        _config(allocation=allocation)(folder)

    return change


def _fields(says: str, **fields: Any) -> Tampering:
    """Other values of fields of the config, the first of which the message names."""
    return Tampering(_config(**fields), next(iter(fields)), says)


def _sizes(says: str, **sizes: Any) -> Tampering:
    return Tampering(_allocation(lambda allocation: allocation[LAYER].update(sizes)), LAYER, says)


FORGED = {"sha256": "0" * 64, "dtype": "float32"}
CONFIGS: dict[str, Tampering] = {
    "newer format": _fields("is 3, expected at most 2.*[Uu]pgrade", format_version=3),
    "format of another type": _fields("'1', expected an integer", format_version="1"),
    "unknown importance": _fields("'magic', expected one of 'act", importance="magic"),
    "unknown granularity": _fields("'diagonal', expected one of 'neuron'", granularity="diagonal"),
    "unknown norm": _fields("'l3', expected one of 'l1'", norm="l3"),
    "unknown bias": _fields("'lora_only', expected one of", bias="lora_only"),
    "budget above one": _fields("1.5, expected a finite number", budget=1.5, per_neuron=None),
    "budget and per_neuron": _fields("both given, expected at most one", budget=0.5),
    "per_neuron as text": _fields("'3' of type str, expected a number", per_neuron="3"),
    "per_neuron NaN": _fields("nan, expected a finite number", per_neuron=nan),
    "seed as text": _fields("'os.system', expected an integer", seed="os.system"),
    "targets with a number": _fields("expected", target_modules=["q_proj", 3]),
    "pattern no expression": _fields("expected a valid reg", target_modules="(q_proj"),
    "whole modules as text": _fields("expected", modules_to_save="classifier"),
    "sizes too large": _sizes("1025.*expected at most neurons times inputs", entries=32 * 32 + 1),
    "sizes negative": _sizes("-1.*expected integers of at least 0", entries=-1),
    "sizes as text": _sizes("'108'.*expected integers", entries="108"),
    "sizes bool": _sizes("True.*expected integers", entries=True),
    "sizes incomplete": Tampering(_allocation(lambda a: a[LAYER].pop("inputs")), LAYER, "expected .*'inputs'"),
    "other neurons": _sizes("found 32 neurons with 32 inputs, expected 33 with 32", neurons=33),
    "other fan-in": _sizes("found 32 neurons with 32 inputs, expected 32 with 31", inputs=31),
    "huge layer": _sizes(
        "found 32 neurons with 32 inputs, expected 10995116", neurons=2**40, inputs=2**20, entries=2**60
    ),
    "names a missing module": Tampering(
        _allocation(lambda a: a.update({"vit.layers.7.mlp.fc2": a["vit.layers.0.mlp.fc2"]})),
        "vit.layers.7.mlp.fc2",
        "no such target",
    ),
    "allocation of another type": _fields("of type list, expected", allocation=[LAYER]),
    "fingerprint of another base": Tampering(
        _config(base_fingerprint=FORGED), "base weights", "found fingerprint [0-9a-f]{12}, expected 000000000000"
    ),
    "fingerprint of other types": Tampering(
        _config(base_fingerprint={"sha256": 5, "dtype": 7}), "base weights|base_fingerprint", "expected"
    ),
    "fingerprint as text": _fields("'00' of type str, expected", base_fingerprint="00"),
    "task of a model that generates": _fields(
        "'CAUSAL_LM', expected a model of transformers for it", task_type="CAUSAL_LM"
    ),
    "base name as number": _fields("5 of type int", base_model_name_or_path=5),
    "revision as list": _fields("of type list, expected None or a string", revision=["main"]),
    "mapping as text": _fields("'x' of type str, expected None or what", auto_mapping="x"),
    "whole tensors of nothing": Tampering(
        _config(whole_tensors=["classifier.weight"]), "classifier.bias", "lacks this tensor .*expected the tensors of"
    ),
    "entries in a module trained whole": Tampering(
        _allocation(lambda a: a.update({"classifier": {"neurons": 5, "inputs": 32, "entries": 5}})),
        "classifier: ",
        "has entries for it, and trains classifier whole .*expected one of the two",
    ),
}

NO_MODULE = "names .*, expected the path, or the end of the path behind a dot, of a module"
NOT_TO_BE_WHOLE = {
    **dict.fromkeys(["lm_head", ".", "classifier.", "sifier", "l.*er", "(head|vit)", "vit.layers.7"], NO_MODULE),
    **dict.fromkeys(["base_layer", "fps_columns", "fps_values", "original_module", "modules_to_save", "default"],
                    f"{NO_MODULE}|a part of an adapter|also the end of"),
    "layer": f"{NO_MODULE}|also the end of",
    "layers": r"a module with a part that another adapter changes|trains vit.layers.0 whole",
    "q_proj": "has entries for it, and trains .* whole|carries sparse changes of another adapter",
    "k_proj": "whole_tensors of the adapter's config lists|carries sparse changes of another adapter",
    "attention": "has entries for it, and trains .* whole|a part that another adapter changes",
    "layers.0": "has entries for it, and trains .* whole|a part that another adapter changes",
    "vit": "has entries for it, and trains vit whole|a part that another adapter changes",
    "layernorm": "classifier.bias: whole_tensors of the adapter's config lists this tensor",
}  # fmt: skip
"""Names in `modules_to_save` that a file must not have, whatever tensors it brings."""


def _whole(name: str, full: bool) -> Tampering:
    """The config trains other modules whole; with `full`, the file holds their tensors, and the config says so."""

    def change(folder: Path) -> None:
        _config(modules_to_save=[name])(folder)
        if full:
            paths = {path: path for path, _ in tiny_vit().named_modules() if path.endswith(name)}
            if name == "base_layer":
                paths = {f"{LAYER}.base_layer": LAYER}
            model = tiny_vit()
            tensors = {
                f"{path}.{own}": tensor.clone() + 1
                for path, module in paths.items()
                for own, tensor in model.get_submodule(module).state_dict().items()
            }
            _tensors(lambda held: held.update({f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}))(folder)
            _config(whole_tensors=sorted({*tensors, "classifier.weight", "classifier.bias"}))(folder)

    return Tampering(change, "modules_to_save|whole_tensors", NOT_TO_BE_WHOLE[name])


UNLIKE_THE_FILE: dict[str, Tampering] = {
    "one entry more": _sizes("108 elements, expected 109 as the config says", entries=109),
    "lacks a module": Tampering(
        _allocation(lambda a: a.pop(LAYER)), f"base weights|{LAYER}", "found fingerprint|target"
    ),
    "lacks a module and the fingerprint": Tampering(
        lambda folder: (_allocation(lambda a: a.pop(LAYER))(folder), _config(base_fingerprint=None)(folder))[0],
        LAYER,
        "targets?",
    ),
    "bias switched off": Tampering(_config(bias="none"), "vit.", r"holds .*'fps_bias'.*expected \['fps_columns'"),
    "head switched off": Tampering(_config(modules_to_save=[]), "classifier", "expected only sparse tensors"),
    "no module left": Tampering(_config(allocation={}, base_fingerprint=None), "", "target"),
}


def _bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes())) and None


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


FILES: dict[str, Tampering] = {
    "truncated": Tampering(_bytes(lambda data: data[:-40]), WEIGHTS, "not a readable safetensors file"),
    "bytes appended": Tampering(_bytes(lambda data: data + b"\0" * 8), WEIGHTS, "not a readable safetensors file"),
    "garbage in the header": Tampering(
        _bytes(lambda data: data[:8] + b"?" * 40 + data[48:]), WEIGHTS, "not a readable safetensors file"
    ),
    "huge header": Tampering(_bytes(lambda data: b"\xff" * 8 + data[8:]), WEIGHTS, "not a readable safetensors file"),
    "empty": Tampering(_bytes(lambda data: b""), WEIGHTS, "not a readable safetensors file"),
    "missing": Tampering(lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "holds a config and no .*expected both"),
    "pickle": Tampering(_pickled, "adapter_model.bin", f"is a pickled adapter, expected {WEIGHTS}"),
}


# --- doors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """A way to load: `prepare` makes the model that must stay as it is (given an intact folder), `load` loads."""

    prepare: Callable[[Path], nn.Module]
    load: Callable[[nn.Module, Path], object]


def _fresh(intact: Path) -> nn.Module:
    return tiny_vit()


def _with_first(intact: Path) -> nn.Module:
    """Carries an adapter that shares one kind of module with the one to come."""
    return adapted(tiny_vit(), "first", target_modules=["k_proj", "q_proj"], per_neuron=1)


def _merged(model: Any) -> nn.Module:
    model.merge_adapter()
    return model


def _inject(model: nn.Module, folder: Path, name: str = "default") -> None:
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), model, name)
    tensors = load_file(folder / WEIGHTS)
    # PEFT finds the head of a model that it does not wrap only without its prefix
    own = {key.removeprefix(PREFIX) if "classifier" in key else key: tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, own, name)


def _injected_first(intact: Path) -> nn.Module:
    model = inject_adapter_in_model(config(target_modules=["k_proj", "q_proj"], per_neuron=1), tiny_vit(), "first")
    fill(model, "first")
    return model.eval()


def _by_transformers(model: Any, folder: Path, name: str | None = None) -> None:
    model.load_adapter(folder, name)


def _transformers_first(intact: Path) -> nn.Module:
    model = tiny_vit()
    model.load_adapter(intact, "first")
    return model


FILE_DOORS = {
    "from_pretrained": Door(_fresh, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "from_pretrained low memory": Door(
        _fresh, lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
    ),
    "load_adapter": Door(_with_first, lambda model, folder: model.load_adapter(folder, "second")),
    "load_adapter low memory": Door(
        _with_first, lambda model, folder: model.load_adapter(folder, "second", low_cpu_mem_usage=True)
    ),
}
INJECTING_DOORS = {
    "inject": Door(_fresh, _inject),
    "inject second": Door(_injected_first, lambda model, folder: _inject(model, folder, "second")),
}
TRANSFORMERS_DOORS = {
    "transformers": Door(_fresh, _by_transformers),
    "transformers second": Door(_transformers_first, lambda model, folder: _by_transformers(model, folder, "second")),
}
RELOAD = Door(  # as the Trainer does when it resumes
    lambda intact: PeftModel.from_pretrained(tiny_vit(), intact, is_trainable=True),
    lambda model, folder: model.load_adapter(folder, "default", is_trainable=True),
)
HOTSWAP = Door(
    lambda intact: PeftModel.from_pretrained(tiny_vit(), intact),
    lambda model, folder: hotswap_adapter(model, str(folder), "default"),
)
SECOND_MERGED = Door(
    lambda intact: _merged(_with_first(intact)), lambda model, folder: model.load_adapter(folder, "second")
)
TENSOR_DOORS = FILE_DOORS | INJECTING_DOORS | {"load_adapter into existing": RELOAD}
DOORS = TENSOR_DOORS | TRANSFORMERS_DOORS | {"hotswap": HOTSWAP, "load_adapter merged": SECOND_MERGED}
OTHER_FILE_DOORS = [door for door in FILE_DOORS if door != "from_pretrained"]
"""For what the comparison with a hot swap loads by `from_pretrained`."""


def tampered(intact: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    folder = shutil.copytree(intact, tmp_path / "tampered")  # makes tmp_path, too
    change(folder)
    return folder


def state(model: nn.Module) -> dict[str, Any]:
    """What `unchanged` does not see: kinds of modules, names of adapters, attributes, results."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "attributes": set(vars(model)),
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": {name: list(layer.active_adapters) for name, layer in layers_of(model).items()},
        "logits": bits(logits(model)),
    }


def refuse(door: Door, model: nn.Module, folder: Path, *errors: type[Exception]) -> str:
    """Assert that loading is refused and leaves no trace; returns the message."""
    model.eval()
    before = state(model)
    with unchanged(model), pytest.raises(errors or ValueError) as error:
        door.load(model, folder)
    after = state(model)
    for part, expected in before.items():
        assert after[part] == expected, part
    return str(error.value)


prepared = cache(lambda door, intact: door.prepare(intact))
"""A model for a door, the same one for every refusal."""


def refuse_at(door: Door, intact: Path, folder: Path, *errors: type[Exception]) -> str:
    """Refusals leave no trace, so that the next one finds the model as it was prepared."""
    try:
        return refuse(door, prepared(door, intact), folder, *errors)
    except BaseException:
        prepared.cache_clear()
        raise


def assert_says(message: str, tampering: Tampering) -> None:
    assert re.search(tampering.where, message), message
    assert re.search(tampering.says, message), message


# --- refused by name, and nothing has happened; doors that take turns reach the same check ---------------------------


CASES = TENSORS | CONFIGS | UNLIKE_THE_FILE | FILES


@pytest.mark.parametrize(
    ("case", "door"),
    [
        *in_turn(TENSORS, OTHER_FILE_DOORS, INJECTING_DOORS, ["load_adapter into existing"]),
        *in_turn(CONFIGS, OTHER_FILE_DOORS, INJECTING_DOORS, TRANSFORMERS_DOORS),
        *in_turn(UNLIKE_THE_FILE, OTHER_FILE_DOORS, INJECTING_DOORS),
        *in_turn(FILES, OTHER_FILE_DOORS),
    ],
)
def test_what_was_tampered_with_is_refused(case: str, door: str, intact: Path, tmp_path: Path) -> None:
    errors = (ValueError, TypeError) if case in CONFIGS else (ValueError,)
    message = refuse_at(DOORS[door], intact, tampered(intact, tmp_path, CASES[case].change), *errors)
    assert_says(message, CASES[case])
    assert "fetch or save it again" in message or case not in TENSORS


WHOLE = [(name, False) for name in NOT_TO_BE_WHOLE]
WHOLE += [(name, True) for name in ("sifier", "base_layer", "q_proj", "attention", "vit", "layernorm")]


@pytest.mark.parametrize(
    ("case", "door"),
    in_turn(
        WHOLE,
        ["from_pretrained", "transformers"],
        ["load_adapter", "load_adapter merged", "inject second"],
        ["hotswap"],
    ),
)
def test_modules_that_a_file_must_not_train_whole(
    case: tuple[str, bool], door: str, intact: Path, tmp_path: Path
) -> None:
    tampering = _whole(*case)
    message = refuse_at(DOORS[door], intact, tampered(intact, tmp_path, tampering.change))
    if door == "hotswap":
        assert re.search("trains .* whole|modules_to_save", message), message
    else:
        assert_says(message, tampering)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.parametrize("case", ["value NaN", "no module tensor", "head of integers"])
def test_a_file_that_is_refused_late_leaves_a_merged_model_merged(case: str, intact: Path, tmp_path: Path) -> None:
    """PEFT unmerges before it adds an adapter."""
    tampering = TENSORS["no tensor of a module" if case == "no module tensor" else case]
    model = SECOND_MERGED.prepare(intact)
    assert_says(refuse(SECOND_MERGED, model, tampered(intact, tmp_path, tampering.change)), tampering)
    assert all(layer.merged_adapters == ["first"] for layer in layers_of(model).values())


@pytest.mark.filterwarnings("ignore:classifier. part of the model's output head:UserWarning")
def test_a_module_that_only_the_refused_file_trains_whole_is_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    adapted(tiny_vit(), target_modules=["fc2"], modules_to_save=["vit.layernorm"]).save_pretrained(folder)
    model = adapted(tiny_vit(), "first", target_modules=["k_proj"], modules_to_save=["classifier"])
    case = _element("weight", 3, nan, "contains NaN", "vit.layernorm")
    assert_says(refuse(DOORS["load_adapter"], model, tampered(folder, tmp_path, case.change)), case)
    assert not any("fc2" in name for name in model.base_model.targeted_module_names)
    model.load_adapter(folder, "second")
    assert model.base_model.model.vit.layernorm.modules_to_save.keys() == {"second"}


@pytest.mark.parametrize("target_modules", [None, "all-linear", "dummy-target-modules", ".*", ["nothing"]])
def test_the_record_of_entries_decides_whatever_the_targets_say(
    target_modules: Any, intact: Path, tmp_path: Path
) -> None:
    fields = {"target_modules": target_modules, "layers_to_transform": None, "exclude_modules": None}
    model = PeftModel.from_pretrained(tiny_vit(), tampered(intact, tmp_path, _config(**fields)))
    expected = PeftModel.from_pretrained(tiny_vit(), intact)
    assert layers_of(model).keys() == layers_of(expected).keys()
    assert bits(logits(model)) == bits(logits(expected))


def test_a_pattern_from_a_file_is_not_matched_where_the_record_decides(intact: Path, tmp_path: Path) -> None:
    """Its matching grows exponentially with the length of a module's name."""
    evil = _config(target_modules=None, layers_to_transform=[0], layers_pattern=["([a-z_.]+)+!"])
    PeftModel.from_pretrained(tiny_vit(), tampered(intact, tmp_path, evil))


@pytest.mark.parametrize("door", FILE_DOORS)
def test_a_file_cannot_waive_the_check_of_its_base(door: str, intact: Path, tmp_path: Path) -> None:
    """`check_base` is the loading side's choice."""
    waiver = Tampering(_config(base_fingerprint=FORGED, check_base="warn"), "base weights|check_base", "expected")
    folder = tampered(intact, tmp_path, waiver.change)
    assert_says(refuse_at(FILE_DOORS[door], intact, folder), waiver)


@pytest.mark.parametrize("case", [case for case in FILES if case != "pickle"])
def test_files_into_an_existing_adapter(case: str, intact: Path, tmp_path: Path) -> None:
    """No config is read on this way, so the error is that of safetensors."""
    refuse_at(RELOAD, intact, tampered(intact, tmp_path, FILES[case].change), ValueError, SafetensorError)


TWICE = {
    "second copy of a tensor saved whole": _extra(
        "classifier.weight", torch.ones(5, 32), "classifier.weight", "holds this tensor twice, expected it once"
    ),
    "second copy of a sparse tensor": _extra(
        f"{LAYER}.fps_bias", torch.ones(32), LAYER, "holds fps_bias twice, expected it once"
    ),
}
"""What PEFT's and transformers' own prefixes make possible."""

OTHER_FINDINGS = {
    "names a missing module": r"vit.layers.7.mlp.fc2: the saved adapter changes this module \(1 like it\), expected",
    "entries in a module trained whole": r"classifier: the saved adapter changes this module \(1 like it\), expected",
    "whole tensors of nothing": r"trains \['classifier.weight'\] whole \(modules_to_save\), expected",
    "bias switched off": "has bias='none', expected 'all' as the adapter that it replaces has.*load_adapter",
    "no module left": "the adapter file holds .*, expected tensors of the modules that this adapter targets alone",
}
"""A hot swap compares a config with the adapter that it replaces, before it compares it with the model."""


@pytest.mark.parametrize("case", [*CASES, *TWICE])
def test_a_hot_swap_finds_what_loading_finds(case: str, intact: Path, tmp_path: Path) -> None:
    """The way to replace an adapter with every check."""
    tampering = (CASES | TWICE)[case]
    folder = tampered(intact, tmp_path, tampering.change)
    swapped = refuse_at(HOTSWAP, intact, folder, ValueError, TypeError)
    loaded = refuse_at(DOORS["from_pretrained"], intact, folder, ValueError, TypeError)
    assert_says(loaded, tampering)
    assert "fetch or save it again" in loaded or case not in TENSORS
    if case in OTHER_FINDINGS:
        assert re.search(OTHER_FINDINGS[case], swapped), swapped
    else:
        assert swapped == loaded


def test_what_is_not_even_a_pickle_into_an_existing_adapter(intact: Path, tmp_path: Path) -> None:
    """Should the error of the pickle change one day, PEFT asks us first, or torch has become clearer."""
    folder = shutil.copytree(intact, tmp_path / "damaged")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    model = RELOAD.prepare(intact)
    refuse(RELOAD, model, folder, UnpicklingError)
    assert_says(refuse(HOTSWAP, model, folder), FILES["pickle"])


@pytest.mark.parametrize("case", ["column negative", "value NaN", "no bias", "base weight of another module"])
def test_a_pickle_into_an_existing_adapter_is_checked_like_any_file(case: str, intact: Path, tmp_path: Path) -> None:
    """PEFT reads it (tensors only) without asking us; its tensors pass the same checks."""
    folder = tampered(intact, tmp_path, TENSORS[case].change)
    _pickled(folder)
    assert_says(refuse_at(RELOAD, intact, folder), TENSORS[case])


@pytest.mark.parametrize("case", FILES)
def test_files_beside_a_config_that_is_given(case: str, intact: Path, tmp_path: Path) -> None:
    """`config=` keeps PEFT from asking us about the folder: the adapter stays behind, and refuses to work."""
    folder, model = tampered(intact, tmp_path, FILES[case].change), tiny_vit()
    given = PeftConfig.from_pretrained(folder)
    if case == "pickle":  # PEFT reads tensors from it, nothing else; they are checked like those of any file
        _element(VALUES, 5, nan, "").change(intact_copy := shutil.copytree(intact, tmp_path / "copy"))
        torch.save(load_file(intact_copy / WEIGHTS), folder / "adapter_model.bin")
    with pytest.raises((ValueError, SafetensorError)):
        PeftModel.from_pretrained(model, folder, config=given)
    if layers_of(model):
        with pytest.raises(ValueError, match=r"vit\..*(not loaded|contains NaN)"):
            logits(model)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize(
    ("missing", "door"), in_turn(["weight", "bias", "both"], ["from_pretrained"], OTHER_FILE_DOORS, ["hotswap"])
)
def test_an_incomplete_head(door: str, missing: str, listed: bool, intact: Path, tmp_path: Path) -> None:
    """Whatever the config lists: what the model needs is what counts."""
    names = ["weight", "bias"] if missing == "both" else [missing]
    folder = tampered(intact, tmp_path, _without(*names, where="classifier"))
    if not listed:
        _config(whole_tensors=None)(folder)
    message = refuse_at(DOORS[door], intact, folder)
    assert re.search("classifier", message), message
    assert re.search("expected.*again", message), message


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_an_incomplete_head_into_an_existing_adapter(missing: str, intact: Path, tmp_path: Path) -> None:
    """PEFT looks the key up before it asks us: its KeyError names the key, and nothing has changed."""
    folder = tampered(intact, tmp_path, _without(missing, where="classifier"))
    assert f"classifier.{missing}" in refuse_at(RELOAD, intact, folder, ValueError, KeyError)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_an_incomplete_head_into_an_injected_adapter(missing: str, intact: Path, tmp_path: Path) -> None:
    """PEFT's KeyError again; the adapter that was injected before cannot be used."""
    model = tiny_vit()
    with pytest.raises((ValueError, KeyError), match=f"classifier.{missing}"):
        _inject(model, tampered(intact, tmp_path, _without(missing, where="classifier")))
    if layers_of(model):
        with pytest.raises(ValueError, match=r"vit\..*(not loaded|contains NaN)"):
            logits(model)


def use(loaded: object, model: nn.Module) -> nn.Module:
    """The model that a door has loaded into, with the loaded adapter active."""
    found = loaded if isinstance(loaded, nn.Module) else model
    (name,) = {name for layer in layers_of(found).values() for name in layer.fps_values} - {"first"}
    for module in found.modules():
        if isinstance(module, (FPSLayer, ModulesToSaveWrapper)):
            module.set_adapter(name)
    return found


@pytest.mark.parametrize("door", TENSOR_DOORS)
def test_a_wrapper_s_own_key_is_refused_or_without_effect(door: str, intact: Path, tmp_path: Path) -> None:
    """PEFT writes the head's tensors under this key, over whatever the file holds there, before it asks us."""
    for name in ("default", "second"):
        key = f"{PREFIX}classifier.modules_to_save.{name}.weight"
        add = _tensors(lambda tensors, key=key: tensors.update({key: torch.zeros(5, 32)}))
        folder = tampered(intact, tmp_path / name, add)
        model = TENSOR_DOORS[door].prepare(intact)
        refusal = ""
        try:
            loaded = TENSOR_DOORS[door].load(model, folder)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert "classifier" in refusal
        else:
            assert bits(logits(use(loaded, model))) == bits(logits(PeftModel.from_pretrained(tiny_vit(), intact)))


@pytest.mark.parametrize("door", TENSOR_DOORS)
def test_the_intact_file_loads_afterwards(door: str, intact: Path, tmp_path: Path) -> None:
    model = TENSOR_DOORS[door].prepare(intact)
    refuse(TENSOR_DOORS[door], model, tampered(intact, tmp_path, TENSORS["column negative"].change))
    loaded = use(TENSOR_DOORS[door].load(model, intact), model)
    assert bits(logits(loaded)) == bits(logits(PeftModel.from_pretrained(tiny_vit(), intact)))


def test_biases_alone(tmp_path: Path) -> None:
    """An adapter without entries has no columns that could tell whether it was loaded."""
    folder = tmp_path / "biases"
    adapted(tiny_vit(), target_modules=TARGETS, budget=0).save_pretrained(folder)
    _element(BIAS, 3, nan, "").change(folder)
    for door in FILE_DOORS.values():
        assert LAYER in refuse(door, door.prepare(folder), folder)


def test_gradients_of_the_base_come_back(intact: Path, tmp_path: Path) -> None:
    """Also where the base was partly frozen before."""
    model = tiny_vit()
    model.vit.embeddings.requires_grad_(False)
    refuse(DOORS["from_pretrained"], model, tampered(intact, tmp_path, TENSORS["no bias"].change))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {
        f"vit.embeddings.{name}" for name, _ in model.vit.embeddings.named_parameters()
    }


# --- an intact file on another model --------------------------------------------------------------------------------


def _other_weights() -> nn.Module:
    model = tiny_vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    return model


def _one_weight() -> nn.Module:
    model = tiny_vit()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight[0, 0] += 1
    return model


def _swapped() -> nn.Module:
    model = tiny_vit()
    model.vit.layers[0], model.vit.layers[1] = model.vit.layers[1], model.vit.layers[0]
    return model


def _vit_sizes() -> dict[str, Any]:
    sizes = tiny_vit().config.to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    return {name: sizes[name] for name in names} | {"num_labels": 5}


def _same_names_and_shapes() -> nn.Module:
    return ViTMSNForImageClassification(ViTMSNConfig(**_vit_sizes()))


def _same_weights_under_other_names() -> nn.Module:
    model = DeiTForImageClassification(DeiTConfig(**_vit_sizes()))
    model.deit.layers.load_state_dict(tiny_vit().vit.layers.state_dict())
    return model


def _wider() -> nn.Module:
    return type(tiny_vit())(ViTConfig(**_vit_sizes() | {"hidden_size": 48}))


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weights": (_other_weights, r"base weights: found fingerprint \w+, expected \w+.*Load it onto that model"),
    "one sampled weight": (_one_weight, "base weights: found fingerprint"),
    "layers swapped": (_swapped, "base weights: found fingerprint"),
    "same names and shapes": (_same_names_and_shapes, "base weights: found fingerprint"),
    "same weights under other names": (_same_weights_under_other_names, r"vit\.\S+: .*no such target.*load it onto"),
    "wider": (_wider, r"vit\.\S+: found \d+ neurons with \d+ inputs, expected \d+ with \d+.*load it onto"),
}


@pytest.mark.parametrize("door", ["from_pretrained", "from_pretrained low memory", "inject", "transformers"])
@pytest.mark.parametrize("other", OTHERS)
def test_another_base_model(other: str, door: str, intact: Path) -> None:
    build, says = OTHERS[other]
    assert re.search(says, refuse(DOORS[door], build(), intact))


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_another_base_model_in_bfloat16(door: str, intact: Path) -> None:
    """The fingerprint is of the weights in bfloat16, so this is decidable: the same base would have the same."""
    model = tiny_vit().to(torch.bfloat16)
    PeftModel.from_pretrained(model, intact).unload()
    model = _other_weights().to(torch.bfloat16)
    if door == "load_adapter":
        model = adapted(model, "first", target_modules=["k_proj"], per_neuron=1)
    with unchanged(model), pytest.raises(ValueError, match="base weights: found fingerprint"):
        DOORS[door].load(model, intact)


@pytest.mark.parametrize("other", ["other weights", "layers swapped"])
def test_another_base_model_for_a_second_adapter(other: str, intact: Path) -> None:
    build, says = OTHERS[other]
    model = adapted(build(), "first", target_modules=["k_proj"], per_neuron=1)
    for door in ("load_adapter", "load_adapter low memory"):
        assert re.search(says, refuse(DOORS[door], model, intact))


@pytest.mark.parametrize("other", ["other weights", "layers swapped", "same names and shapes"])
def test_another_base_model_on_request(other: str, intact: Path) -> None:
    build, says = OTHERS[other]
    with pytest.warns(UserWarning, match=says):
        model = PeftModel.from_pretrained(build(), intact, check_base="warn")
    assert torch.equal(
        layers_of(model)[LAYER].fps_values["default"], load_file(intact / WEIGHTS)[f"{PREFIX}{LAYER}.{VALUES}"]
    )


@pytest.mark.parametrize("other", ["same weights under other names", "wider"])
def test_sizes_and_names_are_checked_even_so(other: str, intact: Path) -> None:
    build, says = OTHERS[other]
    with pytest.raises(ValueError, match=says):
        PeftModel.from_pretrained(build(), intact, check_base="warn")


# --- transformers' own loader ---------------------------------------------------------------------------------------

# caught by us, before the first result
AT_FIRST_USE = [
    *("column is the fan-in", "column far outside", "column negative", "column duplicate", "columns unsorted"),
    *("value NaN", "value infinite", "bias NaN", "column of a convolution"),
    *("no values", "no columns", "no counts", "no bias", "no tensor of a module"),
    *("counts one too many", "counts negative", "counts reversed", "bool counts"),
    *("module renamed", "module renamed to another one"),
]
# transformers compares shapes
BY_TRANSFORMERS = [
    *("values one short", "columns one short", "one entry less", "counts one short", "matrix of values"),
    *("bias one short", "bias one long"),
]
# transformers casts to the model's dtypes, and reports and ignores what it does not know; the result is the intact one
REPAIRED = [
    *("float columns", "int64 columns", "float64 counts"),
    *("unknown tensor", "module that is no target", "base weight of a target", "another adapter's tensor"),
]
# transformers accepts them. Files from strangers are for PeftModel.from_pretrained, which refuses all of these.
LET_THROUGH = [
    *("base weight under its wrapper", "base weight of another module", "base weight of the head"),
    *("head NaN", "head of integers", "integer values", "complex values", "8-bit values"),
    *("second copy without prefix", "second copy under an old name"),
]


def test_every_tampering_was_tried_on_transformers() -> None:
    tried = [*AT_FIRST_USE, *BY_TRANSFORMERS, *REPAIRED, *LET_THROUGH, "head of other shape"]
    assert sorted(tried) == sorted(TENSORS)


@pytest.mark.parametrize("case", AT_FIRST_USE)
def test_transformers_loads_and_the_layers_refuse(case: str, intact: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    _by_transformers(model, tampered(intact, tmp_path, TENSORS[case].change))
    for _ in range(2):  # not only once
        with pytest.raises(ValueError, match=r"adapter 'default'.*(expected|were not loaded).*[Ll]oad an") as error:
            logits(model)
        assert re.search(TENSORS[case].where, str(error.value))
    for module in model.modules():
        if isinstance(module, (FPSLayer, ModulesToSaveWrapper)):
            module.enable_adapters(False)
    assert bits(logits(model)) == bits(logits(tiny_vit()))


@through_transformers
def test_transformers_disables_what_the_layers_refuse(intact: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    _by_transformers(model, tampered(intact, tmp_path, TENSORS["column negative"].change))
    model.disable_adapters()
    assert bits(logits(model)) == bits(logits(tiny_vit()))


@pytest.mark.parametrize("case", BY_TRANSFORMERS)
def test_transformers_refuses(case: str, intact: Path, tmp_path: Path) -> None:
    """It leaves the adapter half loaded, and the layers refuse to work with that."""
    model = tiny_vit()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        _by_transformers(model, tampered(intact, tmp_path, TENSORS[case].change))
    with pytest.raises(ValueError, match=LAYER):
        logits(model)


@pytest.mark.parametrize("case", [*FILES, "one entry more"])
def test_transformers_refuses_the_file(case: str, intact: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    with pytest.raises((RuntimeError, ValueError, OSError, SafetensorError)):
        _by_transformers(model, tampered(intact, tmp_path, CASES[case].change))
    with pytest.raises(ValueError, match=r"vit\."):
        logits(model)


@pytest.mark.parametrize("case", REPAIRED)
def test_transformers_repairs(case: str, intact: Path, tmp_path: Path) -> None:
    model, sound = tiny_vit(), tiny_vit()
    _by_transformers(model, tampered(intact, tmp_path, TENSORS[case].change))
    _by_transformers(sound, intact)
    assert bits(logits(model)) == bits(logits(sound))
    held = {name.replace("base_layer.", ""): parameter for name, parameter in model.vit.named_parameters()}
    assert all(torch.equal(held[name], parameter) for name, parameter in tiny_vit().vit.named_parameters())


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@pytest.mark.parametrize("case", LET_THROUGH)
def test_transformers_lets_through(case: str, intact: Path, tmp_path: Path) -> None:
    """Should one of these fail one day, move it up: transformers or this package has become stricter."""
    model = tiny_vit()
    _by_transformers(model, tampered(intact, tmp_path, TENSORS[case].change))
    assert logits(model).shape == (4, 5)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_transformers_reports_an_incomplete_head(missing: str, intact: Path, tmp_path: Path) -> None:
    info = tiny_vit().load_adapter(tampered(intact, tmp_path, _without(missing, where="classifier")))
    assert info.missing_keys == {f"classifier.modules_to_save.default.{missing}"}


def test_transformers_refuses_a_head_of_other_shape(intact: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tiny_vit().load_adapter(tampered(intact, tmp_path, TENSORS["head of other shape"].change))


def test_transformers_biases_alone(tmp_path: Path) -> None:
    """Without entries, only the bias delta itself can say that it was never loaded."""
    folder = tmp_path / "biases"
    adapted(tiny_vit(), target_modules=TARGETS, budget=0).save_pretrained(folder)
    _missing(BIAS).change(folder)
    model = tiny_vit()
    model.load_adapter(folder)
    with pytest.raises(ValueError, match=LAYER):
        logits(model)
