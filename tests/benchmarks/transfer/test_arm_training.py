"""Ways to train, against the command's own and against groups by name."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments

from peft_fps.benchmarks.transfer import cell_run
from peft_fps.benchmarks.transfer.arm_training import DEFAULT, LOW_RATES, ArmTraining
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell
from peft_fps.config import FPSConfig
from peft_fps.training import FPSCallback
from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.vision.preparation import training_callback
from tests.support.helpers import image_batches, tiny_vit


def attached(method: str, share: float = 0.25) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    base = tiny_vit()
    model = get_peft_model(base, ARMS[method].build(base, share, 0))
    model.calibrate(image_batches(1), progress=False)
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_default_trains_as_the_command_does():
    model, _ = attached("fps-default")
    callback = training_callback(FinetuneOptions(), model, 0.03)
    assert ARMS["fps-default"].training is DEFAULT
    assert {"bias_lr": 0.03 * DEFAULT.bias_rate, "head_lr": 0.03 * DEFAULT.head_rate} == callback.rates
    assert DEFAULT.centred is callback.centred is None
    assert DEFAULT.recipe == {"adam_beta2": FinetuneOptions().recipe(FPSConfig())["adam_beta2"]}
    config = ARMS["fps-default"].build(tiny_vit(), 0.1, 0)
    assert config.budget == 0.1
    assert replace(config, budget=None) == replace(FPSConfig(), budget=None, task_type=config.task_type)


def test_rates_are_those_of_the_kinds(tmp_path):
    model, found = attached("fps-default")
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, weight_decay=0.0, adam_beta2=0.9, use_cpu=True, report_to=[]
    )
    optimizer, _ = ArmTraining(bias_rate=3.0, head_rate=0.1).optimizers(model, arguments)
    names = {id(parameter): name for name, parameter in found.items()}
    settings = {
        names[id(parameter)]: (group["lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rates = {name: 1e-3 if "classifier" in name else 3e-2 if "fps_bias" in name else 1e-2 for name in found}
    assert settings == {name: (pytest.approx(rate), 0.0, (0.9, 0.9)) for name, rate in rates.items()}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert ArmTraining().optimizers(model, arguments) == (None, None)


AS_DEFAULT = ("fps-default", "magnitude-default", "fps-default-one-rate")
"""Methods that are trained as the default."""


@pytest.mark.parametrize("method", ["fps-biases", "try-low-rates", "try-centred", *AS_DEFAULT])
def test_a_cell_is_trained_as_its_arm_says(method, setting, monkeypatch):
    seen = {}

    def train(model, arguments, images, collator, **options):
        seen.update(arguments=arguments, **options)
        return 0.0

    monkeypatch.setattr(cell_run, "train", train)
    cell_run.run_cell(Cell("bright", method, 0.2, 0, 1e-2), replace(setting, epochs=1))
    low, centred = method in ("try-low-rates", *AS_DEFAULT), method in ("try-centred", *AS_DEFAULT)
    assert seen["arguments"].adam_beta2 == (LOW_RATES.recipe["adam_beta2"] if low else 0.999)
    assert (seen["optimizers"][0] is not None) == low
    assert [type(callback) for callback in seen["callbacks"]] == ([FPSCallback] if centred else [])
    assert [callback.centred for callback in seen["callbacks"]] == {
        "try-centred": [True],
        **dict.fromkeys(AS_DEFAULT, [None]),
    }.get(method, [])
