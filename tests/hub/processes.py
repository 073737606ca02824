"""Processes that speak to a Hub on loopback; the client reads its environment when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tests.hub.server import Hub


def run(hub: Hub, home: Path, program: str, *arguments: str, **environment: str) -> None:
    """Run a program in a process that knows no Hub but this one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    clean |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.hub.{program}", *arguments],
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout
