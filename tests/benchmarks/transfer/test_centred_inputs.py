"""Steps with centred inputs, against a model that is written with centred inputs and trained as it is."""

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_fps.benchmarks.transfer.centred_inputs import CentredInputs, CentredLayer, centred_inputs
from tests.helpers import adapted, normal, tiny_vit


def begin(callback: CentredInputs, optimizer: torch.optim.Optimizer, folder: object) -> None:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), optimizer=optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_steps_are_those_of_a_layer_with_centred_inputs(kind: type[torch.optim.Optimizer], tmp_path: object) -> None:
    columns, rows, means = torch.tensor([0, 3, 1]), torch.tensor([0, 0, 2]), torch.tensor([0.5, -2.0, 1.5])
    values, bias = nn.Parameter(torch.zeros(3)), nn.Parameter(normal(3))
    plain_values, centred_bias = nn.Parameter(torch.zeros(3)), nn.Parameter(bias.detach().clone())

    def outputs(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.zeros(len(x), 3).index_add(1, rows, x * values) + bias

    optimizer = kind([values, bias], lr=0.1)
    reference = kind([plain_values, centred_bias], lr=0.1)
    begin(CentredInputs([CentredLayer(values, bias, rows, means, values.detach().clone())]), optimizer, tmp_path)
    for step in range(5):
        x = normal(8, 4, seed=step)[:, columns] + means
        for each, found in (
            (optimizer, outputs(x, values, bias)),
            (reference, outputs(x - means, plain_values, centred_bias)),
        ):
            each.zero_grad()
            (found - normal(8, 3, seed=9)).square().mean().backward()
            each.step()
    torch.testing.assert_close(values, plain_values)
    torch.testing.assert_close(outputs(x, values, bias), outputs(x - means, plain_values, centred_bias))


def test_means_are_those_of_the_inputs_of_layers_with_bias_deltas() -> None:
    model = adapted(tiny_vit(), filled=False, bias="all")
    batches = [
        {"pixel_values": 1 + normal(2, 3, 16, 16, seed=seed), "labels": torch.tensor([0, seed])} for seed in (1, 2)
    ]
    layer = model.base_model.model.vit.layers[1].mlp.fc2
    inputs, handle = [], layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch["pixel_values"])
    handle.remove()
    found = {id(each.values): each for each in centred_inputs(model, batches, classes=5).layers}
    centred = found[id(layer.fps_values["default"])]
    torch.testing.assert_close(centred.means, torch.cat(inputs).mean(0)[layer.fps_columns["default"].long()])
    assert [int((centred.rows == row).sum()) for row in range(layer.neurons)] == layer.fps_row_counts[
        "default"
    ].tolist()
    keys = model.base_model.model.vit.layers[1].attention.k_proj
    assert id(keys.fps_values["default"]) not in found  # their biases are inert, and so are their shifts
