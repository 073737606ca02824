"""Processes that speak to a Hub on loopback; the client reads its environment when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub.server import Hub
from tests.support.forked import TIMEOUT
from tests.support.helpers import ROOT


class Client:
    """A process that knows no Hub but this one, and runs programs in forks of itself, which saves their imports."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
        }
        clean |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.client"],
            env=clean,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments: object, offline: bool = False, **environment: str) -> str:
        """Run a program of `tests.hub.programs` to its end; returns what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([offline, program, arguments, environment]) + "\n")
        self._process.stdin.flush()
        status, printed = json.loads(self._process.stdout.readline())
        assert status == 0, printed
        return str(printed)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=TIMEOUT)  # it ends with its input
