"""Rates by input, against inputs captured by hand and steps taken by hand."""

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_fps.benchmarks.transfer.entry_rates import EntryRates, by_input
from tests.support.helpers import adapted, normal, tiny_vit


def begin(rates: EntryRates, optimizer, tmp_path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    rates.on_train_begin(arguments, TrainerState(), TrainerControl(), optimizer=optimizer)


def test_every_number_moves_by_its_own_rate_and_others_by_the_common_one(tmp_path):
    scaled, other = nn.Parameter(normal(3, seed=1)), nn.Parameter(normal(2, seed=2))
    start, left, factors = scaled.detach().clone(), other.detach().clone(), torch.tensor([0.0, 1.0, 2.5])
    optimizer = torch.optim.SGD([scaled, other], lr=0.1)
    begin(EntryRates({scaled: factors}), optimizer, tmp_path)
    for _ in range(2):
        scaled.grad, other.grad = torch.ones(3), torch.ones(2)
        optimizer.step()
    torch.testing.assert_close(scaled.detach(), start - 2 * 0.1 * factors)
    torch.testing.assert_close(other.detach(), left - 2 * 0.1)


def test_rates_are_those_of_an_optimizer_with_a_group_for_every_number(tmp_path):
    rates = [0.3, 1.7, 1.0]
    whole = nn.Parameter(normal(3, seed=3))
    single = [nn.Parameter(value.detach().clone()) for value in whole]
    together = torch.optim.AdamW([whole], lr=1e-2, weight_decay=0.0)
    apart = torch.optim.AdamW(
        [{"params": [one], "lr": 1e-2 * rate} for one, rate in zip(single, rates, strict=True)], weight_decay=0.0
    )
    begin(EntryRates({whole: torch.tensor(rates)}), together, tmp_path)
    for step in range(4):
        whole.grad = normal(3, seed=10 + step)
        for one, gradient in zip(single, whole.grad, strict=True):
            one.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.stack(single).detach())


def test_rates_fall_with_the_size_of_the_input_and_have_the_geometric_mean_one():
    model = adapted(tiny_vit(), filled=False, bias="none")
    batches = [
        {"pixel_values": 1 + normal(2, 3, 16, 16, seed=seed), "labels": torch.tensor([0, seed])} for seed in (1, 2, 3)
    ]
    layer = model.base_model.model.vit.layers[1].mlp.fc2
    inputs, handle = [], layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch["pixel_values"])
    handle.remove()
    sizes = torch.cat(inputs).square().mean(0).sqrt()

    factors = by_input(model, batches, classes=5).factors
    found = factors[layer.fps_values["default"]]
    expected = 1 / sizes[layer.fps_columns["default"].long()]
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-4, atol=1e-6)
    everything = torch.cat([factor.log() for factor in factors.values()])
    assert abs(everything.mean().item()) < 1e-5
    assert everything.std() > 0.1
