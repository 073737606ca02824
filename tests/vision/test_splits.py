from collections import Counter

import pytest

from peft_fps.vision.splits import split_rows


def test_classes_keep_their_proportions():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    kept, drawn = split_rows(labels, 0.2, seed=0)
    assert Counter(labels[row] for row in drawn) == {0: 12, 1: 6, 2: 2}
    assert sorted(kept + drawn) == list(range(100))
    assert drawn == sorted(drawn)


def test_the_seed_decides():
    labels = [0, 1] * 20
    assert split_rows(labels, 0.2, seed=1) == split_rows(labels, 0.2, seed=1) != split_rows(labels, 0.2, seed=2)


def test_more_classes_than_rows_to_draw_still_split():
    kept, drawn = split_rows([0, 1, 2, 3, 4, 4], 0.2, seed=0)
    assert [len(kept), len(drawn)] == [4, 2]


def test_one_row_cannot_be_split():
    with pytest.raises(ValueError, match="has 1 image to split"):
        split_rows([0], 0.5, seed=0)
