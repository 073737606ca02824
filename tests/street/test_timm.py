"""Architectures of timm."""

from pathlib import Path

import pytest

from tests.street.lifecycle import run
from tests.street.timm_models import MODELS


pytest.importorskip("timm", reason="timm is not installed; pip install timm", exc_type=ImportError)


@pytest.mark.parametrize("name", MODELS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    run(MODELS[name], tmp_path)
