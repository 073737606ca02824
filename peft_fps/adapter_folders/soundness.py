"""Whether the files of a saved adapter are sound, as far as that can be told without its base model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from peft_fps.adapter_folders.adapter_contents import Check, Inspection, Modules
from peft_fps.checkpoint import (
    FILE_REMEDY,
    PEFT_PREFIX,
    TENSORS,
    WEIGHTS,
    Expected,
    check_adapter_tensors,
    check_folder,
    check_whole_modules,
    open_safetensors,
)
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig


def inspect_adapter(folder: Path) -> Inspection:
    """Read an adapter folder and check all that can be checked without its base model.

    Checked are, in order: `config`, its fields and the format version; `file`, that it is safetensors and holds all
    modules that are saved whole; `digest`, that the tensors are the ones the config was saved with; `entries`, keys,
    dtypes, shapes, ranges, order and finite values; `heads`, the tensors of modules saved whole. What a failed check
    leaves unknown is not checked any more.

    Args:
        folder: with `adapter_config.json`.

    Raises:
        ValueError: the config is not JSON, or another method's.
    """
    raw = _raw_config(folder)
    checks: list[Check] = []
    config: FPSConfig | None = None
    record: AdapterRecord | None = None
    tensors: Modules = {}
    heads: dict[str, Tensor] = {}

    def passes(name: str, action: Callable[[], Any]) -> bool:
        try:
            action()
        except (ValueError, TypeError, OSError) as error:
            checks.append(Check(name, False, str(error)))
            return False
        checks.append(Check(name, True))
        return True

    def read_config() -> None:
        nonlocal config, record
        found = PeftConfig.from_peft_type(**raw)
        assert isinstance(found, FPSConfig)
        if found.record is None:
            raise ValueError(
                "record is None, expected the record of sizes that saving an adapter writes. The config is "
                "incomplete; fetch or save the adapter again."
            )
        config, record = found, found.record

    def read_file() -> None:
        assert record is not None
        if not (folder / WEIGHTS).is_file() and record.pickled:
            raise ValueError(f"the adapter is pickled, expected {WEIGHTS}: a pickled file is not opened here.")
        check_folder(folder, record.whole_tensors or (), record.pickled)
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"there is no {WEIGHTS} beside the config. Fetch or save the adapter again.")
        _read_tensors(folder / WEIGHTS, tensors, heads)

    if passes("config", read_config) and passes("file", read_file):
        assert config is not None
        assert record is not None
        asked, known = config, record
        if known.tensors_sha256 is None:
            checks.append(Check("digest", None, "the config has none"))
        else:
            passes("digest", lambda: check_folder(folder, (), known.pickled, known.tensors_sha256))
        passes("entries", lambda: _check_entries(asked, known, tensors))
        whole = {key: heads[key] for key in known.whole_tensors or () if key in heads}
        passes("heads", lambda: check_whole_modules(heads, whole))
    made = {check.name for check in checks}
    checks += [Check(name, None, "not reached") for name in ("file", "digest", "entries", "heads") if name not in made]
    size = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else 0
    return Inspection(folder, config, tuple(checks), tensors, heads, size)


def _raw_config(folder: Path) -> dict[str, Any]:
    """Return the config of an FPS adapter as plain data; raises ValueError for anything else."""
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}. Fetch or save the adapter again.") from error
    method = raw.get("peft_type") if isinstance(raw, dict) else None
    if method != "FPS":
        found = f"an adapter of the method {method}" if method else "no PEFT method"
        raise ValueError(f"{path} names {found}, expected one that was saved with FPS.")
    raw.pop("runtime_config", None)
    return dict(raw)


def _read_tensors(path: Path, modules: Modules, heads: dict[str, Tensor]) -> None:
    """Fill both with the tensors of an adapter file: those of entries, and all others."""
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            own = key.removeprefix(PEFT_PREFIX)
            module, _, name = own.rpartition(".")
            held = modules.setdefault(module, {}) if name in TENSORS else heads
            place = name if name in TENSORS else own
            if place in held:
                raise ValueError(f"{own} is in the file twice, expected it once. {FILE_REMEDY}")
            held[place] = file.get_tensor(key)


def _check_entries(config: FPSConfig, record: AdapterRecord, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check keys, dtypes, shapes and ranges of the tensors of entries against the recorded sizes."""
    expected = {}
    for module, size in record.allocation.items():
        # whether a layer has a bias is the base model's to say; a norm is there for its bias alone
        bias = config.bias != "none" and (size.is_norm or "fps_bias" in tensors.get(module, {}))
        gate = config.token_gate is not None and not size.is_norm
        expected[module] = Expected(size.neurons, size.inputs, size.entries, bias, gate)
    check_adapter_tensors(tensors, expected, total_only=config.granularity not in ("neuron", "layer"))
