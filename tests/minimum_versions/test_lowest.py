"""The lowest versions that pyproject.toml allows pass the tests of the life cycle, too, each in its first case.

Only of those requirements that can be replaced alone: other packages are built for the torch and numpy that are
installed, and an older huggingface-hub has requirements of its own. All of them, on the lowest Python and with every
case, are run by a job of the workflow on GitHub.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent
STAY = {"torch", "numpy", "huggingface-hub"}
CORE = ["tests/test_registration.py", "tests/lifecycle/test_loading.py", "tests/layers/test_merge_record.py"]


def lowest_versions() -> dict[str, str]:
    """The lower bounds of the requirements, by name."""
    required = re.search(r"^dependencies = \[.*?\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    bounds = dict(re.findall(r'^    "([a-z-]+)>=([0-9.]+)"', required, re.MULTILINE))
    assert len(bounds) == len(required.splitlines())
    return bounds


@pytest.fixture(scope="module")
def lowest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the lowest version of every requirement that can be replaced alone, and these versions."""
    versions = {name: version for name, version in lowest_versions().items() if name not in STAY}
    folder = tmp_path_factory.mktemp("lowest")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    command = [*install, *(f"{name}=={version}" for name, version in versions.items())]
    # constraints of the tests' own versions are no matter of these
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"the lowest versions cannot be installed here: {run.stderr.strip()[-200:]}")
    return folder, versions


def test_core_tests_pass(lowest: tuple[Path, dict[str, str]]) -> None:
    folder, versions = lowest
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    program = f"from importlib.metadata import version; print(*map(version, {list(versions)}))"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert all(
        version == wanted or version.startswith(f"{wanted}.")
        for version, wanted in zip(found.stdout.split(), versions.values(), strict=True)
    ), found.stdout
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "tests.minimum_versions.first_cases"]
    command = [sys.executable, "-m", "pytest", *options, *CORE]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
