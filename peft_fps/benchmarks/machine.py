"""The machine that a benchmark ran on."""

import platform
from pathlib import Path

import torch

from peft_fps.vision.measurements import versions


def describe(device: str) -> dict[str, str]:
    """Return the processor, the system and the versions that a result depends on, and of `"cuda"` the GPU."""
    facts = {"processor": processor(), "system": platform.platform()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | versions()


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
