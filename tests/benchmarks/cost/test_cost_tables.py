import json

import pytest

from peft_fps.benchmarks.cost.cost_picture import relative, spread
from peft_fps.benchmarks.cost.cost_tables import LEGEND, NO_EVIDENCE, Result, markdown, show, tables
from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import METHODS
from peft_fps.benchmarks.cost.suite import write
from peft_fps.benchmarks.cost.workload import Workload


def result(quick=False, rows=None):
    seconds = {name: {"median": 1.0 + number, "min": 0.5, "max": 9.0} for number, name in enumerate(METHODS)}
    held = {name: {"peak": 2**20 * (10 - i), "saved": 2**19, "rest": 2**22} for i, name in enumerate(METHODS)}
    ratios = (Figure("A ÷ B", 0.5, at_most=0.74), Figure("C ÷ B", 1.25, at_most=1.0))
    found = (
        Row("step", "a step", ratios, {"seconds": seconds}),
        Row("memory", "bytes", (Figure("D ÷ B", 12.0, at_least=9),), {"bytes": held}),
        Row("attach", "adding", (Figure("new", 0.25, "s"),), skipped={"other": "no reason"}),
    )
    kept = tuple(row for row in found if rows is None or row.name in rows)
    machine = {"processor": "Abacus", "torch": "1.0"}
    return Result(Workload(quick=quick), machine, "2026-01-02", 1_234_567, kept)


@pytest.mark.parametrize(
    ("figure", "met", "target"),
    [
        (Figure("", 0.74, at_most=0.74), True, "≤ 0.74 ×"),
        (Figure("", 0.741, at_most=0.74), False, "≤ 0.74 ×"),
        (Figure("", 9, at_least=9), True, "≥ 9 ×"),
        (Figure("", 8.9, at_least=9), False, "≥ 9 ×"),
        (Figure("", 3.0, "s"), None, ""),
    ],
)
def test_targets(figure, met, target):
    assert figure.met is met
    assert figure.target == target


def test_values_have_units():
    assert show(Figure("", 0.12345)) == "0.123 ×"
    assert show(Figure("", 123.4, "s")) == "123 s"


def test_tables_hold_every_figure_and_failures_are_not_hidden():
    methods, figures = tables(result())
    assert methods.header == (
        *("method", "step, s", "÷ full", "÷ LoRA"),
        *("peak, MiB", "÷ LoRA", "saved, MiB", "at rest, MiB"),
    )
    by_label = {line[0]: line[1:] for line in methods.lines}
    assert by_label["LoRA r=16"] == ("4.000", "4.00", "1.00", "7.0", "1.00", "0.5", "4.0")
    assert by_label["full fine-tuning"] == ("1.000", "1.00", "0.25", "10.0", "1.43", "0.5", "4.0")
    assert len(methods.lines) == len(METHODS)
    assert figures.lines == (
        ("step", "A ÷ B", "0.500 ×", "≤ 0.74 ×", "yes"),
        ("step", "C ÷ B", "1.250 ×", "≤ 1 ×", "NO"),
        ("memory", "D ÷ B", "12.000 ×", "≥ 9 ×", "yes"),
        ("attach", "new", "0.250 s", "", ""),
        ("attach", "other", "skipped: no reason", "", ""),
    )


def test_rows_that_were_not_measured_leave_no_columns():
    assert tables(result(rows=["step"]))[0].header == ("method", "step, s", "÷ full", "÷ LoRA")
    assert len(tables(result(rows=["attach"]))) == 1


def test_markdown_parses_back():
    text = markdown(result())
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    first, second = tables(result())
    assert lines[0] == list(first.header)
    assert set("".join(lines[1])) == {"-", ":"}
    assert [tuple(line) for line in lines[2 : 2 + len(METHODS)]] == list(first.lines)
    assert [tuple(line) for line in lines[4 + len(METHODS) :]] == list(second.lines)
    assert NO_EVIDENCE not in text
    assert NO_EVIDENCE in markdown(result(quick=True))


def test_json_round_trip(tmp_path):
    data, text, image = write(result(), tmp_path / "new")
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(result().to_dict()))
    assert found["evidence"] is True
    assert found["machine"] == {"processor": "Abacus", "torch": "1.0"}
    assert found["workload"]["batch_size"] == 8
    assert found["rows"]["step"]["figures"][1] == {
        **{"what": "C ÷ B", "value": 1.25, "unit": "×", "at_most": 1.0, "at_least": None, "met": False}
    }
    assert found["rows"]["step"]["raw"]["seconds"]["full"] == {"median": 1.0, "min": 0.5, "max": 9.0}
    assert text.read_text(encoding="utf-8") == markdown(result())
    assert LEGEND in markdown(result())
    assert image.read_bytes().startswith(b"\x89PNG")
    assert result(quick=True).to_dict()["evidence"] is False


def test_an_old_picture_does_not_stay(tmp_path):
    *_, image = write(result(), tmp_path)
    assert image not in write(result(rows=["step"]), tmp_path)
    assert not image.exists()


def test_without_matplotlib_the_picture_is_skipped_and_said_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert [path.name for path in write(result(), tmp_path)] == ["cost.json", "cost.md"]
    assert "pip install peft-fps[benchmark]" in caplog.text


def test_points_are_relative_to_lora():
    points = relative(result())
    assert points["lora"] == (1.0, 1.0)
    assert points["full"] == (0.25, pytest.approx(10 / 7))


@pytest.mark.parametrize("heights", [[0.5] * 8, [0.99, 1.0, 1.0, 0.2], [0.0, 0.01, 0.02, 0.9]])
def test_labels_keep_their_distance_and_their_order(heights):
    names = {str(number): height for number, height in enumerate(heights)}
    placed = spread(names, 0.1)
    order = sorted(names, key=names.__getitem__)
    for below, above in zip(order, order[1:], strict=False):
        assert placed[above] - placed[below] > 0.0999
    assert min(placed.values()) >= -1e-9
    assert max(placed.values()) <= 1
