"""The picture of a training run."""

import numpy as np
import pytest

from peft_fps.plots import plot_training


LOG = [
    {"loss": 2.0, "learning_rate": 1e-3, "epoch": 0.5},
    {"loss": 1.0, "epoch": 1.0},
    {"eval_loss": 1.5, "eval_accuracy": 0.5, "epoch": 1.0},
    {"loss": 0.5, "epoch": 2.0},
    {"eval_loss": 1.2, "eval_accuracy": 0.75, "epoch": 2.0},
    {"train_runtime": 3.0, "train_loss": 1.1, "epoch": 2.0},
]


def test_losses_and_accuracy_stand_over_epochs() -> None:
    loss, accuracy = plot_training(LOG).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert curves == {"training": [[0.5, 2.0], [1.0, 1.0], [2.0, 0.5]], "validation": [[1.0, 1.5], [2.0, 1.2]]}
    np.testing.assert_array_equal(accuracy.lines[0].get_xydata(), [[1.0, 0.5], [2.0, 0.75]])
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "mean loss")
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "accuracy")
    assert accuracy.yaxis.get_major_formatter()(0.75, 0).startswith("75")


def test_a_log_without_evaluation_gives_one_panel() -> None:
    assert [axes.get_ylabel() for axes in plot_training(LOG[:2]).axes] == ["mean loss"]


def test_a_log_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no record with an epoch and a loss"):
        plot_training([{"train_runtime": 3.0, "epoch": 1.0}])
