"""transformers' Trainer with an FPS adapter: what moves, what is saved, and that resuming is exact."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from peft_fps import FPSCallback, FPSConfig
from tests.support.helpers import bits, config, image_batches, images, layers_of, selected_columns, tiny_vit, unchanged
from tests.training.trainers import EXAMPLES, arguments, dropping, trained_state, trainer


pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # renamed in transformers


def calibrated(base: nn.Module | None = None, **options: Any) -> PeftModel:
    model = get_peft_model(base or tiny_vit(), FPSConfig(**{"per_neuron": 2, **options}))
    model.calibrate(image_batches(), progress=False)
    return model


def base_state(model: PeftModel) -> dict[str, bytes]:
    """Everything else, by its name in the plain model."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", ""): bits(tensor)
        for name, tensor in model.state_dict().items()
        if "fps_" not in name and "modules_to_save" not in name
    }


def plain_state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def mask(model: nn.Module, path: str) -> Tensor:
    """Where an entry is selected, in the weight's shape."""
    layer = layers_of(model)[path]
    found = torch.zeros(layer.shape.neurons, layer.shape.inputs, dtype=torch.bool)
    for row, columns in enumerate(selected_columns(layer)):
        found[row, columns] = True
    return found.reshape(layer.base_layer.weight.shape)


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 autocast": {"bf16": True},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no clipping": {"max_grad_norm": 0},
    "SGD with momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_only_selected_entries_biases_and_the_head_move(way: str, tmp_path: Path) -> None:
    model = calibrated()
    start = trained_state(model)
    trainer(model, tmp_path, **WAYS[way]).train()
    after = trained_state(model)

    assert base_state(model) == plain_state(tiny_vit())
    for name, before in start.items():
        assert (after[name] == before) == ("fps_columns" in name or "fps_row_counts" in name), name

    selected = {path: mask(model, path) for path in layers_of(model)}
    plain, origin = model.merge_and_unload(), tiny_vit()
    for name, weight in origin.state_dict().items():
        path, _, kind = name.rpartition(".")
        changed = plain.state_dict()[name] != weight
        if path in selected and kind == "weight":
            assert not bool((changed & ~selected[path]).any()), name
            assert float(changed[selected[path]].float().mean()) > 0.95, name
        elif path not in selected and path != "classifier":
            assert not bool(changed.any()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_trains_float32_values(dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated(tiny_vit().to(dtype), modules_to_save=[])
    examples = [{**example, "pixel_values": example["pixel_values"].to(dtype)} for example in EXAMPLES]
    Trainer(model, arguments(tmp_path), train_dataset=examples).train()
    values = [layer.fps_values["default"] for layer in layers_of(model).values()]
    assert {value.dtype for value in values} == {torch.float32}
    assert all(bool(value.any()) for value in values)
    assert base_state(model) == plain_state(tiny_vit().to(dtype))


@pytest.mark.parametrize("way", ["gradient checkpointing", "reentrant checkpointing"])
def test_checkpointing_changes_no_result(way: str, tmp_path: Path) -> None:
    models = {"plain": calibrated(), way: calibrated()}
    for name, model in models.items():
        trainer(model, tmp_path, **WAYS.get(name, {})).train()
    assert trained_state(models[way]) == trained_state(models["plain"])


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    whole, parts = calibrated(), calibrated()
    trainer(whole, tmp_path, optim="sgd").train()
    trainer(parts, tmp_path, optim="sgd", **WAYS["gradient accumulation"]).train()
    for path, layer in layers_of(parts).items():
        expected = layers_of(whole)[path]
        torch.testing.assert_close(layer.fps_values["default"], expected.fps_values["default"], atol=1e-6, rtol=1e-3)


def test_training_learns(tmp_path: Path) -> None:
    model = calibrated(per_neuron=4)
    run = trainer(model, tmp_path, max_steps=60, learning_rate=0.1, weight_decay=0)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.5 * before


# --- saving ---------------------------------------------------------------------------------------------------------


def test_save_load_and_merge_give_the_predictions_of_the_trained_model(tmp_path: Path) -> None:
    model = calibrated(granularity="model")
    run = trainer(model, tmp_path / "run")
    run.train()
    expected = run.predict(EXAMPLES).predictions
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")
    assert trained_state(loaded) == trained_state(model)
    again = trainer(loaded, tmp_path / "again").predict(EXAMPLES).predictions
    assert again.tobytes() == expected.tobytes()
    merged = trainer(loaded.merge_and_unload(), tmp_path / "merged").predict(EXAMPLES).predictions
    torch.testing.assert_close(torch.from_numpy(merged), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert merged.argmax(1).tolist() == expected.argmax(1).tolist()


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    trainer(calibrated(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "adapter_model.bin"}
    keys = load_file(folder / "adapter_model.safetensors")
    assert all(".fps_" in key or ".classifier." in key for key in keys)


def test_evaluation_finds_the_labels(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.label_ids.tolist())
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    run = Trainer(calibrated(), arguments(tmp_path), eval_dataset=EXAMPLES, compute_metrics=metrics)
    assert run.label_names == ["labels"]
    result = run.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= set(result)
    assert seen == [[example["labels"] for example in EXAMPLES]]


# --- resuming -------------------------------------------------------------------------------------------------------


def optimizer_state(run: Trainer) -> list[dict[str, bytes]]:
    held = run.optimizer.state_dict()["state"]
    return [{name: bits(torch.as_tensor(tensor)) for name, tensor in held[key].items()} for key in sorted(held)]


@pytest.mark.parametrize("resumed", ["calibrated", "not calibrated", "with callback"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_resuming_equals_never_having_stopped(granularity: str, resumed: str, tmp_path: Path) -> None:
    """Also where the sizes depend on the calibration, into a model that has none yet."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}

    def build() -> PeftModel:
        return get_peft_model(dropping(tiny_vit()), FPSConfig(per_neuron=2, granularity=granularity))

    model = build()
    centred = None if resumed == "with callback" else False
    through = trainer(model, tmp_path, [FPSCallback(centred=centred)], **options)
    through.train()

    again = build()
    if resumed == "calibrated":  # on other data: the checkpoint's selection is what counts
        again.calibrate(image_batches(seed=50), progress=False)
    callbacks = [FPSCallback()] if resumed == "with callback" else []
    run = trainer(again, tmp_path, callbacks, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert trained_state(again) == trained_state(model)
    assert optimizer_state(run) == optimizer_state(through)
    assert run.state.global_step == 7
    assert base_state(again) == plain_state(tiny_vit())


def test_resuming_keeps_the_selection_of_the_checkpoint_on_record(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, granularity="model"))
    trainer(model, tmp_path / "first", [FPSCallback()], **options).train()
    again = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, granularity="model"))
    run = trainer(again, tmp_path / "second", [FPSCallback()], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert [layer.entries for layer in again.selection_report().layers] == [
        layer.entries for layer in model.selection_report().layers
    ]
    again.save_pretrained(tmp_path / "adapter")
    assert trained_state(PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")) == trained_state(model)


@pytest.mark.parametrize(
    "other",
    [{"per_neuron": 3}, {"bias": "none"}, {"target_modules": ["q_proj"]}, {"modules_to_save": []}],
    ids=["budget", "bias", "targets", "head"],
)
def test_resuming_into_another_config_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    trainer(calibrated(), tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    model = calibrated(**other)
    run = trainer(model, tmp_path, max_steps=2)
    with unchanged(model), pytest.raises(ValueError, match=r"(vit\.\S+|classifier\S+): .*(expected|not target)"):
        run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="fetch or save it again"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resuming_with_another_budget_over_the_whole_model_is_refused(tmp_path: Path) -> None:
    """There only the total is fixed."""
    trainer(calibrated(granularity="model"), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    model = calibrated(granularity="model", per_neuron=3)
    neurons = sum(layer.shape.neurons for layer in layers_of(model).values())
    with pytest.raises(ValueError, match=rf"holds {2 * neurons:,} entries, expected {3 * neurons:,}"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = calibrated(granularity="model")
    run = trainer(
        model,
        tmp_path,
        max_steps=4,
        learning_rate=0.5,  # gets worse
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = PeftModel.from_pretrained(tiny_vit(), run.state.best_model_checkpoint)
    assert trained_state(model) == trained_state(best)
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)
    last = PeftModel.from_pretrained(tiny_vit(), tmp_path / "checkpoint-4")
    assert trained_state(model) != trained_state(last), "the run must not be best at its end for this to mean anything"


# --- a word of warning ----------------------------------------------------------------------------------------------


def _about_calibration(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "calibrat" in str(warning.message)]


@pytest.mark.parametrize("way", ["float32", "gradient checkpointing", "gradient accumulation"])
def test_training_without_calibration_warns_once_with_the_line_to_add(way: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(model, tmp_path, **WAYS[way]).train()
        trainer(model, tmp_path, **WAYS[way]).train()
    (message,) = _about_calibration(caught)
    assert "model.calibrate(train_dataloader)" in message
    assert "callbacks=[FPSCallback()]" in message
    assert all(bool(layer.fps_values["default"].any()) for layer in layers_of(model).values()), (
        "it trains all the same"
    )


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_importance_without_data_does_not_warn(importance: str, tmp_path: Path) -> None:
    trainer(get_peft_model(tiny_vit(), config(importance=importance)), tmp_path).train()


def test_evaluating_without_calibration_does_not_warn(tmp_path: Path) -> None:
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2))
    trainer(model, tmp_path).evaluate()
    with torch.no_grad():
        model.train()(pixel_values=images())


def test_calibration_after_training_is_refused_unless_asked_for(tmp_path: Path) -> None:
    model = calibrated()
    trainer(model, tmp_path).train()
    with unchanged(model), pytest.raises(ValueError, match=r"trained changes.*discard_values=True"):
        model.calibrate(image_batches(), progress=False)
    model.calibrate(image_batches(), progress=False, discard_values=True)
    assert not any(bool(layer.fps_values["default"].any()) for layer in layers_of(model).values())
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert len(heads) == 1
