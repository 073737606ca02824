"""The notebook on publishing, executed against a Hub on loopback by a user who is logged in."""

import json
from pathlib import Path

from tests.helpers import ROOT
from tests.hub.processes import run
from tests.hub.server import Hub


def test_the_notebook_on_publishing_runs(tmp_path: Path) -> None:
    hub, output = Hub({"hf_alice": "alice"}), tmp_path / "executed.ipynb"
    notebook = ROOT / "notebooks" / "publishing_and_merging.ipynb"
    try:
        run(hub, tmp_path / "home", "notebook", str(notebook), str(tmp_path), str(output), HF_TOKEN="hf_alice")
    finally:
        hub.stop()
    cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
    printed = "".join(
        "".join(result.get("text", ())) + "".join(result.get("data", {}).get("text/plain", ()))
        for cell in cells
        for result in cell.get("outputs", ())
    )
    assert "same logits: True" in printed
    assert float(printed.split("largest difference of a logit: ")[1].split()[0]) < 1e-4
    assert "import peft_fps" in printed  # in the card
    assert "'score'" in printed
    assert hub.state.repositories == {}
