"""What a training names that it has not trained, and what it refuses to train."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from peft_fps import FPSCallback
from peft_fps.training.untrained_modules import UntrainedModules
from tests.support.helpers import adapted, base_bytes, tiny_vit
from tests.training.trainers import arguments, trainer


class Chooses(nn.Module):
    """Goes on with the largest outputs of `gate`, as sparse attention does with the keys that an indexer scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.rare, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += self.training
        x = self.first(x)
        x = x.gather(-1, self.gate(x).topk(2).indices.sort().values.repeat(1, 2))
        if self.calls == 2:  # an expert that one batch alone has a token for
            x = self.rare(x)
        x = self.last(x)
        return {"loss": (x.sum(-1) - labels).square().mean(), "logits": x}


EXAMPLES = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i)), "labels": float(i)} for i in range(12)]


def run(model: nn.Module, folder: Path, callback: FPSCallback, **options: Any) -> None:
    settings = arguments(folder, **options)
    Trainer(model, settings, train_dataset=EXAMPLES, callbacks=[callback]).train()


def choosing(**options: Any) -> Any:
    return adapted(Chooses(), filled=False, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_modules_that_get_no_gradient_in_any_step_are_named_at_the_end(accumulation: int, tmp_path: Path) -> None:
    model, callback = choosing(), FPSCallback(centred=False)
    named = r"^1 of 4 modules of adapter 'default' got no gradient in all 3 steps.*: gate\. .*exclude_modules"
    for _ in range(2):  # a callback serves several trainings
        model.base_model.model.calls = 0
        with pytest.warns(UserWarning, match=named) as caught:
            run(model, tmp_path, callback, max_steps=3, gradient_accumulation_steps=accumulation)
        assert len(caught) == 1


def test_what_one_step_has_trained_is_not_named(tmp_path: Path) -> None:
    """An expert has no token in the first step; the count of steps says how much its missing gradient tells."""
    with pytest.warns(UserWarning, match=r"^2 of 4 .* no gradient in the one step of.*: gate, rare\. .*no token"):
        run(choosing(), tmp_path, FPSCallback(centred=False), max_steps=1)
    run(choosing(exclude_modules=["gate"]), tmp_path, FPSCallback(centred=False), max_steps=2)


def test_frozen_parameters_and_other_adapters_are_not_named(tmp_path: Path) -> None:
    model = choosing(exclude_modules=["gate", "rare"])
    model.add_adapter("other", model.peft_config["default"].__class__(per_neuron=2, importance="magnitude"))
    run(model, tmp_path, FPSCallback(centred=False), max_steps=2)
    model = choosing(exclude_modules=["rare"])
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.requires_grad_(False)
    run(model, tmp_path, FPSCallback(centred=False), max_steps=2)


def looked_at(model: nn.Module, trained_by: Any, steps: int = 2) -> UntrainedModules:
    watch = UntrainedModules(model, "default", trained_by)
    for _ in range(steps):
        watch.look()
    return watch


def test_gradients_that_something_else_holds_are_not_missed() -> None:
    """Engines take gradients out of the parameters, and so do optimizers that step during backward."""
    model = choosing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_at(model, None).warn()
        model(**{"x": torch.ones(3, 4), "labels": torch.ones(3)})["loss"].backward()
        for engine in ("is_deepspeed_enabled", "is_fsdp_enabled"):
            held = SimpleNamespace(**{"is_deepspeed_enabled": False, "is_fsdp_enabled": False} | {engine: True})
            looked_at(model, held).warn()
        looked_at(model, None, steps=0).warn()
    with pytest.warns(UserWarning, match=r"2 of 4 .* all 2 steps.*: gate, rare\."):
        looked_at(model, None).warn()


def test_many_modules_are_counted() -> None:
    torch.manual_seed(0)
    model = adapted(nn.ModuleList(nn.Linear(3, 3) for _ in range(30)))
    model.base_model.model[0](torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"^29 of 30 modules.*: 1, 2, .*, 20 and 9 more\. "):
        looked_at(model, None).warn()


def test_once_every_module_has_got_a_gradient_no_parameter_is_looked_at() -> None:
    model, looks = adapted(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), []

    class Watched:
        requires_grad = True

        def numel(self) -> int:
            return 1

        @property
        def grad(self) -> None:
            looks.append(None)
            return None

    watch = UntrainedModules(model, "default")
    model(torch.ones(1, 3)).sum().backward()
    watch._waiting["0"] = [Watched(), *watch._waiting["0"]]  # type: ignore[list-item]
    watch.look()
    assert len(looks) == 1
    watch.look()
    assert len(looks) == 1


def test_a_merged_adapter_is_not_trained(tmp_path: Path) -> None:
    """Its layers compute with the base weight alone: the head would be trained, and nothing else."""
    model = adapted(tiny_vit(layers=1))
    before = base_bytes(model)
    model.merge_adapter()
    merged = base_bytes(model)
    with pytest.raises(ValueError, match=r": 'default' is merged, expected.*model\.unmerge_adapter"):
        trainer(model, tmp_path, [FPSCallback()], max_steps=1).train()
    assert base_bytes(model) == merged
    model.unmerge_adapter()
    trainer(model, tmp_path, [FPSCallback()], max_steps=1).train()
    assert base_bytes(model) == before


class Zeroed(nn.Module):
    """Multiplies what `dead` gives by zero, so that it gets a gradient of zeros in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dead, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        x = self.last(x + 0 * self.dead(x))
        return {"loss": (x.sum(-1) - labels).square().mean(), "logits": x}


def test_modules_whose_gradients_are_all_zero_are_named(tmp_path: Path) -> None:
    model = adapted(Zeroed(), filled=False)
    with pytest.warns(
        UserWarning, match=r"^1 of 3 modules .* in all 2 steps of this training, or only zeros, .*: dead\."
    ):
        run(model, tmp_path, FPSCallback(centred=False), max_steps=2)
