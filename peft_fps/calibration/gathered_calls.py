"""A sharded model runs in all processes together, with the parameters of one module gathered at a time.

FSDP2's own hooks are put aside meanwhile. They begin at the outermost sharded module, which is not what calibration
runs, and they wait for ever for a process that has failed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from peft_fps.base.sharded import gathered, has_shards, is_of_fsdp, is_sharded
from peft_fps.calibration.together import agree
from peft_fps.layers.fps_layer import FPSLayer


Score = Callable[[int, int], Tensor]
"""Scores of some neurons of a layer."""


class _Unit:
    """Modules whose parameters are gathered together.

    Args:
        modules: hold the parameters.
        device: device of collective operations.
        step: number of this unit, the same in all processes.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, step: int) -> None:
        self._modules = modules
        self._device = device
        self._step = step
        self._open: list[ExitStack] = []

    def open(self, *_: Any) -> None:
        """Gather the parameters once all processes are about to. Also a hook before a module's forward."""
        agree(self._device, step=self._step)
        stack = ExitStack()
        stack.enter_context(gathered(self._modules))
        self._open.append(stack)

    def close(self, *_: Any) -> None:
        """Put the shards back. Also a hook after a module's forward, which runs after an error in `open` too."""
        if self._open:
            self._open.pop().close()


@contextmanager
def gathered_in_calls(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gather the parameters of each module of a sharded model while it is called; all processes run it together.

    What `fully_shard` was called on below the model is gathered as one, as in training. Of the rest, which training
    gathers for as long as the model runs, each module is gathered on its own; attention with its output projection.

    Args:
        model: adapters are switched off; their parameters are not gathered. A model that is not sharded runs as it is.
        device: device of collective operations.
    """
    if not has_shards(model):
        yield
        return
    units = {
        module: _Unit(owners, device, step) for step, (module, owners) in enumerate(_owners_by_call(model).items(), 1)
    }
    with ExitStack() as stack:
        stack.enter_context(_fsdp_hooks_aside(model))
        for module, unit in units.items():
            stack.callback(unit.close)
            if module is model:  # PEFT runs the forward of the base model without its hooks
                unit.open()
                continue
            stack.callback(module.register_forward_pre_hook(unit.open, prepend=True).remove)
            stack.callback(module.register_forward_hook(unit.close, always_call=True).remove)
        yield


@contextmanager
def gathered_in_turn(layers: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Mapping[str, Score]]:
    """Gather the weight of each sharded layer while it is scored, that of one layer at a time.

    Args:
        layers: by module path.
        scores: of these layers, by module path.

    Yields:
        Scores that do so. All processes call them in the same order.
    """
    bases = {path: layers[path].base_layer for path in scores if has_shards(layers[path].base_layer)}
    if not bases:
        yield scores
        return
    device = next(iter(bases.values())).weight.device_mesh.device_type
    units = {path: _Unit([base], torch.device(device), step) for step, (path, base) in enumerate(bases.items(), 1)}
    turn: list[_Unit] = []

    def in_turn(path: str, first: int, last: int) -> Tensor:
        if path in units and units[path] not in turn:
            while turn:
                turn.pop().close()
            units[path].open()
            turn.append(units[path])
        return scores[path](first, last)

    try:
        yield {path: partial(in_turn, path) for path in scores}
    finally:
        while turn:
            turn.pop().close()


def _owners_by_call(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Return the modules that hold sharded parameters, by the module whose call needs them."""
    found: dict[nn.Module, list[nn.Module]] = {}

    def visit(module: nn.Module, caller: nn.Module, within: bool) -> None:
        if isinstance(module, FSDPModule) and module is not model:
            caller, within = module, True
        elif not within and not isinstance(module, (nn.ParameterList, nn.ParameterDict)):  # which are never called
            caller = module
            within = isinstance(module, nn.MultiheadAttention)  # reads its output projection, and does not call it
        if any(parameter is not None and is_sharded(parameter) for parameter in module._parameters.values()):
            found.setdefault(caller, []).append(module)
        adapters = module.adapter_layer_names if isinstance(module, FPSLayer) else ()
        for name, child in module.named_children():
            if name not in adapters:
                visit(child, caller, within)

    visit(model, model, within=False)
    return found


@contextmanager
def _fsdp_hooks_aside(model: nn.Module) -> Iterator[None]:
    """Take the hooks of FSDP2 out of a model within the block."""
    tables = [table for module in model.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    aside: list[tuple[Any, dict[int, Any]]] = []
    for table in tables:
        if any(is_of_fsdp(hook) for hook in table.values()):
            aside.append((table, dict(table)))
    try:
        for table, before in aside:
            for key, hook in before.items():
                if is_of_fsdp(hook):
                    del table[key]
        yield
    finally:
        for table, before in aside:
            kept = {key: hook for key, hook in before.items() if key in table or is_of_fsdp(hook)} | dict(table)
            table.clear()
            table.update(kept)
