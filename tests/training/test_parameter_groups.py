"""Parameter groups, against groups by the names of parameters."""

import pytest
import torch
from torch import nn

from peft_fps.training.parameter_groups import parameter_groups
from tests.support.helpers import adapted, images, tiny_mlp, tiny_vit


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The group that a parameter's name and size say."""
    if "classifier" in name:
        return "whole" if name.endswith("weight") else "whole, not decayed"
    if "layernorm" in name:
        return "norms"
    kinds = {"fps_values": "entries", "fps_bias": "biases", "fps_threshold": "thresholds"}
    for part, kind in kinds.items():
        if part in name:
            return kind
    return "others" if parameter.dim() > 1 else "others, not decayed"


def naive(model: nn.Module) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(group_of(name, parameter), []).append(id(parameter))
    return found


def two_adapters() -> nn.Module:
    model = adapted(tiny_vit(), "first", token_gate="threshold")
    model.add_adapter(
        "second", model.peft_config["first"].__class__(per_neuron=1, importance="magnitude", modules_to_save=[])
    )
    model.base_model.set_adapter(["first", "second"])
    return model


def unfrozen() -> nn.Module:
    model = adapted(tiny_vit(), bias="with_norms")
    vit = model.base_model.model.vit
    for parameter in (
        vit.embeddings.cls_token,
        vit.layers[0].mlp.fc1.base_layer.bias,
        vit.layernorm.base_layer.weight,
    ):
        parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: adapted(tiny_vit()), ["entries", "biases", "whole", "whole, not decayed"]),
        (two_adapters, ["entries", "biases", "thresholds", "whole", "whole, not decayed"]),
        (
            unfrozen,
            ["entries", "biases", "norms", "whole", "whole, not decayed", "others", "others, not decayed"],
        ),
        (tiny_mlp, ["others", "others, not decayed"]),
    ],
)
def test_every_trainable_parameter_is_in_the_group_of_its_kind(build, names):
    model = build()
    groups = parameter_groups(model, 1e-2, bias_lr=1e-3, norm_lr=1e-4, head_lr=1e-5, weight_decay=0.1)
    assert [group["name"] for group in groups] == names
    assert {group["name"]: [id(parameter) for parameter in group["params"]] for group in groups} == naive(model)
    for group in groups:
        kind = group["name"].removesuffix(", not decayed")
        assert group["lr"] == {"biases": 1e-3, "norms": 1e-4, "whole": 1e-5}.get(kind, 1e-2)
        assert group["weight_decay"] == (0.1 if group["name"] in ("entries", "whole", "others") else 0.0)


def test_rates_that_are_not_given():
    rates = {
        options.get("bias_lr", 0): {
            group["name"]: (group["lr"], group["weight_decay"])
            for group in parameter_groups(adapted(tiny_vit(), bias="with_norms"), 1e-2, **options)
        }
        for options in ({}, {"bias_lr": 1e-3})
    }
    assert set(rates[0].values()) == {(1e-2, 0.0)}
    assert rates[1e-3] == rates[0] | {"biases": (1e-3, 0.0), "norms": (1e-3, 0.0)}


def test_a_first_step_of_adamw_moves_each_number_by_its_rate():
    model = adapted(tiny_vit(), filled=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, bias_lr=1e-4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(pixel_values=images(4), labels=torch.arange(4)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0 if parameter.grad is None else 1e-4 if "fps_bias" in name else 1e-2
        moved = (parameter.detach() - before[name]).abs()
        if rate:
            moved = moved[parameter.grad.abs() > 1e-4]  # AdamW's epsilon holds smaller gradients back
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"lr is 0.0, expected a finite number above 0"),
        ({"lr": 1e-2, "bias_lr": float("inf")}, r"bias_lr is inf"),
        ({"lr": 1e-2, "norm_lr": -1.0}, r"norm_lr is -1.0"),
        ({"lr": 1e-2, "head_lr": 0.0}, r"head_lr is 0.0"),
        ({"lr": 1e-2, "weight_decay": -0.1}, r"weight_decay is -0.1, expected a finite number of at least 0"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(tiny_mlp(), **arguments)


def test_a_model_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="The TinyMLP has no trainable parameter, expected an adapter to train"):
        parameter_groups(tiny_mlp().requires_grad_(False), 1e-2)
