"""The library's tests, under whatever versions are installed: `python -m tests.minimum_versions`.

Without those of the command and the benchmarks, and those that read the repository, such as the linter's.
"""

import sys

import pytest


FOLDERS = ("sparse", "selection", "calibration", "gradients", "checkpoint", "training")
MODULES = (
    "composition",
    "config",
    "evidence",
    "hotswap",
    "language_models",
    "layers",
    "lifecycle",
    "loading",
    "merging",
    "mixed_batch",
    "norms",
    "registration",
    "selecting",
    "selections",
)

if __name__ == "__main__":
    sys.exit(pytest.main([*(f"tests/{name}" for name in FOLDERS), *(f"tests/test_{name}.py" for name in MODULES)]))
