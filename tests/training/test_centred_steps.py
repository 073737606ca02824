"""Steps with centred inputs, against models that are written with centred inputs and trained as they are."""

import copy
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import FPSCallback, FPSConfig
from peft_fps.training import CentredSteps, centre_steps
from tests.support.helpers import (
    adapted,
    bits,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    output,
    tiny_conv,
    tiny_mlp,
    tiny_vit,
)
from tests.training.trainers import dropping, trained_by, trained_state, trainer


BATCHES = [{"x": 1 + normal(8, 10, seed=seed)} for seed in range(3)]
IMAGES = [{"x": 1 + normal(2, 3, 8, 8, seed=seed)} for seed in range(3)]


CENTRED, NOTHING = "layers are trained with centred inputs", "nothing is trained with centred inputs"


def unfilled(base: nn.Module, **options: Any) -> Any:
    return adapted(base, filled=False, **{"per_neuron": 2, "bias": "all", "modules_to_save": []} | options)


class Centred(nn.Module):
    """A linear layer with a dense ΔW that sees x - E[a], and a mask of entries."""

    def __init__(self, layer: Any, means: Tensor) -> None:
        super().__init__()
        self.base, self.means = layer.base_layer, means
        self.delta = nn.Parameter(torch.zeros_like(self.base.weight))
        self.shift = nn.Parameter(torch.zeros_like(self.base.bias))
        counts = layer.fps_row_counts["default"].long()
        self.rows = torch.arange(len(counts)).repeat_interleave(counts)
        self.columns = layer.fps_columns["default"].long()

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.zeros_like(self.delta)
        chosen[self.rows, self.columns] = 1
        return self.base(x) + (x - self.means) @ (self.delta * chosen).t() + self.shift


def written_centred(model: Any, batches: list[dict[str, Tensor]]) -> nn.Module:
    """The base model with such layers, and the means of their inputs gathered by hand."""
    base, inputs = copy.deepcopy(model.get_base_model()), {}
    for path in layers_of(model):
        base.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: inputs.setdefault(path, []).append(args[0])
        )
    with torch.no_grad():
        for batch in batches:
            base(**batch)
    written = copy.deepcopy(model.get_base_model())
    for path, layer in layers_of(model).items():
        parent, _, name = path.rpartition(".")
        setattr(written.get_submodule(parent), name, Centred(layer, torch.cat(inputs[path]).mean(0)))
    return written


def centred(kind: Any = torch.optim.AdamW, lr: float = 0.03, **options: Any) -> tuple[Any, Any, CentredSteps]:
    """A model, its optimizer, and the steps of this one, which are centred."""
    model = unfilled(tiny_mlp(), **options)
    optimizer = kind(trained_by(model), lr=lr)
    return model, optimizer, centre_steps(model, optimizer, BATCHES)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (model(1 + normal(8, 10, seed=100 + step)) - normal(8, 4, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.Adagrad, {})],
)
def test_steps_are_those_of_a_model_with_centred_inputs(kind: Any, options: dict[str, Any]) -> None:
    model = unfilled(tiny_mlp())
    reference = written_centred(model, BATCHES)
    optimizers = []
    for each, entries, biases in ((model, "fps_values", "fps_bias"), (reference, "delta", "shift")):
        parts = [[p for name, p in each.named_parameters() if part in name] for part in (entries, biases)]
        groups = [{"params": parts[0]} | options, {"params": parts[1]}]
        optimizers.append(kind(groups, lr=0.03, **({"weight_decay": 0.0} if kind is torch.optim.AdamW else {})))
    optimizer, others = optimizers
    steps = centre_steps(model, optimizer, BATCHES)
    assert (len(steps.layers), steps.left_out) == (2, {})
    train(model, optimizer)
    train(reference, others)
    x = normal(6, 10, seed=50)
    torch.testing.assert_close(model(x), reference(x))
    uncentred = unfilled(tiny_mlp())
    train(uncentred, kind(trained_by(uncentred), lr=0.03))
    assert not torch.allclose(model(x), uncentred(x), atol=1e-2)


def test_means_of_convolutions_are_those_of_their_patches() -> None:
    model = unfilled(tiny_conv())
    steps = centre_steps(model, torch.optim.SGD(trained_by(model), lr=1.0), IMAGES)
    path, centred = next(iter(steps.layers.items()))
    layer = layers_of(model)[path]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in IMAGES:
            model(**batch)
    convolution = layer.base_layer
    geometry = convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride
    patches = nn.functional.unfold(torch.cat(seen), *geometry)
    means = patches.mean((0, 2)).view(convolution.groups, -1)
    groups = centred.structure.rows.long() // (layer.neurons // convolution.groups)
    torch.testing.assert_close(centred.means, means[groups, layer.fps_columns["default"].long()])


def test_between_steps_the_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    model, optimizer, _ = centred()
    train(model, optimizer)
    x = normal(6, 10)
    found = model.eval()(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_mlp(), tmp_path)
    assert bits(loaded(x)) == bits(found)
    torch.testing.assert_close(model.merge_and_unload()(x), found)


def test_removed_hooks_leave_the_optimizer_as_it_was() -> None:
    first, optimizer, steps = centred()
    steps.remove()
    train(first, optimizer)
    second = unfilled(tiny_mlp())
    train(second, torch.optim.AdamW(trained_by(second), lr=0.03))
    assert bits(first(normal(6, 10))) == bits(second(normal(6, 10)))


def test_what_is_not_centred_is_named() -> None:
    model = unfilled(tiny_vit(layers=1))
    data = image_batches()
    steps = centre_steps(model, torch.optim.SGD(trained_by(model), lr=0.1), data)
    keys = [path for path in layers_of(model) if path.endswith("k_proj")]
    assert steps.left_out == dict.fromkeys(keys, "no bias delta")
    assert str(steps) == f"{len(layers_of(model)) - 1} {CENTRED}; 1 not (no bias delta)"
    layers_of(model)[keys[0].replace("k_proj", "v_proj")].fps_bias["default"].requires_grad_(False)
    again = centre_steps(model, torch.optim.SGD(trained_by(model), lr=0.1), data)
    assert again.left_out == {keys[0]: "no bias delta", keys[0].replace("k_proj", "v_proj"): "frozen"}


def test_a_second_adapter_is_not_touched() -> None:
    model = unfilled(tiny_mlp())
    model.add_adapter("second", FPSConfig(per_neuron=1, importance="magnitude", modules_to_save=[]))
    fill(model, "second")
    before = {name: bits(p) for name, p in model.named_parameters() if ".second" in name}
    optimizer = torch.optim.SGD(trained_by(model), lr=0.1)
    centre_steps(model, optimizer, BATCHES)
    train(model, optimizer)
    assert {name: bits(p) for name, p in model.named_parameters() if ".second" in name} == before


def test_a_step_without_gradients_changes_nothing() -> None:
    model, optimizer, _ = centred()
    before = bits(model(normal(6, 10)))
    optimizer.step()
    assert bits(model(normal(6, 10))) == before


def test_an_optimizer_of_accelerate_and_a_copy_of_it() -> None:
    model, (plain, optimizer, _) = unfilled(tiny_mlp()), centred()
    wrapped = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(trained_by(model), lr=0.03))
    centre_steps(model, wrapped, BATCHES)
    train(model, wrapped)
    train(plain, optimizer)
    assert bits(model(normal(6, 10))) == bits(plain(normal(6, 10)))
    pickle.dumps(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bias": "none"}, r"\(no bias delta\), expected some with entries"), ({"per_neuron": 0}, r"\(no entries\)")],
)
def test_an_adapter_without_the_two_kinds_is_refused(options: dict[str, Any], said: str) -> None:
    model = unfilled(tiny_mlp(), **options)
    optimizer = torch.optim.SGD(trained_by(model), lr=0.1)
    with pytest.raises(ValueError, match=rf"adapter 'default': no layer can be centred {said}"):
        centre_steps(model, optimizer, BATCHES)
    assert not optimizer._optimizer_step_pre_hooks


def test_misuse_is_refused() -> None:
    model = unfilled(tiny_mlp())
    optimizer = torch.optim.SGD(trained_by(model), lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a str, expected a torch.optim.Optimizer"):
        centre_steps(model, "adamw", BATCHES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first: its input holds NaN or infinity in calibration batch 0"):
        centre_steps(model, optimizer, [{"x": normal(2, 10) * torch.nan}])
    assert not optimizer._optimizer_step_pre_hooks
    centre_steps(model, optimizer, BATCHES)
    with pytest.raises(ValueError, match="SGD.step got a closure, which computes gradients anew"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"first: steps of adapter 'default' are centred already, .* Call remove\(\)"):
        centre_steps(model, optimizer, BATCHES)


def test_entries_that_were_chosen_anew_are_noticed_and_the_same_ones_are_not() -> None:
    model, optimizer, steps = centred(torch.optim.SGD, 0.1, importance="random")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    train(model, optimizer, 1)
    model.peft_config["default"].seed = 1
    model.calibrate(discard_values=True, progress=False)
    with pytest.raises(ValueError, match=r"first: adapter 'default' has other entries, .* call remove\(\) and centre"):
        train(model, optimizer, 1)
    steps.remove()
    assert len(centre_steps(model, optimizer, BATCHES).layers) == 2
    train(model, optimizer, 1)


def test_another_optimizers_parameters_are_left_alone() -> None:
    model = unfilled(tiny_mlp())
    first, last = (layers_of(model)[name] for name in ("first", "last"))
    optimizer = torch.optim.SGD([*first.fps_values.parameters(), *first.fps_bias.parameters()], lr=0.1)
    assert centre_steps(model, optimizer, BATCHES).left_out == {"last": "not in the optimizer"}
    before = bits(last.fps_bias["default"])
    train(model, optimizer, 2)
    assert bits(last.fps_bias["default"]) == before
    with pytest.raises(ValueError, match=r"no layer can be centred \(not in the optimizer\)"):
        centre_steps(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), BATCHES)


# --- in a Trainer ---------------------------------------------------------------------------------------------------


def calibrating() -> Any:
    return get_peft_model(dropping(tiny_vit(layers=1)), FPSConfig(per_neuron=2))


def test_a_callback_centres_after_it_has_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_callback, by_hand, plain = calibrating(), calibrating(), calibrating()
    callback = FPSCallback()
    assert callback.centring == ""
    with caplog.at_level("INFO", "peft_fps"):
        made = trainer(by_callback, tmp_path, [callback])
        made.train()
    assert callback.centring == f"{len(layers_of(by_callback)) - 1} {CENTRED}; 1 not (no bias delta)"
    assert callback.centring in caplog.text
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks

    for model in (by_hand, plain):
        trainer(model, tmp_path, [FPSCallback(centred=False)], max_steps=1, learning_rate=0.0).train()
    data = list(made.get_train_dataloader())
    other = trainer(by_hand, tmp_path)  # which seeds order and dropout
    other.create_optimizer()
    steps: CentredSteps = centre_steps(by_hand, other.optimizer, data)
    assert len(steps.layers) == len(layers_of(by_hand)) - 1
    other.train()
    trainer(plain, tmp_path).train()
    found, expected, uncentred = (output(model.eval(), images(4)) for model in (by_callback, by_hand, plain))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, uncentred, atol=1e-4)


def test_a_callback_that_need_not_centre_trains_as_always_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [FPSCallback(), FPSCallback(centred=False)]
    models = [get_peft_model(tiny_vit(layers=1), FPSConfig(per_neuron=2, bias="none")) for _ in callbacks]
    with caplog.at_level("INFO", "peft_fps"):
        for model, callback in zip(models, callbacks, strict=True):
            trainer(model, tmp_path, [callback]).train()
    reason = f"{NOTHING}: no bias delta"
    assert callbacks[0].centring == reason
    assert caplog.text.count(reason) == 1
    assert callbacks[1].centring == ""
    assert trained_state(models[0]) == trained_state(models[1])


class Averaging(torch.optim.SGD):
    """As a library that keeps averages of parameters has it."""


class WithoutParameters(torch.optim.SGD):
    """As optimizers that step within the backward pass have it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups = [{"lr": 0.1}]


def test_optimizers_that_may_keep_copies_of_parameters_are_centred_on_demand_alone(tmp_path: Path) -> None:
    for centred, expected in ((None, f"{NOTHING}: Averaging may keep copies or averages"), (True, CENTRED)):
        model, callback = calibrating(), FPSCallback(centred=centred)
        made = trainer(model, tmp_path, [callback], max_steps=1)
        made.optimizer = Averaging(trained_by(model), lr=0.1)
        made.train()
        assert expected in callback.centring
    optimizer = WithoutParameters(trained_by(model))
    with pytest.raises(ValueError, match=r"no layer can be centred \(no bias delta, not in the optimizer\)"):
        centre_steps(model, optimizer, BATCHES)


@pytest.mark.parametrize(("given", "expected"), [(None, 8), (2, 2), (100, 8)])
def test_a_callback_takes_the_means_over_no_more_batches_than_it_calibrates_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    watched = Mock(wraps=centre_steps)
    monkeypatch.setattr("peft_fps.training.callback.centre_steps", watched)
    trainer(calibrating(), tmp_path, [FPSCallback(num_batches=given)], max_steps=1).train()
    assert [call.kwargs["num_batches"] for call in watched.call_args_list] == [expected]


def test_a_callback_that_cannot_centre_says_so_before_it_calibrates(tmp_path: Path) -> None:
    model = get_peft_model(tiny_vit(layers=1), FPSConfig(per_neuron=2, bias="none"))
    with pytest.raises(ValueError, match=r"no layer can be centred \(no bias delta\)"):
        trainer(model, tmp_path, [FPSCallback(centred=True)]).train()
    assert not any(layer.fps_state["default"].selected for layer in layers_of(model).values())


def test_a_resumed_training_goes_on_as_one_without_interruption(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = calibrating()
        trainer(model, tmp_path, [FPSCallback(centred=True)], **saving).train(resume_from_checkpoint=checkpoint)
        states.append(trained_state(model))
    assert states[0] == states[1]
