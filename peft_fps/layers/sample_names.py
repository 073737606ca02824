"""The adapter names of the samples in a batch, as the layers of a model get them.

The names belong to a call of the model: they hold in its thread (or task) alone, and nothing is written to the model.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peft_fps.layers.layer_merge import MergingLayer


Function = TypeVar("Function", bound=Callable[..., Any])
Names = Token[Mapping[int, list[str]] | None]
"""The names before a call, to be put back behind it."""

BASE = "__base__"
"""PEFT's name for no adapter at all."""


def eager(function: Function) -> Function:
    """Keep torch.compile from tracing a function."""
    untraced: Function = torch.compiler.disable(function)
    return untraced


class NamedCalls:
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


named_calls = NamedCalls()
_names: ContextVar[Mapping[int, list[str]] | None] = ContextVar("adapter_names", default=None)
"""Names by the ids of the modules that get the samples."""


@eager
def begin(names: Mapping[int, list[str]]) -> Names:
    """Let a call with names begin.

    Args:
        names: one per sample, by the id of the module that gets the samples.

    Returns:
        What `end` needs.
    """
    named_calls.add(1)
    return _names.set({**(_names.get() or {}), **names})  # a model may call another one


@eager
def end(before: Names) -> None:
    """Let the call end that `begin` began."""
    _names.reset(before)
    named_calls.add(-1)


def names_for(module: nn.Module) -> list[str] | None:
    """Return the name of each sample that the module gets in the present call; None if the call came without names."""
    if torch.compiler.is_compiling():
        # read at run time: names must not become part of a graph
        return _look_up(module) if named_calls.running else None
    known = _names.get()
    return None if known is None else known.get(id(module))


@eager
def _look_up(module: nn.Module) -> list[str] | None:
    """Return the names of the present call for a module. `torch.compile` does not trace it."""
    return (_names.get() or {}).get(id(module))


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


def check_unmerged(layer: MergingLayer) -> None:
    """Raise ValueError if adapters are merged, since then there is no base weight to compute with."""
    if layer.merged:
        raise ValueError(
            f"{layer.module_path}: found merged adapters {layer.merged_adapters}, expected none with adapter_names. "
            "Call model.unmerge_adapter() first."
        )


def check_samples(layer: MergingLayer, x: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError unless an unmerged layer gets one sample per name.

    Args:
        layer: about to compute.
        x: its input, `(samples, ...)`.
        names: of the call.
    """
    check_unmerged(layer)
    if len(x) != len(names):
        raise ValueError(
            f"{layer.module_path}: adapter_names has {len(names)} names, expected one for each of the {len(x)} "
            "samples that this layer gets. Pass one name per sample; with beam search also num_beams, in the call of "
            "generate."
        )
