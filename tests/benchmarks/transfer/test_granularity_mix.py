import pytest

from peft_fps.benchmarks.transfer.granularity_mix import select_one_each
from peft_fps.selection import Candidate, LayerShape
from tests.selection import naive
from tests.support.helpers import normal


@pytest.mark.parametrize("entries", [0, 3, 5, 6, 9, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_one_for_each_neuron_and_the_rest_by_layer(entries, tied):
    scores = normal(5, 4).abs()
    scores = (2 * scores).round() if tied else scores
    columns, counts = select_one_each(Candidate(LayerShape(5, 4), entries, lambda first, last: scores[first:last]))
    listed = scores.tolist()
    if entries <= 5:
        expected = naive.by_neuron(listed, entries)
    else:
        expected = naive.by_neuron(listed, 5)
        left = [
            [-1.0 if column in chosen else score for column, score in enumerate(row)]
            for row, chosen in zip(listed, expected, strict=True)
        ]
        more = naive.by_layer(left, entries - 5)
        expected = [sorted(one + rest) for one, rest in zip(expected, more, strict=True)]
    found = [part.tolist() for part in columns.split(counts.tolist())]
    assert found == expected
