"""Models of transformers, none of which the package was written with."""

from pathlib import Path

import pytest

from tests.street.lifecycle import run
from tests.street.transformers_models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    run(MODELS[name], tmp_path)
