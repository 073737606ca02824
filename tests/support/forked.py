"""Processes that are forked from one that has imported the libraries, so that none costs an import of its own.

Where the system cannot fork, they are spawned, and import what they need.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


FORKS = "forkserver" in multiprocessing.get_all_start_methods()
TIMEOUT = 300
"""Seconds."""


def forking() -> Any:
    """How such processes are started; they share one server for the whole of a pytest process."""
    context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    if FORKS:
        context.set_forkserver_preload(["tests.support.preloaded"])
        multiprocessing.forkserver.ensure_running()  # before the package starts it with fewer imports
    return context


def start(target: Callable[..., None], *arguments: Any, folder: Path | None = None, **environment: str) -> Any:
    """Start a process that calls a function of a module, in a folder, with this process's environment and more."""
    variables = {**os.environ, **environment}
    process = forking().Process(target=_settled, args=(folder or Path.cwd(), variables, target, arguments))
    process.start()
    return process


def _settled(folder: Path, variables: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    target(*arguments)


def run_program(
    code: str, *arguments: str, folder: Path | None = None, timeout: float = TIMEOUT, **environment: str
) -> tuple[str, str]:
    """Run code as `python -c` does.

    Returns:
        What it wrote to its standard output, and to that for errors.

    Raises:
        AssertionError: it has failed; the message has what it wrote.
    """
    with TemporaryDirectory() as written:
        process = start(_as_main, Path(written), code, arguments, folder=folder, **environment)
        process.join(timeout)
        process.kill()
        process.join()
        output, errors = (Path(written, name).read_text() for name in ("output", "errors"))
    assert process.exitcode == 0, errors
    return output, errors


def _as_main(written: Path, code: str, arguments: tuple[str, ...]) -> None:
    for number, name in ((1, "output"), (2, "errors")):
        with (written / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
