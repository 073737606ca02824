"""A thousand operations at random on three adapters: after each one, the model computes what it should.

The reference is a plain copy of the base model with dense changes added: one after the other and rounded each time
where adapters are merged, at once where they are not. A model that has just loaded the saved adapters agrees, too.
"""

from collections import Counter
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from peft_fps import FPSConfig
from tests.support.helpers import _seeded, adapted, base_bytes, bits, config, dense_change, fill, layers_of, normal


class Mixed(nn.Module):
    """A convolution, a LayerNorm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x).flatten(2).transpose(1, 2))
        return self.output(F.gelu(self.hidden(x))).mean(1)


ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"target_modules": ["convolution", "hidden"], "bias": "with_norms", "per_neuron": 2},
    "b": {"target_modules": ["hidden", "output"], "bias": "all", "per_neuron": 1.5, "order": "bottom"},
    "c": {"target_modules": ["convolution", "hidden", "output"], "bias": "none", "per_neuron": 3, "seed": 4},
}


def base(dtype: torch.dtype) -> nn.Module:
    return _seeded(Mixed).to(dtype)


def options(name: str) -> FPSConfig:
    return config(**ADAPTERS[name], modules_to_save=[], importance="random" if name == "c" else "magnitude")


class Walk:
    """A model, and what is expected of it."""

    def __init__(self, dtype: torch.dtype, folder: Path, seed: int) -> None:
        self.dtype, self.folder, self.chance = dtype, folder, Random(seed)
        self.inputs = normal(2, 2, 4, 4, seed=3).to(dtype)
        self.plain = base(dtype)
        self.model = adapted(base(dtype), "a", **ADAPTERS["a"], modules_to_save=[])
        self.changes: dict[str, dict[str, tuple[Tensor | None, Tensor | None]]] = {}
        self.active, self.merged, self.disabled = ["a"], list[str](), False
        self.note("a")

    # --- operations -------------------------------------------------------------------------------------------------

    def note(self, name: str) -> None:
        """Remember an adapter's dense changes, and save it."""
        self.changes[name] = {
            path: (
                None if path == "norm" else dense_change(layer, name),
                layer.fps_bias[name].detach().clone() if name in layer.fps_bias else None,
            )
            for path, layer in layers_of(self.model).items()
            if name in layer.fps_state
        }
        self.model.save_pretrained(self.folder, selected_adapters=[name])

    def some(self) -> list[str]:
        names = sorted(self.changes)
        return self.chance.sample(names, self.chance.randint(1, len(names)))

    def merge(self, names: list[str] | None, safe_merge: bool) -> None:
        self.model.merge_adapter(adapter_names=names, safe_merge=safe_merge)
        self.merged += [name for name in names or self.active if name not in self.merged]

    def merge_active(self) -> None:
        self.merge(None, False)

    def merge_some(self) -> None:
        self.merge(self.some(), False)

    def safe_merge(self) -> None:
        self.merge(self.some(), True)

    def safe_merge_of_a_broken_adapter(self) -> None:
        """Refused by name, and nothing is merged."""
        name = self.chance.choice(sorted(self.changes))
        if name in self.merged:
            return
        layer = self.chance.choice([held for held in layers_of(self.model).values() if name in held.fps_state])
        parameter = layer.adapter_parameters(name)[-1].data
        before = parameter.clone()
        parameter[-1] = torch.inf
        with pytest.raises(ValueError, match=rf"{layer.module_path}.*(NaN|finite)"):
            self.model.merge_adapter(adapter_names=[name], safe_merge=True)
        parameter.copy_(before)

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    def switch(self) -> None:
        self.activate(self.some())

    def activate(self, names: list[str]) -> None:
        self.model.set_adapter(names[0])
        if len(names) > 1:
            self.model.base_model.set_adapter(names)
        self.active, self.merged = names, []  # PEFT unmerges first

    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.disabled = True

    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    def disable_for_a_while(self) -> None:
        if self.disabled:
            return
        with self.model.disable_adapter():
            assert bits(self.result()) == bits(self.plain(self.inputs))

    def add(self) -> None:
        missing = sorted(ADAPTERS.keys() - self.changes.keys())
        if missing:
            name = self.chance.choice(missing)
            self.model.add_adapter(name, options(name))
            fill(self.model, name, seed=self.chance.randrange(1000))
            self.model.eval()
            self.merged = []  # PEFT sets the active adapters anew, and unmerges first
            self.note(name)

    def load(self) -> None:
        """As `add`, from the file of an adapter that was deleted."""
        for name in sorted(ADAPTERS.keys() - self.changes.keys()):
            if (self.folder / name).exists():
                self.model.load_adapter(self.folder / name, name)
                self.merged = []
                self.note(name)
                return

    def delete(self) -> None:
        if len(self.changes) == 1:
            return
        name = self.chance.choice(sorted(self.changes))
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            return
        if self.active == [name]:  # PEFT would choose another one for each layer
            self.activate([self.chance.choice(sorted(self.changes.keys() - {name}))])
        self.model.delete_adapter(name)
        self.active = [kept for kept in self.active if kept != name]
        del self.changes[name]
        if self.model.active_adapter == name:  # a PeftModel remembers one name alone
            self.activate(self.active)

    OPERATIONS = (
        *(merge_active, merge_some, merge_some, safe_merge, safe_merge_of_a_broken_adapter, unmerge, unmerge),
        *(switch, switch, disable, enable, enable, disable_for_a_while, add, add, load, delete),
    )

    # --- what is expected -------------------------------------------------------------------------------------------

    def result(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.inputs)

    def changed(self, plain: nn.Module, names: list[str], dtype: torch.dtype) -> nn.Module:
        """A plain model with the adapters' changes, added in `dtype`, one after the other."""
        with torch.no_grad():
            for name in names:
                for path, changes in self.changes[name].items():
                    module = plain.get_submodule(path)
                    for parameter, change in zip((module.weight, module.bias), changes, strict=True):
                        if change is not None:
                            parameter.copy_(parameter.to(dtype) + change.to(dtype))
        return plain

    def check(self) -> None:
        """Weights bit for bit, status, and the result."""
        merged = self.changed(deepcopy(self.plain), self.merged, torch.float32)
        weights = {path: bits(parameter) for path, parameter in merged.named_parameters()}
        assert base_bytes(self.model).items() <= weights.items()
        found = self.result()
        for layer in layers_of(self.model).values():
            assert layer.merged_adapters == [n for n in self.merged if layer.module_path in self.changes[n]]
            assert layer.active_adapters == self.active
        with torch.no_grad():
            if self.disabled:
                assert bits(found) == bits(self.plain(self.inputs))
            elif self.merged and all(layer.merged for layer in layers_of(self.model).values()):
                assert bits(found) == bits(merged(self.inputs))
            elif not self.merged:
                tolerance = 1e-5 if self.dtype == torch.float32 else 0.05
                together = self.changed(deepcopy(self.plain).double(), self.active, torch.float64)
                expected = together(self.inputs.double())
                assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)

    def check_fresh(self) -> None:
        """A model that has just loaded the same adapters gives the same bits."""
        if self.merged or self.disabled:
            return
        names = sorted(self.changes)
        fresh = PeftModel.from_pretrained(deepcopy(self.plain), self.folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            fresh.load_adapter(self.folder / name, name)
        fresh.base_model.set_adapter(self.active)
        with torch.no_grad():
            assert bits(fresh.eval()(self.inputs)) == bits(self.result())


@pytest.mark.filterwarnings("ignore::UserWarning")  # merging twice, unmerging nothing, losing digits in bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_thousand_operations(dtype: torch.dtype, tmp_path: Path) -> None:
    walk, done = Walk(dtype, tmp_path, seed=1), Counter[str]()
    for step in range(1000):
        operation = walk.chance.choice(Walk.OPERATIONS)
        operation(walk)
        done[operation.__name__] += 1
        try:
            walk.check()
            if step % 25 == 0:
                walk.check_fresh()
        except AssertionError as error:
            error.add_note(f"after step {step}, {operation.__name__}: {walk.active=} {walk.merged=} {walk.disabled=}")
            raise
    assert set(done) == {operation.__name__ for operation in Walk.OPERATIONS}
    walk.enable()
    walk.unmerge()
    origin = {path: bits(parameter) for path, parameter in walk.plain.named_parameters()}
    assert base_bytes(walk.model).items() <= origin.items()
    unloaded = walk.model.unload()
    assert {path: bits(parameter) for path, parameter in unloaded.named_parameters()} == origin
    with torch.no_grad():
        assert bits(unloaded(walk.inputs)) == bits(walk.plain(walk.inputs))
