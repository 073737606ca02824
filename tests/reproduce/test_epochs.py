from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_fps.reproduce.epochs import Average, BestEpoch


def model_of(value):
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(7.0)
    return model


def set_weight(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def test_average_of_the_trained_parameters():
    model = model_of(1.0)
    average = Average(model, decay=0.9)
    expected = 1.0
    for value in (2.0, 5.0, -3.0):
        set_weight(model, value)
        average.update()
        expected = 0.9 * expected + 0.1 * value
    assert len(average.values) == 1
    assert average.values[0].item() == pytest.approx(expected)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
        assert model.bias.item() == 7.0
    assert model.weight.item() == -3.0


def test_the_weights_come_back_if_scoring_fails():
    model = model_of(1.0)
    average = Average(model, decay=0.5)
    set_weight(model, 3.0)

    def fail():
        with average.applied():
            assert model.weight.item() == 1.0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.weight.item() == 3.0


def run(best, model, values):
    best.on_train_begin(None, None, None, model=model)
    for epoch, value in enumerate(values, start=1):
        set_weight(model, value)
        best.on_step_end(None, None, None, model=model)
        best.on_epoch_end(None, SimpleNamespace(epoch=epoch - 1e-9), None, model=model)


def test_the_earliest_of_the_best_epochs_is_kept():
    model = model_of(0.0)
    best = BestEpoch(lambda scored: min(scored.weight.item(), 4.0), decay=None)
    run(best, model, [1.0, 4.0, 2.0, 5.0])
    assert best.history == [{"epoch": n, "raw": score} for n, score in ((1, 1.0), (2, 4.0), (3, 2.0), (4, 4.0))]
    assert best.best == {"epoch": 2, "raw": 4.0}
    best.restore(model)
    assert model.weight.item() == 4.0


def test_averaged_weights_compete():
    model = model_of(0.0)
    best = BestEpoch(lambda scored: -abs(scored.weight.item() - 3.0), decay=0.5)
    run(best, model, [1.0, 6.0, 9.0])  # averages 0.5, 3.25, 6.125
    assert [entry["averaged"] for entry in best.history] == [-2.5, -0.25, -3.125]
    assert (best.best["epoch"], best.weights) == (2, "averaged")
    assert model.weight.item() == 9.0
    best.restore(model)
    assert model.weight.item() == 3.25


def test_raw_weights_win_a_tie():
    model = model_of(1.0)
    best = BestEpoch(lambda scored: 0.5, decay=0.5)
    run(best, model, [2.0])
    assert best.weights == "raw"
