"""Load a damaged file, and say what came of it; anything but a clean refusal or a valid adapter is a `Violation`.

A refusal is clean if the model is as it was, bit for bit, and works, and the error is one of these:

- ValueError or TypeError from peft_fps: our checks.
- SafetensorError: a file that an existing adapter loads again, where PEFT does not ask us first.
- ValueError, TypeError, KeyError or AttributeError from PEFT: a config that is no JSON object or names no known
  `peft_type`, which PEFT reads before it knows whose it is; or a file for an existing adapter that lacks a tensor of
  its head.
- ValueError or RecursionError from Python's json: a config that is no JSON, or nested thousands of levels deep.
"""

import json
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_fps import Selection, hotswap_adapter
from peft_fps.layers.entry_layer import EntryLayer
from tests.support.helpers import _seeded, adapted, bits, fill, layers_of, normal, selected_columns, with_fields


WEIGHTS, CONFIG, SELECTION = "adapter_model.safetensors", "adapter_config.json", "selection.safetensors"
SECONDS = 20
SPARE_MEMORY = 64 << 20
"""Bytes that loading a file may take beyond some times its size; the model and one forward pass are far below."""


class Violation(AssertionError):
    """A damaged file did what it must not."""


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for a refusal."""


class Fuzzed(nn.Module):
    """One layer of each kind that FPS changes, and a head that is saved whole; a long name takes long to match."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution_of_the_embedding_stage = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.norm(self.convolution_of_the_embedding_stage(x).flatten(1)))))


TARGETS: dict[str, Any] = {
    "target_modules": ["convolution_of_the_embedding_stage", "hidden"],
    "modules_to_save": ["head"],
    "bias": "with_norms",
    "per_neuron": 2.5,
}
INPUTS = normal(3, 2, 4, 4, seed=5)


def base() -> nn.Module:
    return _seeded(Fuzzed)


def merged(model: Any) -> nn.Module:
    model.merge_adapter()
    return model


@dataclass(frozen=True)
class Door:
    """A way to load: which model stands ready, and the call that loads into it."""

    prepare: Callable[[Path], nn.Module]
    load: Callable[[Any, Path], Any]
    name: str


DOORS = {
    "from_pretrained": Door(lambda intact: base(), PeftModel.from_pretrained, "default"),
    "low memory": Door(lambda intact: base(), partial(PeftModel.from_pretrained, low_cpu_mem_usage=True), "default"),
    "second": Door(
        lambda intact: adapted(base(), "older", target_modules=["hidden"], modules_to_save=["head"], per_neuron=1),
        lambda model, folder: model.load_adapter(folder, "second"),
        "second",
    ),
    "second merged": Door(
        lambda intact: merged(adapted(base(), "older", target_modules=["hidden"], modules_to_save=["norm"])),
        lambda model, folder: model.load_adapter(folder, "second"),
        "second",
    ),
    "hotswap": Door(
        lambda intact: PeftModel.from_pretrained(base(), intact),
        lambda model, folder: hotswap_adapter(model, str(folder), "default"),
        "default",
    ),
    "again": Door(
        lambda intact: PeftModel.from_pretrained(base(), intact),
        lambda model, folder: model.load_adapter(folder, "default"),
        "default",
    ),
}


def write_intact(folder: Path) -> None:
    """An adapter and a selection that everything starts from."""
    model = adapted(base(), filled=False, **TARGETS)
    fill(model)
    model.save_pretrained(folder)
    Selection.of(model).save(folder / SELECTION)


@dataclass
class Judge:
    """Keeps models that stand ready; a model that has refused must serve the next file."""

    intact: Path
    ready: dict[str, tuple[nn.Module, dict[str, bytes]]] = field(default_factory=dict)

    def adapter(self, folder: Path, door_name: str) -> str:
        """Load an adapter folder; returns the outcome."""
        door = DOORS[door_name]
        if door_name not in self.ready:
            model = door.prepare(self.intact).eval()
            self.ready[door_name] = model, state(model)
        model, before = self.ready[door_name]
        with limits(folder):
            try:
                loaded = door.load(model, folder)
            except Exception as error:
                outcome = refusal(error)
                compare(before, state(model), "a refused file has changed")
                return outcome
            del self.ready[door_name]
            check_loaded(loaded if isinstance(loaded, nn.Module) else model, door.name, before)
        return "loaded"

    def selection(self, path: Path) -> str:
        """Load a selection file."""
        with limits(path.parent):
            try:
                found = Selection.load(path)
            except Exception as error:
                return refusal(error)
            check_selection(found)
        return "loaded"

    def selection_of_adapter(self, folder: Path) -> str:
        """Read the selection out of an adapter folder."""
        with limits(folder):
            try:
                found = Selection.from_adapter(folder)
            except Exception as error:
                return refusal(error)
            check_selection(found)
        return "loaded"


# --- what must hold -------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, bytes]:
    """Every tensor, what is trainable, the kinds of all modules, adapters, and a result; as bytes by name."""
    found = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    found |= {f"trainable {name}": bytes(parameter.requires_grad) for name, parameter in model.named_parameters()}
    found |= {f"module {name}": type(module).__name__.encode() for name, module in model.named_modules()}
    adapters = sorted(getattr(model, "peft_config", {}))
    return found | {"adapters": repr(adapters).encode(), "output": bits(output(model))}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUTS)


def compare(before: dict[str, bytes], after: dict[str, bytes], what: str) -> None:
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed:
        raise Violation(f"{what} {changed}")


def check_loaded(model: nn.Module, name: str, before: dict[str, bytes]) -> None:
    """The adapter is valid by a naive reading, the model computes with it, and the base is as it was."""
    if name not in model.peft_config:
        raise Violation(f"no adapter {name!r} after loading")
    if model.peft_config[name].peft_type != "FPS":
        return  # the file now names another method of PEFT, which is not ours to judge
    model.set_adapter(name)
    for path, layer in layers_of(model).items():
        for parameter in layer.adapter_parameters(name):
            if not bool(torch.isfinite(parameter).all()):
                raise Violation(f"{path}: values that are not finite")
        if not isinstance(layer, EntryLayer) or name not in layer.fps_values:
            continue
        inputs, values = layer.shape.inputs, layer.fps_values[name]
        counts = layer.fps_row_counts[name]
        if counts.numel() != layer.shape.neurons or int(counts.sum()) != values.numel() or int(counts.min()) < 0:
            raise Violation(f"{path}: {counts.tolist()} entries per neuron for {values.numel()} values")
        for columns in selected_columns(layer, name):
            if columns != sorted(set(columns)) or any(not 0 <= column < inputs for column in columns):
                raise Violation(f"{path}: columns {columns} of {inputs}")
    output(model)
    origin = dict(base().named_parameters())
    wrapped = {path: bits(p) for path, p in model.get_base_model().named_parameters()}
    for path, weight in origin.items():
        module, _, own = path.rpartition(".")
        places = (path, f"{module}.base_layer.{own}", f"{module}.original_module.{own}")
        if not any(wrapped.get(place) == bits(weight) for place in places):
            raise Violation(f"base weight {path} has changed")


def check_selection(found: Selection) -> None:
    """Every module's columns increase within a neuron and lie in range."""
    for path, module in found.modules.items():
        columns, start = module.columns.tolist(), 0
        for count in module.row_counts.tolist():
            row = columns[start : start + count]
            start += count
            if row != sorted(set(row)) or any(not 0 <= column < module.inputs for column in row):
                raise Violation(f"{path}: columns {row} of {module.inputs}")
        if start != len(columns):
            raise Violation(f"{path}: {len(columns)} columns for {start} entries")
    if Selection(found.modules, deepcopy(found.method)) != found:
        raise Violation("a selection is not equal to its copy")


def refusal(error: Exception) -> str:
    """The outcome of a clean refusal."""
    if isinstance(error, Violation):
        raise error
    kind = type(error).__name__
    origin = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
    by = {
        "peft_fps": "/peft_fps/" in origin and isinstance(error, (ValueError, TypeError)),
        "safetensors": isinstance(error, SafetensorError),
        "json": origin.endswith(("json/decoder.py", "json/__init__.py", "codecs.py", "<frozen codecs>"))
        and isinstance(error, (ValueError, RecursionError)),
        "PEFT": "/peft/" in origin and isinstance(error, (ValueError, TypeError, KeyError, AttributeError)),
    }  # fmt: skip
    for who, clean in by.items():
        if clean:
            return f"refused by {who}: {kind}"
    raise Violation(f"{kind} from {origin}: {error}") from error


@contextmanager
def limits(folder: Path) -> Iterator[None]:
    """Bound the time, and the memory by the size of the files."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's about fields it does not know, and the like
            yield
    except TooSlow:
        raise Violation(f"took longer than {SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if growth > SPARE_MEMORY + 50 * size:
        raise Violation(f"took {growth >> 20} MiB for files of {size:,} bytes")


# --- one file -------------------------------------------------------------------------------------------------------


def without_digest(folder: Path) -> None:
    """As someone forges a file who knows that the digest would give it away."""
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(with_fields(content, tensors_sha256=None)))


@contextmanager
def copy_of(intact: Path) -> Iterator[Path]:
    """A folder with the intact files, to be damaged."""
    with tempfile.TemporaryDirectory() as name:
        for path in intact.iterdir():
            (Path(name) / path.name).write_bytes(path.read_bytes())
        yield Path(name)
