"""What can carry an adapter, and what is said of what cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.targets.target_checks import check_target
from tests.support.helpers import config, layers_of, unchanged
from tests.support.language_models import tiny_mixtral


class Parts(nn.Module):
    """A linear layer among modules that FPS cannot adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.bags = nn.EmbeddingBag(6, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "bags": "bags is a EmbeddingBag, expected one of Linear, .*Embedding.* train it whole with modules_to_save",
    "attention": "attention is a MultiheadAttention, expected one of Linear.* Name its projections, in_proj and out",
    "in_proj_weight": "attention.in_proj_weight, named in target_modules, is the parameter in_proj_weight of a "
    "MultiheadAttention, expected the name of a module. Name its projections",
    "linear.weight": "linear.weight, .* is the parameter weight of a Linear, .* Name the module, linear.",
    "embedding.weight": "embedding.weight, .* is the parameter weight of a Embedding, .* Name the module, embedding.",
}


@pytest.mark.parametrize("others", [[], ["linear"]], ids=["alone", "with others"])
@pytest.mark.parametrize("target", REFUSED)
def test_what_cannot_be_adapted_is_named_with_what_to_do(target: str, others: list[str]) -> None:
    base = Parts()
    with unchanged(base), pytest.raises(ValueError, match=REFUSED[target]):
        get_peft_model(base, config(target_modules=[target, *others]))


@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "experts.down_proj"])
def test_stacked_experts_are_named_with_what_to_do(target: str) -> None:
    base = tiny_mixtral()
    message = r"layers\.0\.mlp\.experts.* MixtralExperts, expected .*gate_up_proj, down_proj hold the weights of many"
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config(target_modules=[target, "q_proj"]))


@pytest.mark.parametrize("name", ["weight", "own_weight"])
def test_modules_may_be_called_as_parameters_are(name: str) -> None:
    base = nn.ModuleDict({"weight": nn.Linear(4, 4), "own_weight": nn.Linear(4, 4)})
    assert set(layers_of(get_peft_model(base, config(target_modules=[name])))) == {name}


class FakeGPTQLinear(nn.Module):
    """A linear layer as libraries have it whose weights FPS cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(2, 4, dtype=torch.int32))


def test_other_quantisations_are_named() -> None:
    base = nn.Sequential(FakeGPTQLinear())
    message = (
        "0 is a FakeGPTQLinear, .*Of quantised weights, those of bitsandbytes 8-bit and 4-bit, torchao, or HQQ are"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(target_modules=["0"]))


def test_a_weight_of_integers_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="0 .Linear. has a weight of dtype torch.int8.*bitsandbytes 8-bit and 4-bit"):
        check_target(base, "0")


# --- ZeRO -----------------------------------------------------------------------------------------------------------


def partitioned(parameter: nn.Parameter) -> None:
    """As DeepSpeed's stage 3 leaves a parameter whose part another process may hold."""
    whole = parameter.shape
    parameter.data = torch.empty(0)
    vars(parameter).update(ds_id=0, ds_shape=whole, ds_numel=whole.numel())


@pytest.mark.parametrize(
    "options", [{}, {"budget": 0.01}, {"target_modules": ["linear"]}, {"modules_to_save": ["embedding"]}]
)
def test_partitioned_parameters_are_refused_at_once(options: dict[str, Any]) -> None:
    base = Parts()
    for parameter in base.parameters():
        partitioned(parameter)
    message = (
        r"(linear\.weight is|attention\.in_proj: it is) partitioned by DeepSpeed's ZeRO stage 3 "
        r"\(shape \(0,\), whole \((12|4), 4\)\), expected a "
        r"whole weight to select entries of. Use stage 1 or 2"
    )
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**options))


def test_partitioned_experts_are_no_division_by_zero() -> None:
    base = tiny_mixtral()
    for parameter in base.parameters():
        partitioned(parameter)
    with pytest.raises(ValueError, match=r"q_proj\.weight is partitioned by DeepSpeed's ZeRO stage 3"):
        get_peft_model(base, config())


# --- counting -------------------------------------------------------------------------------------------------------


def test_packed_4bit_tensors_of_other_modules_count_as_many_as_they_stand_for() -> None:
    """bitsandbytes' embeddings, whose tensors know the shape that they had."""
    base = Parts()
    base.embedding.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    base.embedding.weight.quant_state = SimpleNamespace(shape=torch.Size([6, 4]))
    assert count_base_parameters(base) == sum(p.numel() for p in Parts().parameters())
