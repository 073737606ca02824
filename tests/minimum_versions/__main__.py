"""The library's tests, under whatever versions are installed: `python -m tests.minimum_versions`.

Without those of the command and the benchmarks, and those that read the repository, such as the linter's.
"""

import sys

import pytest


FOLDERS = ("sparse", "selection", "layers", "calibration", "gradients", "checkpoint", "lifecycle", "training")
MODULES = ("config", "language_models", "lifecycle", "registration", "saved_selection")

if __name__ == "__main__":
    sys.exit(pytest.main([*(f"tests/{name}" for name in FOLDERS), *(f"tests/test_{name}.py" for name in MODULES)]))
