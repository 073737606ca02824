"""A few kills of `python -m tests.kill`; at length it is run by hand."""

from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.kill.scenes import SCENES, Wrong, adapters
from tests.support.forked import run_program


pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="processes are forked")


def test_kills_lose_and_mix_up_nothing() -> None:
    program = "import runpy; runpy.run_module('tests.kill', run_name='__main__')"
    printed, _ = run_program(program, "--kills=6", "--seed=1")
    for scene in SCENES:
        assert f"{scene}: 1 " in printed or f"{scene}: 2 " in printed
    assert "ended with the expected bits" in printed


@pytest.mark.parametrize("wrong", ["nothing", "mixture"])
def test_the_driver_notices_what_is_wrong(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process: as if a kill had left the folder like this."""

    def leave(work: partial[Any], delay: float) -> list[int]:
        folder = work.args[1]
        if wrong == "nothing":
            (folder / "adapter_model.safetensors").write_bytes(b"")
        else:
            config = folder / "adapter_config.json"
            config.write_text(config.read_text().replace('"seed": 0', '"seed": 1', 2))
        return [0]

    monkeypatch.setattr("tests.kill.scenes.kill", leave)
    with pytest.raises(Wrong, match="lost" if wrong == "nothing" else "a mixture loads"):
        adapters(tmp_path, 1, Random(0), safe=True)
