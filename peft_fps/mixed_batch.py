"""One batch, several adapters: every sample is computed under the adapter that its name says.

Samples of one adapter go through a layer together, so a layer computes as many products as there are adapters in the
batch, each on its part, and every one as it would without the others.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from peft_fps.adapters import FPSLayer


Function = TypeVar("Function", bound=Callable[..., Any])

BASE = "__base__"
"""PEFT's name for no adapter at all."""

WHOLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules trained whole (`modules_to_save`) that PEFT runs sample by sample."""


def by_adapter(apply: Callable[[str, Tensor], Tensor], x: Tensor, names: Sequence[str]) -> Tensor:
    """Run groups of samples, and put their outputs back in order.

    Args:
        apply: from a name and the samples of that name to their outputs.
        x: `(samples, ...)`.
        names: one per sample.

    Returns:
        `(samples, ...)`.
    """
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(name, []).append(place)
    if len(groups) == 1:
        return apply(names[0], x)
    places = [torch.tensor(group, device=x.device) for group in groups.values()]
    parts = [apply(name, x.index_select(0, group)) for name, group in zip(groups, places, strict=True)]
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def check_unmerged(layer: FPSLayer) -> None:
    """Raise ValueError if adapters are merged, since then there is no base weight to compute with."""
    if layer.merged:
        raise ValueError(
            f"{layer.module_path}: found merged adapters {layer.merged_adapters}, expected none with adapter_names. "
            "Call model.unmerge_adapter() first."
        )


def check_samples(layer: FPSLayer, x: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError unless an unmerged layer gets one sample per name."""
    check_unmerged(layer)
    if len(x) != len(names):
        raise ValueError(
            f"{layer.module_path}: adapter_names has {len(names)} names, expected one for each of the {len(x)} "
            "samples that this layer gets. Pass one name per sample; with beam search also num_beams, in the call of "
            "generate."
        )


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Let all layers of a model compute each sample under the adapter of its name, within the context.

    The names belong to the call: they hold in this thread (or task) alone, and nothing is written to the model.

    Args:
        model: with FPS adapters.
        adapter_names: one name per sample; `"__base__"` means the base model.
        options: of the forward or generate call. Generation repeats every sample `num_beams` times, or
            `num_return_sequences` times.

    Raises:
        TypeError, ValueError: the names are no list of known adapters, or the model is training or merged.
    """
    token = _begin(model, adapter_names, options)
    try:
        yield
    finally:
        _end(token)


def names_for(module: nn.Module) -> list[str] | None:
    """Return the name of each sample that the module gets in the present call; None if the call came without names."""
    if torch.compiler.is_compiling():
        return _look_up(module) if _calls.running else None  # read at run time: names must not become part of a graph
    known = _names.get()
    return None if known is None else known.get(id(module))


def pass_names(model: nn.Module) -> None:
    """Let PEFT's wrappers of modules that are trained whole get the names that a call comes with."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and _hand_over not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _eager(function: Function) -> Function:
    """Keep torch.compile from tracing a function."""
    eager: Function = torch.compiler.disable(function)
    return eager


class _Calls:
    """How many calls with names there are in all threads.

    Attributes:
        running: whether there is one; compiled graphs are valid for one or the other.
    """

    def __init__(self) -> None:
        self.running = False
        self._count = 0
        self._lock = threading.Lock()

    def add(self, change: int) -> None:
        """Count a call that begins (1) or ends (-1)."""
        with self._lock:
            self._count += change
            self.running = self._count > 0


_calls = _Calls()
_names: ContextVar[Mapping[int, list[str]] | None] = ContextVar("adapter_names", default=None)
"""Names by the ids of the modules that get the samples."""


@_eager
def _begin(model: nn.Module, adapter_names: Any, options: Mapping[str, Any]) -> Token[Mapping[int, list[str]] | None]:
    _check(model, adapter_names)
    pass_names(model)
    copies = _copies(options)
    repeated = [name for name in adapter_names for _ in range(copies)]
    unrepeated = _encoder_modules(model) if copies > 1 else set()
    own = {
        id(module): list(adapter_names) if id(module) in unrepeated else repeated
        for module in model.modules()
        if isinstance(module, (FPSLayer, AuxiliaryTrainingWrapper))
    }
    _calls.add(1)
    return _names.set({**(_names.get() or {}), **own})  # a model may call another one


@_eager
def _end(token: Token[Mapping[int, list[str]] | None]) -> None:
    _names.reset(token)
    _calls.add(-1)


@_eager
def _look_up(module: nn.Module) -> list[str] | None:
    return (_names.get() or {}).get(id(module))


def _hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    names = names_for(module)
    if names is None or "adapter_names" in kwargs:
        return None
    if isinstance(module, ModulesToSaveWrapper):  # fails on adapters that do not train this module
        names = [name if name in module.modules_to_save else BASE for name in names]
    return args, kwargs | {"adapter_names": names}


def _check(model: nn.Module, adapter_names: Any) -> None:
    strings = isinstance(adapter_names, (list, tuple)) and all(isinstance(name, str) for name in adapter_names)
    if not strings or not adapter_names:
        raise TypeError(f"adapter_names is {_short(adapter_names)}, expected a list with one name per sample.")
    if model.training:
        raise ValueError(
            f"adapter_names={_short(adapter_names)} was passed to a model in training mode, expected inference. Call "
            "model.eval(), or choose one adapter for the whole batch with model.set_adapter(name)."
        )
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    known = {name for layer in layers for name in layer.fps_values}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(
            f"adapter_names holds {_short(unknown)}, expected names among {sorted(known)} and {BASE!r} for the base "
            "model. Load the adapter first."
        )
    for layer in layers:
        check_unmerged(layer)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, WHOLE):
            raise ValueError(
                f"{name.removeprefix('model.')} is trained whole (modules_to_save) and a "
                f"{type(module.original_module).__name__}, expected one of "
                f"{', '.join(kind.__name__ for kind in WHOLE)}, which PEFT runs sample by sample. Run the "
                "samples of each adapter as a batch of their own."
            )


def _copies(options: Mapping[str, Any]) -> int:
    """How often generation repeats every sample."""
    found = [1]
    for name in ("num_beams", "num_return_sequences"):
        value = options.get(name)
        value = getattr(options.get("generation_config"), name, None) if value is None else value
        found.append(value if isinstance(value, int) else 1)
    return max(found)


def _encoder_modules(model: nn.Module) -> set[int]:
    """The modules of an encoder, which runs before generation repeats the samples, by their ids."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    found: Any = model
    return {id(module) for module in found.get_encoder().modules()}


def _short(names: Any) -> str:
    text = repr(names)
    return text if len(text) < 80 else f"{text[:77]}..."
