"""The life of an adapter on a model that somebody else wrote: what has to hold at every step, whatever the model."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from tests.support.helpers import base_bytes, bits, layers_of


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        build: gives the model, with random weights.
        batch: gives a batch, by keyword or as one tensor.
        idle: whether some layers are not reached by a forward, or read past the layer.
        left_out: whether some layers of the kinds that can be adapted are left out of the default targets, with a
            warning.
        unused: pattern of names of parameters whose layers run, but whose outputs the model does not use.
        options: of the adapter's config.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    idle: bool = False
    left_out: bool = False
    unused: str = "(?!)"
    options: Mapping[str, Any] | None = None


def run(case: Case, folder: Path) -> None:
    """Attach, calibrate, train two steps, save, load, merge, unmerge and unload; compare outputs and base weights."""
    torch.manual_seed(0)
    base = case.build().eval()
    for parameter in base.parameters():  # heads and norms that start at zero or one would hide mistakes
        if parameter.is_floating_point():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    plain, batch = copy.deepcopy(base), case.batch()
    config = {"budget": 0.05} | dict(case.options or {})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, FPSConfig(**config))
        model.calibrate([batch], progress=False, loss=loss_of)
    said = " ".join(str(warning.message) for warning in caught if warning.category is UserWarning)
    assert ("will not be trained" in said) == case.idle, f"said while it was made: {said}"
    assert ("left out of the targets" in said) == case.left_out, f"said while it was made: {said}"
    before = everything(plain)

    train(model, batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    assert not [name for name in idle if not re.search(case.unused, name)], f"no gradient: {idle}"
    changed = {name for name, tensor in everything(unwrapped(model)).items() if before.get(name) != tensor}
    assert not changed, f"training has changed {sorted(changed)[:5]}"

    with torch.no_grad():
        expected, undone = outputs(model, batch), outputs(plain, batch)
        assert not close(expected, undone), "training has changed nothing"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(folder)).eval()
        assert same(outputs(loaded, batch), expected), "a loaded model computes something else"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # as above
            fresh = get_peft_model(copy.deepcopy(plain), FPSConfig(**config)).eval()
        fresh.load_state_dict(model.state_dict())
        assert same(outputs(fresh, batch), expected), "a state dict brings something else"
        weights = base_bytes(loaded)
        loaded.merge_adapter()
        assert close(outputs(loaded, batch), expected), "merging has changed the outputs"
        loaded.unmerge_adapter()
        assert base_bytes(loaded) == weights, "unmerging has not restored the weights"
        assert same(outputs(loaded, batch), expected)
        merged = loaded.merge_and_unload()
        assert not layers_of(merged)
        assert close(outputs(merged.eval(), batch), expected), "the merged model computes something else"
        with model.disable_adapter():
            assert same(outputs(model, batch), undone), "a disabled adapter still acts"


def train(model: nn.Module, batch: Any, steps: int = 2) -> None:
    """Two steps on whatever the outputs are."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(outputs(model, batch)).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
    model.eval()


def loss_of(found: Any, batch: Any = None) -> Tensor:
    """A loss that every output counts in."""
    return torch.stack([(tensor.float() - 1).square().mean() for tensor in floating(found)]).sum()


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All floating tensors that a forward gives, in order."""
    torch.manual_seed(0)  # of models that draw in evaluation too
    found = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return list(floating(found))


def floating(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from floating(value)
    elif isinstance(found, (tuple, list)):
        for value in found:
            yield from floating(value)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True)
    )


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Up to the rounding of sums in another order, relative to the largest output."""
    return all(
        float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 1e-3)
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def everything(model: nn.Module) -> dict[str, bytes]:
    """Bytes of all parameters and persistent buffers of the base model by their plain names, heads left out."""
    found = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "modules_to_save" in parts or any(part.startswith("fps_") for part in parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        found[plain] = bits(tensor)
    return found


def unwrapped(model: Any) -> nn.Module:
    found: nn.Module = model.get_base_model()
    return found
