"""Processes that calibrate together end together: all with a selection, or all with the error of one process.

If one process alone raised an error, the others would wait for it in a collective operation. So the processes
exchange errors before each collective operation, and raise all or none. They exchange what they are about to do too,
where data could lead them to different operations.
"""

import pickle
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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


def agree(device: torch.device, error: Exception | None = None, step: int = 0) -> None:
    """Wait for all processes, and raise an error in all of them if one has failed.

    All processes call this function the same number of times.

    Args:
        device: device of collective operations.
        error: error of this process. Default: this process has not failed.
        step: number of the collective operation that this process is about to take part in. Default: 0, for the one
            that all take part in next.

    Raises:
        FailedTogetherError: a process has failed, or the processes are about to take different steps. The message is
            the same in all processes. It has the rank of the failed process and its error.
    """
    if not is_distributed():
        return
    world = dist.get_world_size()
    largest = torch.tensor([0 if error is None else world - dist.get_rank(), step, -step], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    worst, last, first = largest.tolist()
    if not worst and last == -first:
        return
    if not worst:
        raise FailedTogetherError(
            "The processes run different modules of the sharded model at a time, expected the same ones in the same "
            "order, since each module's parameters are gathered from all processes. A model that chooses modules by "
            "its input does that. Calibrate before the model is sharded. Nothing was changed."
        )
    rank = world - worst
    text = f"{type(error).__name__}: {error}".encode()[:TEXT_BYTES] if rank == dist.get_rank() else b""
    sent = torch.tensor([*text.ljust(TEXT_BYTES)], dtype=torch.uint8, device=device)
    dist.broadcast(sent, rank)
    message = bytes(sent.tolist()).decode(errors="ignore").rstrip()
    raise FailedTogetherError(
        f"Calibration has failed in process {rank} of {world}, and in all others with it: {message}"
    ) from error


def shared_object(value: Any, has_value: bool, device: torch.device) -> tuple[Any, int | None]:
    """Give the object of one process to those that have none. All processes call this function together.

    Args:
        value: object of this process, which can be pickled.
        has_value: whether this process has one.
        device: device of collective operations.

    Returns:
        This process's object, or else that of the first process that has one; and the rank of that process, None if no
        process has one.

    Raises:
        FailedTogetherError: a process has failed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    agree(device)
    having = torch.zeros(world, dtype=torch.int32, device=device)
    having[rank] = int(has_value)
    dist.all_reduce(having)
    flags = having.tolist()
    if not any(flags):
        return None, None
    owner = flags.index(1)
    if all(flags):
        return value, owner
    try:
        sent = pickle.dumps(value) if rank == owner else b""
    except Exception as error:
        agree(device, error)
        raise  # never reached
    agree(device)
    boxed = [sent]
    dist.broadcast_object_list(boxed, src=owner, device=device)
    return value if has_value else pickle.loads(boxed[0]), owner


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
