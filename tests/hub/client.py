"""Run as a process: import the client of a Hub once, and call a program in a fork for each line of the input.

A line holds, as JSON, the name of the program, its arguments, and variables of its environment. The answer is the
exit status and what was printed.
"""

import json
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


if __name__ == "__main__":
    cpu.library()  # the kernel is built once for all forks
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(*json.loads(line))) + "\n")
        sys.stdout.flush()
