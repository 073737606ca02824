"""What a callback does of its own accord where centring is not possible, or would change more than the steps."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from peft_fps import FPSCallback, FPSConfig
from peft_fps.training import centre_steps
from peft_fps.training.centring_choice import reason_against
from tests.support.helpers import adapted, normal, tiny_mlp, tiny_vit
from tests.support.language_models import tiny_masked
from tests.training.trainers import EXAMPLES, arguments, noted, trained_by, trained_state, trainer


NOTHING = "nothing is trained with centred inputs: "


def chosen(base: nn.Module, **options: Any) -> Any:
    """An adapter that needs no calibration, so that a callback reads data for the means alone."""
    return get_peft_model(base, FPSConfig(**{"per_neuron": 2, "importance": "magnitude"} | options))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained_by(model), lr=0.1)


def hooks(optimizer: Any) -> int:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


class Half(nn.Module):
    """The layer that has a bias is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.unreached = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.reached(x).square().mean()}


class Lengths(nn.Module):
    """Raises something of its own in evaluation, in which it gives no loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.layer(x)
        if not self.training:
            raise KeyError("boxes")
        return {"loss": found.square().mean()}


ROWS = [{"x": normal(6, seed=seed)} for seed in range(12)]


def run_on_rows(model: Any, folder: Path, callback: FPSCallback) -> Trainer:
    options = arguments(folder, max_steps=2, remove_unused_columns=False, label_names=[])
    made = Trainer(model, options, train_dataset=ROWS, data_collator=default_data_collator, callbacks=[callback])
    made.train()
    return made


@pytest.mark.filterwarnings("ignore:No data reached:UserWarning", "ignore:.*unreached.*:UserWarning")
def test_layers_with_biases_that_no_data_reaches_end_nothing(tmp_path: Path) -> None:
    callback = FPSCallback()
    model = get_peft_model(Half(), FPSConfig(per_neuron=2, target_modules="all-linear"))
    made = run_on_rows(model, tmp_path, callback)
    assert callback.centring.startswith(f"{NOTHING}their mean inputs could not be taken: adapter 'default': no layer")
    assert made.state.global_step == 2


def test_a_model_that_cannot_be_run_for_the_means_is_trained_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [FPSCallback(), FPSCallback(centred=False)]
    models = [chosen(Lengths(), target_modules=["layer"]) for _ in callbacks]
    for model, callback in zip(models, callbacks, strict=True):
        made = run_on_rows(model, tmp_path, callback)
        assert hooks(made.optimizer) == 0
    assert callbacks[0].centring == f"{NOTHING}their mean inputs could not be taken: 'boxes'"
    assert "FPSCallback could not take the mean inputs: 'boxes'" in caplog.text
    assert trained_state(models[0]) == trained_state(models[1])
    with pytest.raises(KeyError, match="boxes"):
        run_on_rows(chosen(Lengths(), target_modules=["layer"]), tmp_path, FPSCallback(centred=True))


def test_too_little_memory_is_raised_for_the_trainer_to_take_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("peft_fps.training.callback.centre_steps", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer(chosen(tiny_vit(layers=1)), tmp_path, [FPSCallback()]).train()


class Once(IterableDataset[Any]):
    def __init__(self) -> None:
        self.rest = iter(EXAMPLES)

    def __iter__(self) -> Iterator[Any]:
        return self.rest


class Shuffled(IterableDataset[Any]):
    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.random.sample(EXAMPLES, len(EXAMPLES)))


@pytest.mark.parametrize("stream", [Once, Shuffled])
def test_streams_of_ones_own_are_read_by_the_training_alone(
    stream: type[IterableDataset[Any]], tmp_path: Path
) -> None:
    states = []
    for callback in (FPSCallback(), FPSCallback(centred=False)):
        model = chosen(tiny_vit(layers=1))
        Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=stream(), callbacks=[callback]).train()
        states.append(trained_state(model))
        assert ("is a stream" in callback.centring) == (callback.centred is None)
    assert states[0] == states[1]


def test_streams_of_datasets_start_anew(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_list(ROWS).with_format("torch").to_iterable_dataset()
    callback, model = FPSCallback(), chosen(tiny_vit(layers=1))
    assert reason_against(model, sgd(model), "default", torch.utils.data.DataLoader(stream, batch_size=2)) == ""
    assert callback.centring == ""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizers_of_torch_are_known(kind: Any) -> None:
    model = chosen(tiny_vit(layers=1))
    assert reason_against(model, kind(trained_by(model), lr=0.1), "default", None) == ""


def test_transposed_convolutions_are_left_out() -> None:
    model = adapted(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1)), filled=False, per_neuron=2,
                    target_modules=["0", "1"], modules_to_save=[])  # fmt: skip
    steps = centre_steps(model, sgd(model), [{"input": normal(2, 3, 6, 6)}])
    assert steps.left_out == {"0": "transposed convolution"}


def test_data_that_reach_no_layer_are_an_error() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, use: bool = False) -> Tensor:
            return self.last(self.first(x)) if use else x

    model = adapted(Switched(), filled=False, per_neuron=2, modules_to_save=[], target_modules="all-linear")
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"no layer can be centred \(no data reached it\)"):
        centre_steps(model, optimizer, [{"x": normal(2, 6)}])
    assert hooks(optimizer) == 0


def test_a_resumed_training_takes_the_same_means_where_a_module_inside_is_trained_whole(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.05}
    options = {"modules_to_save": ["classifier", "layernorm_before"]}
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = chosen(tiny_vit(layers=1), **options)
        trainer(model, tmp_path, [FPSCallback()], **saving).train(resume_from_checkpoint=checkpoint)
        states.append(trained_state(model))
    assert states[0] == states[1]


class Interrupting(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("next_one", [FPSCallback(), FPSCallback(centred=False), FPSCallback(centred=True)])
def test_an_interrupted_training_leaves_nothing_to_the_next(next_one: FPSCallback, tmp_path: Path) -> None:
    first, interrupting = FPSCallback(), Interrupting()
    made = trainer(chosen(tiny_vit(layers=1)), tmp_path, [first, interrupting], max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert hooks(made.optimizer) == 2
    made.remove_callback(first)
    made.remove_callback(interrupting)
    seen: list[int] = []

    class Watching(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(hooks(made.optimizer))

    made.add_callback(next_one)
    made.add_callback(Watching())
    made.train()
    assert seen == [0 if next_one.centred is False else 2] * 2
    assert hooks(made.optimizer) == 0
    assert NOTHING not in next_one.centring


def test_steps_that_the_user_centres_stay(tmp_path: Path) -> None:
    model, callback = chosen(tiny_vit(layers=1)), FPSCallback()
    made = trainer(model, tmp_path, [callback], max_steps=1)
    made.create_optimizer()
    steps = centre_steps(model, made.optimizer, list(made.get_train_dataloader()))
    made.train()
    assert callback.centring == f"{NOTHING}the optimizer's steps are centred already"
    assert hooks(made.optimizer) == 2
    steps.remove()


def test_a_seeded_collator_masks_the_same_words(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(40))]))
    rows = [{"input_ids": [2, *range(5 + first, 25 + first), 3]} for first in range(8)]
    seen: list[list[Tensor]] = []
    for callback in (FPSCallback(), FPSCallback(centred=False)):
        collator = DataCollatorForLanguageModeling(BertTokenizerFast(str(vocabulary)), seed=3)
        options = arguments(tmp_path, max_steps=3, per_device_train_batch_size=2)
        made = Trainer(
            chosen(tiny_masked()), options, train_dataset=rows, data_collator=collator, callbacks=[callback]
        )
        seen.append(noted(made, "labels"))
        made.train()
    assert len(seen[0]) == 3
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


class Noisy(torch.utils.data.Dataset[Any]):
    """Draws from torch's generator of the worker process."""

    def __len__(self) -> int:
        return len(EXAMPLES)

    def __getitem__(self, row: int) -> Any:
        example = EXAMPLES[row]
        return example | {"pixel_values": example["pixel_values"] + torch.rand(1)}


def test_persistent_workers_draw_as_before(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    for callback in (FPSCallback(), FPSCallback(centred=False)):
        model = chosen(tiny_vit(layers=1), bias="all", target_modules=["fc1"])
        options = arguments(tmp_path, max_steps=2, dataloader_num_workers=1, dataloader_persistent_workers=True)
        made = Trainer(model, options, train_dataset=Noisy(), callbacks=[callback])
        seen.append(noted(made, "pixel_values"))
        made.train()
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_an_mlp_without_a_trainer_is_told_of_no_optimizer() -> None:
    assert reason_against(chosen(tiny_mlp()), None, "default", None).startswith("optimizer is a NoneType")
