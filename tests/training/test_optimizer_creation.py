"""Rates for biases, norms and the head in a Trainer, against an optimizer that is given to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from peft_fps import FPSCallback, parameter_groups
from tests.support.helpers import adapted, tiny_vit
from tests.training.trainers import EXAMPLES, arguments, trained_state, trainer


RATES = {"bias_lr": 1e-4, "norm_lr": 1e-3, "head_lr": 1e-5}


def model(**options: Any) -> nn.Module:
    return adapted(tiny_vit(), filled=False, **{"bias": "with_norms"} | options)


def test_a_callback_with_rates_gives_the_trainer_these_groups(tmp_path: Path) -> None:
    by_callback, by_hand = model(), model()
    trainer(by_callback, tmp_path, [FPSCallback(**RATES, centred=False)]).train()
    given = arguments(tmp_path)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(given)
    optimizer = kind(parameter_groups(by_hand, 0.01, weight_decay=0.1, **RATES), **options)
    Trainer(by_hand, given, train_dataset=EXAMPLES, optimizers=(optimizer, None)).train()
    assert trained_state(by_callback) == trained_state(by_hand)


def test_without_rates_nothing_is_different(tmp_path: Path) -> None:
    with_callback, without = model(), model()
    made = trainer(with_callback, tmp_path, [FPSCallback(centred=False)])
    assert "create_optimizer" not in vars(made)
    made.train()
    trainer(without, tmp_path).train()
    assert trained_state(with_callback) == trained_state(without)


def test_a_second_training_keeps_the_groups(tmp_path: Path) -> None:
    made = trainer(model(), tmp_path, [FPSCallback(bias_lr=1e-4, head_lr=1e-5)])
    for _ in range(2):
        made.train()
        rates = {group["name"]: group["initial_lr"] for group in made.optimizer.param_groups}
        assert rates == {"entries": 0.01, "biases": 1e-4, "norms": 1e-4, "whole": 1e-5, "whole, not decayed": 1e-5}


@pytest.mark.parametrize("how", ["later", "own optimizer", "no biases"])
def test_rates_that_would_have_no_effect_are_refused(how: str, tmp_path: Path) -> None:
    trained, callback = model(bias="none" if how == "no biases" else "all"), FPSCallback(bias_lr=1e-4)
    made = trainer(trained, tmp_path, [] if how == "later" else [callback])
    if how == "later":
        made.add_callback(callback)
    if how == "own optimizer":
        made.optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"FPSCallback got bias_lr=0.0001, .* expected biases or norms. Pass"):
        made.train()
