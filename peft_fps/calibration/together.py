"""Processes that calibrate together end together: all with a selection, or all with the error of one process.

If one process alone raised an error, the others would wait for it in a collective operation. So the processes
exchange errors before each collective operation, and raise all or none.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

TEXT_BYTES = 2000
"""Bytes of an error message that the other processes get."""


class FailedTogetherError(ValueError):
    """A process of a distributed run has failed. All processes raise this error."""


def is_distributed() -> bool:
    """Whether the run has several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(device: torch.device, error: Exception | None = None) -> None:
    """Wait for all processes, and raise an error in all of them if one has failed.

    All processes call this function the same number of times.

    Args:
        device: device of collective operations.
        error: error of this process. Default: this process has not failed.

    Raises:
        FailedTogetherError: a process has failed. The message is the same in all processes, with the rank of the
            failed process and its error.
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
    message = bytes(sent.tolist()).decode(errors="ignore").rstrip()
    raise FailedTogetherError(
        f"Calibration has failed in process {rank} of {world}, and in all others with it: {message}"
    ) from error


def failing_together(
    collective: Callable[..., torch.device | None],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function so that it raises an error in all processes if it raises one in a process.

    Args:
        collective: takes the arguments of the function. Returns the device of its collective operations. None means
            that the call has none, so that one process may make it alone.
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
