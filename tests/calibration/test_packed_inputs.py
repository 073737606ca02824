"""The inputs that each expert multiplies, against what its routing says."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_fps import FPSConfig
from peft_fps.calibration import Observed, Pass, observe
from tests.support.expert_models import EXPERTS, MODELS, expert_model, packed_layers
from tests.support.helpers import tokens


pytestmark = pytest.mark.filterwarnings("ignore:.*Llama4Router:UserWarning", "ignore:Experts without a token")
MASK = torch.ones(3, 7, dtype=torch.long)
MASK[0, :3] = 0
BATCH = {"input_ids": tokens(3, 7), "attention_mask": MASK}


def naive(experts: Any, args: tuple[Tensor, ...], kept: Tensor) -> dict[str, list[Tensor]]:
    """The inputs of both products of each expert, `(tokens, inputs)`, of the tokens that are no padding."""
    found: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(experts.gate_up_proj.shape[0]):
        if len(args) == 1:  # all tokens for every expert, zero where they are not routed to it
            x = args[0].view(experts.gate_up_proj.shape[0], -1, args[0].shape[-1])[expert][kept]
            x = x[x.abs().sum(1) > 0]
        else:
            x = args[0][(args[1] == expert).any(1) & kept]
        weight = experts.gate_up_proj[expert]
        transposed = experts.gate_up_proj.shape[1] == x.shape[1]
        product = x @ (weight if transposed else weight.t())
        if hasattr(experts, "gate_up_proj_bias"):
            product = product + experts.gate_up_proj_bias[expert]
        if hasattr(experts, "_apply_gate"):
            hidden = experts._apply_gate(product)
        else:
            gate, up = product.chunk(2, -1)
            hidden = up * experts.act_fn(gate)
        found["gate_up_proj"].append(x)
        found["down_proj"].append(hidden)
    return found


@pytest.mark.parametrize("implementation", [None, "batched_mm", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_mean_magnitude_is_that_of_the_tokens_routed_to_the_expert(name: str, implementation: str | None) -> None:
    base = expert_model(name, implementation)
    model = get_peft_model(base, FPSConfig(per_neuron=1, target_modules=[], target_parameters=EXPERTS))
    layers = packed_layers(model)
    experts = next(iter(layers.values())).base_layer.owner
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        base(**BATCH)
    handle.remove()
    expected = naive(experts, calls[0], MASK.flatten().bool())
    before = base.config._experts_implementation
    observed = {
        p: Observed(layer, layer.base_layer, layer.matrices, layer.shape.inputs) for p, layer in layers.items()
    }
    with model.disable_adapter():  # as calibrate has it
        statistics, _ = observe(base, observed, "l1", Pass([BATCH], progress=False))
    assert base.config._experts_implementation == before
    for path, found in statistics.items():
        inputs = expected[path.rpartition(".")[2]]
        assert found.positions.tolist() == [len(x) for x in inputs]  # type: ignore[union-attr]
        for expert, x in enumerate(inputs):
            torch.testing.assert_close(found.sums[expert].float(), x.abs().sum(0).detach(), rtol=1e-4, atol=1e-5)
    assert statistics.keys() == layers.keys()


def test_entries_follow_weight_times_activation_and_idle_experts_are_named() -> None:
    base: Any = expert_model("Mixtral")
    with torch.no_grad():
        base.model.layers[0].mlp.gate.weight.zero_()  # the first of equals get every token
    config = FPSConfig(per_neuron=0.5, granularity="model", target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(base, config)
    message = r"Experts without .*: 2 of 4 of model\.layers\.0\.mlp\.experts \((\d, \d)\)"
    with pytest.warns(UserWarning, match=message) as caught:
        model.calibrate([BATCH], progress=False)
    idle = [int(number) for number in str(caught[0].message).partition("(")[2].partition(")")[0].split(", ")]
    counts = [layer.fps_row_counts["default"].view(4, -1).sum(1) for layer in packed_layers(model).values()]
    assert [expert for expert in range(4) if sum(counts)[expert] == 0] == idle
    state: Any = model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_an_expert_weight_multiplied_along_the_other_axis_is_refused() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.expand(2, -1, -1), self.kernel).sum(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x)

    model = get_peft_model(Net(), FPSConfig(per_neuron=1, target_modules=[], target_parameters=["kernel"]))
    with pytest.raises(
        ValueError, match=r"experts\.kernel: Experts multiplies .* expected \(4, 4\) with inputs along"
    ):
        model.calibrate([torch.randn(3, 4)], progress=False)
