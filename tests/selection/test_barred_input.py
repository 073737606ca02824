"""An input that gets no entry, whatever its scores are."""

import pytest
import torch

from peft_fps.selection import Candidate, LayerShape, select_entries
from peft_fps.selection.barred_input import with_input, without_input
from tests.support.helpers import normal


def chosen(barred: int | None, entries: int, granularity: str) -> list[set[int]]:
    scores = normal(3, 5).abs()
    scores[:, 2] += 9
    candidate = without_input(Candidate(LayerShape(3, 5), entries, lambda first, last: scores[first:last]), barred)
    columns, counts = with_input(select_entries({"layer": candidate}, granularity)["layer"], barred)
    found = [set(part.tolist()) for part in columns.split(counts.tolist())]
    allowed = [[column for column in range(5) if column != barred] for _ in range(3)]
    if granularity == "neuron":
        ranked = [sorted(row, key=lambda c, s=s: -s[c]) for row, s in zip(allowed, scores.tolist(), strict=True)]
        best = [set(row[: entries // 3]) for row in ranked]
        assert found == best
    return found


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model", "row", "column"])
@pytest.mark.parametrize("entries", [6, 12])
@pytest.mark.parametrize("barred", [0, 2, 4])
def test_others_are_chosen_as_if_it_did_not_exist(barred: int, entries: int, granularity: str) -> None:
    found = chosen(barred, entries, granularity)
    assert not any(barred in columns for columns in found)
    assert sum(map(len, found)) <= entries


def test_without_one_all_inputs_count() -> None:
    assert all(2 in columns for columns in chosen(None, 6, "neuron"))
    same = torch.arange(2), torch.tensor([1, 1])
    assert with_input(same, None) == same
