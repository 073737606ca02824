"""The modules that a model calls while it runs on data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_fps.calibration.passes import device_of
from peft_fps.calibration.together import is_distributed


@contextmanager
def calls_noted(modules: Mapping[str, Any]) -> Iterator[set[str]]:
    """Collect the names of the modules that are called within the block with an input that is not empty.

    Args:
        modules: modules to watch, by any name.

    Yields:
        The set of names, which grows while the block runs.
    """
    called: set[str] = set()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.numel():
                called.add(name)

        return hook

    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def called_anywhere(called: set[str], names: list[str], model: nn.Module) -> set[str]:
    """Return the names of the modules that any process of a distributed run has called.

    Args:
        called: names of the modules that this process has called.
        names: names of all watched modules, in the same order in every process.
        model: its device is the device of collective operations.
    """
    if not is_distributed():
        return called
    flags = torch.tensor([name in called for name in names], dtype=torch.int32, device=device_of(model))
    dist.all_reduce(flags)
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}
