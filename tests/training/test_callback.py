"""`FPSCallback`: calibration as the first thing a Trainer run does, and nothing else is different for it."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, default_data_collator
from transformers.training_args import ParallelMode

from peft_fps import FPSCallback, FPSConfig, Selection
from peft_fps.training import callback as module
from tests.calibration.naive_fps import Rows, selection_of
from tests.support.helpers import adapted, images, layers_of, tiny_vit
from tests.training.trainers import EXAMPLES, arguments, dropping, trained_state, trainer


BATCHES = [{"pixel_values": torch.stack([e["pixel_values"] for e in EXAMPLES[i : i + 4]])} for i in (0, 4, 8)]
FOURS: dict[str, Any] = {"collator": default_data_collator, "batch_size": 4}


small_vit = partial(tiny_vit, layers=1)


def uncalibrated(**options: Any) -> PeftModel:
    return get_peft_model(dropping(small_vit()), FPSConfig(**{"per_neuron": 2, **options}))


def selected_by_hand(data: Any = BATCHES, config: dict[str, Any] | None = None, **options: Any) -> dict[str, Rows]:
    """What a calibration without a Trainer selects."""
    model = uncalibrated(**(config or {}))
    model.calibrate(data, progress=False, **options)
    return selection_of(model)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every calibration that a callback starts."""
    found: list[dict[str, Any]] = []
    calibrate: Callable[..., Any] = module.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(module, "calibrate", counted)
    return found


def seen_in_training(model: PeftModel) -> list[float]:
    """Starts a list of a number per training batch that tells which examples it held, in order."""
    seen: list[float] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.get_base_model().training:  # not where a calibration runs it
            weights = torch.arange(1.0, kwargs["pixel_values"].shape[0] + 1)
            seen.append(float(kwargs["pixel_values"].sum((1, 2, 3)) @ weights))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def trained_as_by_hand(folder: Path, callback: FPSCallback, config: dict[str, Any], **options: Any) -> PeftModel:
    """A model that was trained with the callback, which has the bits of one that was calibrated by hand before."""
    by_hand, by_callback = uncalibrated(**config), uncalibrated(**config)
    first = trainer(by_callback, folder, [callback], **options)
    again, data = seen_in_training(by_callback), first.get_train_dataloader()
    expected = seen_in_training(by_hand)
    first.train()

    by_hand.calibrate(data, num_batches=callback.num_batches, progress=False)
    trainer(by_hand, folder, **options).train()

    assert selection_of(by_callback) == selection_of(by_hand)
    assert again == expected
    assert again
    assert trained_state(by_callback) == trained_state(by_hand)
    return by_callback


OPTIONS: dict[str, dict[str, Any]] = {
    "one epoch": {"max_steps": 3},
    "several epochs": {"max_steps": 7},
    "accumulation": {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "last batch dropped": {"max_steps": 4, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    "own data seed": {"max_steps": 4, "data_seed": 5},
    "sequential": {"max_steps": 4, "train_sampling_strategy": "sequential"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("granularity", ["neuron", "model"])
def test_equals_calibration_by_hand(granularity: str, options: str, tmp_path: Path) -> None:
    """Bit for bit: order of the data and dropout are those of a run without the callback."""
    trained_as_by_hand(tmp_path, FPSCallback(centred=False), {"granularity": granularity}, **OPTIONS[options])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_some_batches_only(accumulation: int, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    """A loader that was left in the middle starts anew, and accumulates as before."""
    callback = FPSCallback(num_batches=1, centred=False)
    model = trained_as_by_hand(tmp_path, callback, {}, max_steps=4, gradient_accumulation_steps=accumulation)
    assert [call["num_batches"] for call in calls] == [1]
    assert "4 examples" in str(model.selection_report())


@pytest.mark.parametrize("accumulators", ["device", "cpu"])
@pytest.mark.parametrize("importance", ["gradient", "sensitivity"])
def test_backward_passes_equal_those_by_hand(importance: str, accumulators: Any, tmp_path: Path) -> None:
    """Labels come with the Trainer's batches; the selection and all training are those of a run by hand."""
    callback = FPSCallback(accumulators=accumulators, centred=False)
    model = trained_as_by_hand(tmp_path, callback, {"importance": importance})
    assert "gradients| over 12 examples" in model.selection_report().method


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_samplers_with_generators_of_their_own_draw_as_before(importance: str, tmp_path: Path) -> None:
    class Shuffling(Trainer):
        def _get_train_sampler(self, *_: Any) -> RandomSampler:
            return RandomSampler(EXAMPLES, generator=torch.Generator().manual_seed(3))  # goes on with every epoch

    runs = []
    for selection in (None, "applied"):
        model = uncalibrated(importance=importance)
        if selection is not None:
            Selection.of(runs[0]).apply(model)
        options = arguments(tmp_path, accelerator_config={"use_seedable_sampler": False})
        Shuffling(model, options, train_dataset=EXAMPLES, callbacks=[FPSCallback()]).train()
        runs.append(model)
    assert trained_state(runs[0]) == trained_state(runs[1])


def test_the_trainer_runs_batches_that_the_model_does_not_take(tmp_path: Path) -> None:
    """As in training: with what it makes of them, which is kept from what it has counted."""

    class Renaming(Trainer):
        steps = 0

        def _prepare_inputs(self, inputs: Any) -> Any:
            return {"images": inputs["picture"], "labels": inputs["answer"]}

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return model(pixel_values=inputs["images"], labels=inputs["labels"]).loss

    examples = [{"picture": e["pixel_values"], "answer": e["labels"]} for e in EXAMPLES]
    for importance in ("activation", "gradient"):
        model = uncalibrated(importance=importance)
        options = arguments(tmp_path, max_steps=3, remove_unused_columns=False)
        run = Renaming(model, options, train_dataset=examples, callbacks=[FPSCallback()])
        run.train()
        assert run.steps == 3
        assert selection_of(model) == selected_by_hand(EXAMPLES, {"importance": importance}, **FOURS)
        assert "12 examples" in str(model.selection_report())


def test_label_smoothing_is_part_of_the_loss(tmp_path: Path) -> None:
    def smoothed(outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.5)

    model = uncalibrated(importance="gradient")
    trainer(model, tmp_path, [FPSCallback()], label_smoothing_factor=0.5).train()
    assert selection_of(model) == selected_by_hand(EXAMPLES, {"importance": "gradient"}, loss=smoothed, **FOURS)


def test_a_run_of_ones_own_comes_before_the_trainers(tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    def run(model: nn.Module, batch: Any) -> Any:
        seen.append(model)
        return model(pixel_values=batch["pixel_values"].flip(3))

    model = uncalibrated()
    trainer(model, tmp_path, [FPSCallback(run=run)]).train()
    assert seen == [model.get_base_model()] * (3 + 3)  # to calibrate, and for the means
    assert selection_of(model) == selected_by_hand([{"pixel_values": b["pixel_values"].flip(3)} for b in BATCHES])


def test_called_by_something_else_it_passes_batches_to_the_model(tmp_path: Path) -> None:
    model = uncalibrated()
    own = trainer(uncalibrated(), tmp_path)
    FPSCallback().on_train_begin(own.args, own.state, own.control, model=model, train_dataloader=BATCHES)
    assert selection_of(model) == selected_by_hand()


def test_once_before_the_first_step_on_all_training_data(
    tmp_path: Path, calls: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """And the report is logged."""

    class Watch(TrainerCallback):
        found: dict[str, Rows] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = self.found or selection_of(kwargs["model"])

    watch, model = Watch(), uncalibrated()
    run = trainer(model, tmp_path, [FPSCallback(), watch], max_steps=8)
    with caplog.at_level("INFO", logger="peft_fps"):
        run.train()
    run.train()
    assert len(calls) == 1
    assert "12 examples" in str(model.selection_report())
    assert "12 examples" in caplog.text
    assert watch.found == selection_of(model) == selected_by_hand()


@pytest.mark.parametrize("state", ["calibrated", "loaded", "trained", "by magnitude"])
def test_an_adapter_that_has_its_selection_keeps_it(state: str, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    model = uncalibrated()
    if state == "by magnitude":
        model = adapted(small_vit(), filled=False)
    else:
        model.calibrate([{"pixel_values": images(seed=77)}], progress=False)
    if state == "trained":
        trainer(model, tmp_path).train()
    if state == "loaded":
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(small_vit(), tmp_path / "adapter", is_trainable=True)
    before = selection_of(model)
    trainer(model, tmp_path, [FPSCallback()]).train()
    assert calls == []
    assert selection_of(model) == before


def test_resuming_keeps_the_selection(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, again = uncalibrated(granularity="model"), uncalibrated(granularity="model")
    trainer(model, tmp_path, [FPSCallback()], **options).train()
    trainer(again, tmp_path, [FPSCallback()], **options).train(resume_from_checkpoint=True)
    assert len(calls) == 1
    assert selection_of(again) == selection_of(model)


def test_one_callback_for_several_runs(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    shared = FPSCallback()
    for _ in range(2):
        trainer(uncalibrated(), tmp_path, [shared]).train()
    assert len(calls) == 2


def test_the_active_adapter_is_calibrated(tmp_path: Path) -> None:
    model = uncalibrated()
    model.add_adapter("other", FPSConfig(per_neuron=1, target_modules=["fc2"]))
    before = selection_of(model)
    model.set_adapter("other")
    trainer(model, tmp_path, [FPSCallback()]).train()
    assert selection_of(model) == before
    assert "12 examples" in str(model.selection_report("other"))
    assert "until calibrated" in str(model.selection_report("default"))


def test_a_model_without_an_adapter_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no active FPS adapter"):
        trainer(small_vit(), tmp_path, [FPSCallback()]).train()


def test_bad_calibration_data_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    bad = [*EXAMPLES[:8], {"pixel_values": torch.full((3, 16, 16), float("nan")), "labels": 0}]
    model = uncalibrated()
    before = trained_state(model)
    with pytest.raises(ValueError, match=r"vit\..*NaN or infinity in calibration batch"):
        Trainer(model, arguments(tmp_path), train_dataset=bad, callbacks=[FPSCallback()]).train()
    assert trained_state(model) == before


@pytest.mark.parametrize(
    ("progress", "disable_tqdm", "shown"),
    [(None, True, False), (None, False, True), (False, False, False), (True, True, True)],
)
def test_the_progress_bar_follows_the_trainer(
    progress: bool | None,
    disable_tqdm: bool,
    shown: bool,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(uncalibrated(), tmp_path, [FPSCallback(progress=progress)], disable_tqdm=disable_tqdm, max_steps=1).train()
    assert [call["progress"] for call in calls] == [shown]
    assert ("Calibrating" in capsys.readouterr().err) == shown


def test_values_of_the_optimizer_are_the_calibrated_ones(tmp_path: Path) -> None:
    """The optimizer exists before the sizes are known where these depend on the calibration."""
    model = uncalibrated(granularity="model")
    sizes = [layer.fps_values["default"].numel() for layer in layers_of(model).values()]
    run = trainer(model, tmp_path, [FPSCallback()])
    run.train()
    assert [layer.fps_values["default"].numel() for layer in layers_of(model).values()] != sizes
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    for layer in layers_of(model).values():
        values: Tensor = layer.fps_values["default"]
        assert id(values) in held
        if values.numel():
            assert run.optimizer.state[values]["exp_avg"].shape == values.shape
            assert bool(values.any())


def test_options_are_passed_on(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return outputs.logits.square().mean()

    def views(batch: Tensor) -> Tensor:
        return torch.cat([batch, batch.flip(3)])

    options: dict[str, Any] = {"loss": loss, "views": views, "accumulators": "cpu", "training_mode": True}
    trainer(uncalibrated(importance="gradient"), tmp_path, [FPSCallback(2, **options)], max_steps=1).train()
    assert {name: calls[0][name] for name in options} == options
    assert calls[0]["num_batches"] == 2
    contrastive = uncalibrated(importance="gradient", loss="contrastive")
    trainer(contrastive, tmp_path, [FPSCallback(views=views)], max_steps=1).train()
    assert "contrastive loss over 12 examples" in contrastive.selection_report().method
    other = uncalibrated(importance="gradient")
    trainer(other, tmp_path, [FPSCallback(loss=loss)], max_steps=1).train()
    assert selection_of(other) == selected_by_hand(config={"importance": "gradient"}, loss=loss)


@pytest.mark.parametrize("name", ["los", "data", "adapter_name", "discard_values"])
def test_an_option_that_is_none_is_refused_at_once(name: str) -> None:
    with pytest.raises(
        TypeError, match=f"FPSCallback got {name}, expected only loss, views, accumulators, training_mode"
    ):
        FPSCallback(**{name: None})


# --- the model card -------------------------------------------------------------------------------------------------


def results(folder: Path) -> list[dict[str, Any]]:
    """The metrics that the card in a folder states, read without huggingface_hub."""
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return [metric for result in metadata["model-index"][0]["results"] for metric in result["metrics"]]


def test_the_card_states_the_newest_evaluation(tmp_path: Path) -> None:
    model = uncalibrated()
    options: dict[str, Any] = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    run = trainer(model, tmp_path, [FPSCallback()], **options, save_steps=2)
    run.train()
    run.evaluate(metric_key_prefix="test")
    model.save_pretrained(tmp_path / "end")
    logged = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    for step, folder in ((2, "checkpoint-2"), (3, "end")):
        expected = {"name": f"loss after {step} training steps", "type": "loss", "value": logged[step]}
        assert results(tmp_path / folder) == [expected]
    assert logged[2] != logged[3]


def test_the_card_states_the_evaluation_of_the_best_checkpoint_that_was_put_back(tmp_path: Path) -> None:
    accuracies = iter([0.5, 0.875, 0.25])
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    model = uncalibrated()
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=3, **options, **best),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        compute_metrics=lambda _: {"accuracy": next(accuracies)},
        callbacks=[FPSCallback()],
    )
    run.train()
    model.save_pretrained(tmp_path / "end")
    found = {metric["name"]: metric["value"] for metric in results(tmp_path / "end")}
    assert found["accuracy after 2 training steps"] == 0.875
    assert set(found) == {"accuracy after 2 training steps", "loss after 2 training steps"}


def test_an_evaluation_of_several_adapters_is_none_of_each(tmp_path: Path) -> None:
    model = adapted(small_vit())
    model.add_adapter("other", FPSConfig(per_neuron=1, importance="magnitude", modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    trainer(model, tmp_path, [FPSCallback()]).evaluate()
    model.save_pretrained(tmp_path / "both")
    for folder in (tmp_path / "both", tmp_path / "both" / "other"):
        assert "model-index" not in (folder / "README.md").read_text()


def test_the_trainers_own_card_keeps_our_part(tmp_path: Path) -> None:
    model = uncalibrated()
    run = trainer(model, tmp_path, [FPSCallback()], hub_model_id="me/tiny")
    run.train()
    run.evaluate()
    run.save_model()
    run.create_model_card()
    assert "FPS adapter" not in (tmp_path / "README.md").read_text()
    run.callback_handler.on_push_begin(run.args, run.state, run.control)  # as trainer.push_to_hub does before that
    for _ in range(2):
        run.save_model()
        run.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert text.count("## FPS adapter") == 1
        assert "### Training hyperparameters" in text
        assert 'PeftModel.from_pretrained(model, "me/tiny")' in text
        assert [metric["name"] for metric in results(tmp_path)] == ["loss after 4 training steps"]
    for whole in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        whole.create_or_update_model_card(str(tmp_path / "copy"))
        assert trained_state(whole) == trained_state(model)
    plain = small_vit()
    FPSCallback().on_push_begin(run.args, run.state, run.control, model=plain)
    assert "create_or_update_model_card" not in vars(plain)


def test_other_evaluations_do_not_take_the_place_of_the_trainers(tmp_path: Path) -> None:
    model = uncalibrated()
    run = trainer(model, tmp_path, [FPSCallback()])
    run.evaluate()
    run.train()
    run.evaluate(metric_key_prefix="test")
    model.save_pretrained(tmp_path / "end")
    assert [metric["name"] for metric in results(tmp_path / "end")] == ["loss after 0 training steps"]


def test_sizes_that_data_parallel_training_holds_fixed_are_not_changed_silently() -> None:
    model, callback = uncalibrated(granularity="model"), FPSCallback()
    settings: Any = SimpleNamespace(parallel_mode=ParallelMode.DISTRIBUTED, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"calibration has changed how many entries.*model.calibrate.*before the Tra"):
        callback.on_train_begin(settings, TrainerState(), TrainerControl(), model=model, train_dataloader=BATCHES)
    model = uncalibrated(granularity="neuron")
    callback.on_train_begin(settings, TrainerState(), TrainerControl(), model=model, train_dataloader=BATCHES)
