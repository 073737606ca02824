"""The report's figures, by hand."""

import json
from dataclasses import replace

import pytest

from peft_fps.selection import LayerSelection, SelectionReport


def report(budget: float | None = 0.03) -> SelectionReport:
    rows = (
        LayerSelection("encoder.first", neurons=10, inputs=20, entries=15, biases=10, bytes=140),
        LayerSelection("encoder.second", neurons=4, inputs=1000, entries=1200, biases=0, bytes=7204),
    )
    return SelectionReport(
        layers=rows, base_parameters=50_000, head_parameters=2_000, head_bytes=8_000, budget=budget, method="hand"
    )


def test_totals():
    found = report()
    assert [row.share for row in found.layers] == [0.075, 0.3]
    assert (found.entries, found.biases, found.trained, found.bytes) == (1215, 10, 1225, 15344)
    assert found.share == 0.0245
    assert found.share_with_head == 0.0645


def test_table():
    lines = str(report()).splitlines()
    cells = [line.split() for line in lines]
    assert lines[0].split("  ")[0] == "module"
    assert "fan-in" in lines[0]
    assert ["encoder.first", "10", "20", "15", "1.50", "7.500%", "10", "140"] in cells
    assert ["encoder.second", "4", "1,000", "1,200", "300.00", "30.000%", "0", "7,204"] in cells
    assert ["total", "14", "1,215", "86.79", "28.929%", "10", "7,344"] in cells  # of 4,200 weights
    assert len({len(line) for line in lines[:6]}) == 1
    text = str(report())
    assert "selected by hand" in text
    assert "1,225 of 50,000 (2.4500%, budget 3.000%)" in text
    assert "3,225 (6.4500%, the papers' convention)" in text
    assert "15,344 bytes, of these 8,000 for the head" in text
    assert "trained whole" not in text


def test_table_without_a_budget_and_without_layers():
    assert "budget" not in str(report(budget=None))
    empty = SelectionReport((), base_parameters=7, head_parameters=0, head_bytes=0, budget=0.1, method="nothing")
    assert "total" in str(empty)
    assert "0 of 7" in str(empty)
    assert "no module is trained whole: a new output head has to be named in modules_to_save" in str(empty)


def test_to_dict_is_plain_data_with_the_derived_figures():
    data = json.loads(json.dumps(report().to_dict()))
    assert data["layers"][0] == {
        "module": "encoder.first",
        "neurons": 10,
        "inputs": 20,
        "entries": 15,
        "biases": 10,
        "bytes": 140,
        "relative_change": None,
        "passing": None,
    }
    assert [data[name] for name in ("entries", "biases", "trained", "bytes")] == [1215, 10, 1225, 15344]
    assert data["share"] == pytest.approx(0.0245)
    assert data["share_with_head"] == pytest.approx(0.0645)
    assert (data["base_parameters"], data["head_parameters"], data["budget"]) == (50_000, 2_000, 0.03)


def test_what_is_said_of_embeddings():
    found = replace(
        report(), tied={"words": ("encoder.words", "head")}, left_out={"positions": 0.25}, unseen={"words": 1200}
    )
    assert str(found).splitlines()[-3:] == [
        "tied weights: the changes of words count in encoder.words, head too",
        "at tokens that calibration never saw: 1,200 entries of words",
        "left out, above 1 % of the model: positions (25.0%)",
    ]
    assert json.loads(json.dumps(found.to_dict()))["tied"] == {"words": ["encoder.words", "head"]}


@pytest.mark.parametrize(
    ("inert", "said"), [({"a": 8, "b": 1_192}, "2 key projections (1,200"), ({"a": 8}, "1 key projection (8")]
)
def test_biases_that_are_left_out_are_counted(inert: dict[str, int], said: str):
    text = str(replace(report(), inert_biases=inert))
    assert f"\nbiases of {said} numbers) are left out: softmax cancels them\n" in text
    assert "softmax" not in str(report())
