"""Which modules a model calls while data runs through it."""

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
    """Fill the set with the names of the modules that are called, within the block, with an input that is not empty.

    Args:
        modules: to be watched, by any name.
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
    """Return what any process of a distributed run has called.

    Args:
        called: in this process.
        names: all that were watched, in the same order everywhere.
        model: on whose device processes talk to each other.
    """
    if not is_distributed():
        return called
    flags = torch.tensor([name in called for name in names], dtype=torch.int32, device=device_of(model))
    dist.all_reduce(flags)
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}
