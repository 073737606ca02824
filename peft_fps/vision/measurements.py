"""Time, memory and versions of one run."""

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

from peft_fps import SelectionReport, __version__
from peft_fps.vision.output_folders import folder_bytes


class Stopwatch:
    """Prints the names of stages and measures how long they take.

    Attributes:
        seconds: wall time by stage, of those that have ended.
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


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the largest use of memory so far.

    Args:
        device: where the model is; of a CUDA device PyTorch's allocator is asked, else the operating system.

    Returns:
        `bytes`, and `of`, which says in words what was counted.
    """
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
    """Return the versions of Python and of the packages that a result depends on, by name."""
    packages = ("peft", "transformers", "torch", "accelerate", "datasets", "scikit-learn", "numpy")
    return {"python": platform.python_version(), "peft-fps": __version__} | {name: version(name) for name in packages}


def run_facts(
    report: SelectionReport, adapter: Path, device: torch.device, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return what a run has selected, how large its adapter is and what it took, as plain data.

    Args:
        report: of the selection.
        adapter: folder that it is saved in.
        device: where the model was trained.
        seconds: wall time by stage.
    """
    return {
        "trainable_parameters": report.trained + report.head_parameters,
        "selection": report.to_dict(),
        "adapter_bytes": folder_bytes(adapter),
        "peak_memory": peak_memory(device),
        "seconds": seconds,
        "device": str(device),
        "versions": versions(),
    }
