"""Python processes that form a group and train together."""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.support.forked import TIMEOUT, start


def variables_of_a_group(count: int) -> dict[str, str]:
    """What torch reads from the environment of every process of a group, its rank aside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_together(target: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call a function of a module in `count` processes, each of which finds its rank in its environment.

    Raises:
        AssertionError: a process has failed; the message has the tracebacks of all that have.
    """
    exits, errors = _group(target, arguments, count)
    if -signal.SIGSEGV in exits:  # in rare runs gloo's own thread (pt_gloo_runloop) crashes; a second time is a fault
        exits, errors = _group(target, arguments, count)
    assert exits == [0] * count, errors


def _group(target: Callable[..., None], arguments: tuple[Any, ...], count: int) -> tuple[list[int | None], list[str]]:
    variables = variables_of_a_group(count)
    with TemporaryDirectory() as folder:
        processes = [
            start(_take_part, Path(folder), target, arguments, folder=None, **variables, **ranks)
            for ranks in ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        ]
        for process in processes:
            process.join(TIMEOUT)
        running = [process for process in processes if process.is_alive()]
        for process in running:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).iterdir())]
    assert not running, f"still running after {TIMEOUT} s; {errors}"
    return [process.exitcode for process in processes], errors


def _take_part(folder: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except BaseException:
        Path(folder, f"{os.environ['RANK']}.txt").write_text(traceback.format_exc())
        raise
