"""Models of torchvision."""

from pathlib import Path

import pytest

from tests.street.lifecycle import run
from tests.street.torchvision_models import MODELS


pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)


@pytest.mark.parametrize("name", MODELS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    run(MODELS[name], tmp_path)
