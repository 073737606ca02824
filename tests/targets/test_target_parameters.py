"""Which parameters are adapted, by default and by name, and what is said of those that cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from peft_fps.base.opening import weight_at
from peft_fps.base.packed_weight import OpenedModule
from tests.support.expert_models import EXPERTS, expert_model, packed_layers
from tests.support.helpers import config, unchanged


class Experts(nn.Module):
    """Experts that FPS cannot adapt by one of their parameters, or for the layer beside these."""

    def __init__(self, layer: bool = False) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(6, 4))
        self.packed = nn.Parameter(torch.randn(2, 3, 4))
        self.packed_bias = nn.Parameter(torch.randn(2, 3))
        if layer:
            self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed[0].t() + self.packed_bias[0]


class Net(nn.Module):
    def __init__(self, layer: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(2, 3, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = Experts(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, EXPERTS),
        ({"target_modules": ["q_proj"]}, []),
        ({"target_parameters": []}, []),
        ({"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, EXPERTS[1:]),
        ({"target_parameters": EXPERTS[:1]}, EXPERTS[:1]),
        ({"exclude_modules": ["experts"]}, []),
        ({"exclude_modules": r".*\.down_proj"}, EXPERTS[:1]),
        ({"layers_to_transform": 0}, EXPERTS),
        ({"target_modules": ["q_proj"], "target_parameters": EXPERTS, "layers_to_transform": [0]}, EXPERTS),
    ],
    ids=str,
)
def test_what_is_adapted(options: dict[str, Any], expected: list[str]) -> None:
    model = get_peft_model(expert_model("Mixtral"), config(**options))
    assert [path.removeprefix("model.layers.0.mlp.") for path in packed_layers(model)] == expected


def test_the_blocks_of_layers_to_transform_count_for_parameters_too() -> None:
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(
            expert_model("Mixtral"),
            config(target_modules=["q_proj"], target_parameters=EXPERTS, layers_to_transform=[1]),
        )


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nothing": (Net, r"target_parameters names 'nothing', expected the path, or the end .* of a parameter of the Net"),
    "own": (Net, r"own: it lies in the Net itself"),
    "first.weight": (Net, r"first\.weight: it belongs to a Linear, which target_modules can name"),
    "attention.in_proj_weight": (Net, r"attention\.in_proj_weight: it belongs to a MultiheadAttention, whose"),
    "flat": (Net, r"experts\.flat: it has dtype torch\.float32 and shape \(6, 4\), expected .* three dimensions"),
    "packed_bias": (Net, r"experts\.packed_bias: it has .* shape \(2, 3\)"),
    "packed": (lambda: Net(layer=True), r"experts\.packed: its module has layers beside its parameters \(shared\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_cannot_be_adapted_is_refused_before_anything_changes(name: str) -> None:
    build, message = REFUSED[name]
    base = build()
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config(target_modules=["first"], target_parameters=[name]))
    assert not any(isinstance(module, OpenedModule) for module in base.modules())


def test_experts_that_cannot_be_adapted_are_named_and_left_out() -> None:
    with pytest.warns(UserWarning, match=r"^experts\.flat: 1 tensors with \d+% .* because it has dtype.*stay frozen"):
        model = get_peft_model(Net(), config())
    assert [path for path in packed_layers(model) if "experts" in path] == ["experts.packed"]
    with pytest.warns(UserWarning, match=r"^experts\.flat, experts\.packed: 2 tensors"):
        get_peft_model(Net(layer=True), config())


def test_tied_experts_are_refused() -> None:
    base = Net()
    base.experts.packed = base.own
    with pytest.raises(ValueError, match=r"experts\.packed is the same tensor as \.own"):
        get_peft_model(base, config(target_modules=["first"], target_parameters=["packed"]))


def test_an_error_of_peft_after_the_modules_were_opened_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_fps.model import FPSModel

    def failing(self: Any, *args: Any, **options: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(FPSModel, "_create_and_replace", failing)
    base = Net()
    with unchanged(base), pytest.raises(RuntimeError, match="no memory"):
        get_peft_model(base, config(target_modules=[], target_parameters=["packed"]))
    assert not any(isinstance(module, OpenedModule) for module in base.modules())


def test_one_config_serves_several_models_and_keeps_what_the_user_gave() -> None:
    shared = FPSConfig(importance="magnitude", per_neuron=1)
    for name in ("Mixtral", "gpt-oss"):
        assert len(packed_layers(get_peft_model(expert_model(name), shared))) == 2
    given = FPSConfig(importance="magnitude", per_neuron=1, target_parameters={"down_proj"}, target_modules=[])
    assert given.target_parameters == ["down_proj"]
    get_peft_model(expert_model("Mixtral"), given)
    assert given.target_parameters == ["down_proj"]


def test_the_parameter_stays_at_its_path() -> None:
    base = Net()
    packed = base.experts.packed
    get_peft_model(base, config(target_modules=["first"], target_parameters=["packed"]))
    found = weight_at(base, "experts.packed")
    assert found is not None
    assert found.weight is packed
    assert weight_at(base, "experts.nothing") is None
