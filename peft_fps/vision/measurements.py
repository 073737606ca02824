"""Time, memory, sizes on disk and versions of one run."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


class Stopwatch:
    """Announces stages and measures them.

    Attributes:
        seconds: wall time of each stage that has ended.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        self.console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the largest memory use so far, and of what: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the GPU"}
    if sys.platform == "win32":
        import psutil

        return {"bytes": psutil.Process().memory_info().peak_wset, "of": "the whole process (working set)"}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return {
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "of": "the whole process (resident)",
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("peft", "transformers", "torch", "accelerate", "datasets", "scikit-learn", "numpy")
    from peft_fps import __version__

    return {"python": platform.python_version(), "peft-fps": __version__} | {name: version(name) for name in packages}
