"""Processes that calibrate together end together: all with a selection, or all with the error of one of them.

A process that failed alone would leave the others waiting for it in a collective operation. So before each of these
the processes agree: whoever has failed says so there, and all raise.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

TEXT_BYTES = 2000
"""Bytes of a message that reach the other processes."""


class FailedTogetherError(ValueError):
    """One of the processes has failed, and all know."""


def is_distributed() -> bool:
    """Whether several processes bring data."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(device: torch.device, error: Exception | None = None) -> None:
    """Go on when all processes are here and none has failed; all must call this the same number of times.

    Args:
        device: that collective operations work on.
        error: what this process has failed with.

    Raises:
        FailedTogetherError: a process has failed; the same message in all of them, with its rank and what it says.
    """
    if not is_distributed():
        return
    world = dist.get_world_size()
    worst = torch.tensor(0 if error is None else world - dist.get_rank(), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if not int(worst):
        return
    rank = world - int(worst)
    text = f"{type(error).__name__}: {error}".encode()[:TEXT_BYTES] if rank == dist.get_rank() else b""
    sent = torch.tensor([*text.ljust(TEXT_BYTES)], dtype=torch.uint8, device=device)
    dist.broadcast(sent, rank)
    found = bytes(sent.tolist()).decode(errors="ignore").rstrip()
    raise FailedTogetherError(
        f"Calibration has failed in process {rank} of {world}, and in all others with it: {found}"
    ) from error


def failing_together(
    collective: Callable[..., torch.device | None],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a function raise in all processes if it raises in one.

    Args:
        collective: from the arguments to the device that collective operations work on; None for a call that has none,
            which one process may make alone.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def together(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            device = collective(*arguments, **options) if is_distributed() else None
            if device is None:
                return function(*arguments, **options)
            try:
                result = function(*arguments, **options)
            except FailedTogetherError:
                raise
            except Exception as error:
                agree(device, error)
                raise  # never reached
            agree(device)
            return result

        return together

    return decorate
