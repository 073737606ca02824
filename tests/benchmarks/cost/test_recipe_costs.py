"""What the default adds to training, on a tiny model."""

import pytest
import torch
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost import recipe_costs
from peft_fps.benchmarks.cost.recipe_costs import DefaultTraining, measure_recipe
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.vision.default_training import LOW_RATE


def test_a_default_step_has_rates_by_kind_and_centred_inputs(base: PreTrainedModel, workload: Workload) -> None:
    training = DefaultTraining(base, workload)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    rates: dict[str, float] = {}
    for group in training.optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
    entries = {rate for name, rate in rates.items() if "fps_values" in name}
    others = {rate for name, rate in rates.items() if "fps_values" not in name}
    assert len(entries) == 1
    assert list(others) == [pytest.approx(LOW_RATE * entries.pop())]
    layers = [name for name in rates if "fps_values" in name and name.replace("values", "bias") in rates]
    assert len(training.steps.layers) == len(layers)
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    training.step()
    for name, parameter in training.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-20)


def test_what_the_default_adds(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_costs, "in_own_processes", lambda jobs, at_once: [job() for job in jobs])
    row = measure_recipe(workload)
    raw = row.raw
    step, peak, means = (figure.value for figure in row.figures)
    assert step == pytest.approx(raw["step"]["default"]["median"] / raw["step"]["plain"]["median"])
    assert means == pytest.approx(raw["means"]["means"]["median"] / raw["means"]["forward"]["median"])
    assert peak == raw["peak_bytes"]["default"] / raw["peak_bytes"]["plain"] >= 1
    assert [figure.at_most for figure in row.figures] == [1.03, None, 1.2]


def test_means_can_be_taken_again(base: PreTrainedModel, workload: Workload) -> None:
    training = DefaultTraining(base, workload)
    first = training.steps
    training.gather_means()
    assert training.steps is not first
    assert training.steps.layers.keys() == first.layers.keys()
    for path, layer in training.steps.layers.items():
        torch.testing.assert_close(layer.means, first.layers[path].means)
    training.step()
