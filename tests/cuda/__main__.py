"""python -m tests.cuda: what runs on a CUDA device, then a four-bit base; 1 if anything fails.

It takes some minutes. Without a device it says so, and ends with 0.
"""

import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ON_EVERY_DEVICE


LONGEST = 180
"""Seconds for the tests that run on every device, and as many for the four-bit base."""
PYTEST = (sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--numprocesses=4")
KERNEL, FOUR_BIT = "tests/sparse/kernels/test_cuda.py", "tests/cuda"


def run(title: str, *paths: str) -> bool:
    """Run the tests of a device; whether all pass in time."""
    sys.stdout.write(f"{title}\n")
    sys.stdout.flush()
    try:
        return subprocess.run([*PYTEST, *paths], timeout=LONGEST, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"not done after {LONGEST} s\n")
        return False


def main() -> int:
    if not torch.cuda.is_available():
        sys.stdout.write("nothing is run: PyTorch finds no CUDA device here\n")
        return 0
    folders = [start if Path(start).exists() else str(Path(start).parent) for start in ON_EVERY_DEVICE]
    passed = [run("layers and their maths", KERNEL, *folders), run("a four-bit base", FOUR_BIT)]
    sys.stdout.write("the table of costs, in eight minutes: peft-fps benchmark cost --device cuda\n")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
