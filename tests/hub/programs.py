"""The programs of a client of a Hub, each of which runs in a fork of this process, which saves its imports."""

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_fps.sparse.kernels import cpu
from tests.hub import author, notebook, reader


PROGRAMS: dict[str, Callable[..., None]] = {"author": author.main, "reader": reader.main, "notebook": notebook.main}

# once for all forks
cpu.library()
author.base()
gc.collect()
gc.freeze()  # a Trainer collects at the end of every training


def answer(name: str, arguments: list[Any], environment: dict[str, str]) -> tuple[int, str]:
    """Call the program in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed")
        child = os.fork()
        if child == 0:
            os._exit(_call(PROGRAMS[name], arguments, environment, printed))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), printed.read_text()


def _call(program: Callable[..., None], arguments: list[Any], environment: dict[str, str], printed: Path) -> int:
    os.environ.update(environment)
    with printed.open("w") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    try:
        program(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
