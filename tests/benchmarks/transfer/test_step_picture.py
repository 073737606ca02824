"""The picture of token selection, and the file that its times come from."""

import json

import matplotlib.figure
import pytest

from peft_fps.benchmarks.transfer.step_picture import MEASURED, draw_steps, read_steps
from peft_fps.benchmarks.transfer.transfer_tables import Results
from tests.benchmarks.transfer.records import SETTING, chosen, record


def written(path, step):
    path.write_text(json.dumps({"rows": {"tokens": {"raw": {"step": step}}}}), encoding="utf-8")
    return path


def test_times_are_the_medians_of_the_cost_table(tmp_path):
    step = {name: {"median": seconds} for seconds, name in enumerate(MEASURED.values(), 1)}
    found = read_steps(written(tmp_path / "cost.json", step | {"floor": {"median": 9}}))
    assert found["lora"] == 1
    assert found["fps-biases"] == 2
    assert found["keep-0.5-fixed-biases"] == 5
    with pytest.raises(ValueError, match="--steps is .*expected the cost.json.*KeyError: 'keep-0.5'"):
        read_steps(written(tmp_path / "cost.json", {name: step[name] for name in list(step)[:-1]}))
    with pytest.raises(ValueError, match="--steps is .*FileNotFoundError"):
        read_steps(tmp_path / "none.json")


def test_points_stand_where_they_were_measured(tmp_path, monkeypatch):
    canvases = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda canvas, path: (canvases.append(canvas), save(canvas, path))
    )
    records = [*chosen("lora", test=0.4), *chosen("fps", test=0.6)]
    for method, test in (("fps-biases", 0.7), ("keep-0.7-fixed-biases", 0.6), ("keep-0.5-biases", 0.5)):
        records.append(record(method, test=test, operations=0.0 if method == "fps-biases" else -0.3))
    seconds = {"lora": 2.0, "fps-biases": 2.0, "keep-0.7-fixed-biases": 1.5}
    draw_steps(Results(records, SETTING), seconds, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    (canvas,) = canvases
    left, right = [
        {bars.get_label(): tuple(map(float, bars.lines[0].get_xydata()[0])) for bars in axes.containers}
        for axes in canvas.axes
    ]
    assert left == {
        "LoRA": (1.0, pytest.approx(40)),
        "FPS, with biases": (1.0, pytest.approx(70)),
        "FPS, with biases, keep rate 0.7, fixed blocks": (0.75, pytest.approx(60)),
    }
    assert right == {
        "LoRA": (1.0, pytest.approx(40)),
        "FPS, with biases": (1.0, pytest.approx(70)),
        "FPS, with biases, keep rate 0.7, fixed blocks": (pytest.approx(0.7), pytest.approx(60)),
        "FPS, with biases, keep rate 0.5": (pytest.approx(0.7), pytest.approx(50)),
    }
