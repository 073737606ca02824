"""Models with several adapters, and how gradients and compiled models are compared in tests of layers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.helpers import (
    adapted,
    config,
    entry_places,
    fill,
    layers_of,
    selected_columns,
    weighted_of,
)


COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
"""From within torch.compile."""

HOOKED = pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
"""Whether base layers have a hook, so that they run as they are."""


def several_adapters(base: nn.Module, each: dict[str, dict[str, Any]], **options: Any) -> Any:
    """A model with adapters by their names, each with options and with changes of its own; the first is active."""
    (first, own), *others = each.items()
    model = adapted(base, first, **options | own)
    for seed, (name, own) in enumerate(others, start=2):
        model.add_adapter(name, config(**options | own))
        fill(model, name, seed=seed)
    return model.eval()


def activate(model: Any, *names: str) -> None:
    model.base_model.set_adapter(list(names))


def hook_base_layers(model: nn.Module) -> None:
    for layer in layers_of(model).values():
        layer.base_layer.register_forward_pre_hook(lambda module, args: None)


# --- gradients ------------------------------------------------------------------------------------------------------


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all that is trained, by its name in the base model."""
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("base_model.model."): grad for name, grad in trained.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected), set(found) ^ set(expected)
    different = [name for name, grad in expected.items() if not torch.equal(found[name], grad)]
    assert different == [], different


def assert_adapter_gradients(model: nn.Module, plain: nn.Module, *names: str, **tolerance: float) -> None:
    """Gradients of values and bias deltas are those of the plain model's weights at the entries, and of its biases."""
    entries = weighted_of(model)
    for path, layer in layers_of(model).items():
        module: Any = plain.get_submodule(path)
        close = partial(torch.testing.assert_close, msg=lambda text, path=path: f"{path}: {text}", **tolerance)
        for name in names or ("default",):
            if path in entries and name in layer.fps_values:
                places = torch.tensor(entry_places(module, selected_columns(layer, name)), dtype=torch.int64)
                expected = module.weight.grad.to_dense().reshape(-1)[places]
                close(layer.fps_values[name].grad.to(expected.dtype), expected)
            if name in layer.fps_bias:
                expected = module.bias.grad.flatten()
                close(layer.fps_bias[name].grad.to(expected.dtype), expected)


def compiled_alike(
    model: Any,
    *arguments: Any,
    backend: str = "eager",
    warm: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    **inputs: Any,
) -> Any:
    """The model as one graph, whose result (or loss) and gradients are the model's; `warm` if that runs before it."""

    def run(module: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        model.zero_grad()
        found = module(*arguments, **inputs)
        result = found if isinstance(found, Tensor) else found.loss
        result.square().sum().backward()
        return result, {name: parameter.grad for name, parameter in model.named_parameters()}

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first, second = (run(module) for module in ((model, compiled) if warm else (compiled, model)))
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol)
    return compiled
