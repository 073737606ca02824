"""The lowest PEFT release that pyproject.toml allows passes the tests of the life cycle, too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
CORE = ["tests/test_registration.py", "tests/test_loading.py", "tests/test_merging.py"]


@pytest.fixture(scope="module")
def lowest_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    version = re.search(r'"peft>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    folder = tmp_path_factory.mktemp("lowest")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    run = subprocess.run([*install, f"peft=={version}"], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"peft {version} cannot be installed here: {run.stderr.strip()[-200:]}")
    return folder


def test_core_tests_pass(lowest_peft: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(lowest_peft), str(ROOT)])}
    wanted = subprocess.run(
        [sys.executable, "-c", "import peft; print(peft.__file__)"], env=environment, capture_output=True, text=True
    )
    assert str(lowest_peft) in wanted.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CORE]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
