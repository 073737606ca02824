"""The stages of `peft-fps finetune`, in order."""

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForImageClassification

from peft_fps.vision.classifiers import classifier, load_model
from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.vision.linear_head import fit_linear_head
from peft_fps.vision.locations import check_locations
from peft_fps.vision.measurements import Stopwatch, run_facts
from peft_fps.vision.option_types import AUTO
from peft_fps.vision.output_folders import (
    ADAPTER,
    BASE,
    MERGED,
    PICTURE,
    RESULTS,
    clear_results,
    folder_bytes,
    write_json,
)
from peft_fps.vision.pixels import prepare
from peft_fps.vision.prediction import Agreement, Predictor, accuracy
from peft_fps.vision.preparation import prepared, training_callback
from peft_fps.vision.rate_trials import RateTrial, best_rate, run_trials, told
from peft_fps.vision.training_loop import LogHistory, train, training_arguments, worker_count
from peft_fps.vision.upstream_noise import upstream_deprecations


logger = logging.getLogger(__name__)


def finetune(options: FinetuneOptions, console: Console) -> dict[str, Any]:
    """Fine-tune, evaluate, save, merge and verify; returns what `results.json` holds.

    The test split is read once for the linear head, once for the fine-tuned model and once for each check that its
    saved forms predict the same. Nothing is chosen on it.

    Args:
        options: what the user asked for.
        console: where the stages and the selection report are shown.

    Raises:
        ValueError, TypeError, OSError: an option, the model or the data cannot be used.
        ImportError: the selection needs a library that is not installed.
    """
    with TemporaryDirectory() as kept:
        return _finetune(options, console, Path(kept))


def _finetune(options: FinetuneOptions, console: Console, kept: Path) -> dict[str, Any]:
    """The stages; `kept` holds a base model that its name alone does not tell, until it is saved."""
    config = options.fps_config()
    recipe = options.recipe(config)
    check_locations(options.model, options.data, options.output, options.overwrite)
    stopwatch = Stopwatch(console)

    with stopwatch.stage("load"):
        run = prepared(options, config)
        name, data, base, weights, processor = run.name, run.data, run.base, run.weights, run.processor
        if weights is not None:
            base.save_pretrained(kept)
            base.name_or_path = str((options.output / BASE).resolve())
        splits = {part: run.split(part) for part in ("train", "validation", "test")}
        workers = worker_count(prepare(splits))
    arguments = training_arguments(recipe, len(data.train), workers, options.output, options.seed, options.precision)
    predictor = Predictor(arguments.device, run.batch_size, run.collator, workers)

    with stopwatch.stage("linear head"):
        head = classifier(base)
        features = {part: predictor.features(base, head, split, f"Features, {part}") for part, split in splits.items()}
        linear = fit_linear_head(*((features[part], splits[part].labels) for part in ("train", "validation")))

    with stopwatch.stage("calibrate"):
        model, report = run.calibrated(splits["train"], workers)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    trials: list[RateTrial] = []
    if options.learning_rate == AUTO:
        with stopwatch.stage("learning rate"):
            trials = run_trials(options, recipe, model, splits, run.collator, predictor)
        recipe = {**recipe, "learning_rate": best_rate(trials)}
        arguments = training_arguments(
            recipe, len(data.train), workers, options.output, options.seed, options.precision
        )
        if config.recipe is not None:
            model.active_peft_config.recipe = recipe
        console.print(told(trials), highlight=False)

    with stopwatch.stage("train"):
        history = LogHistory()
        training = training_callback(options, model, arguments.learning_rate)
        loss = train(model, arguments, splits["train"], run.collator, callbacks=[history, training])

    with stopwatch.stage("evaluate"):
        logits = {part: predictor.logits(model, splits[part], f"Predicting {part}") for part in ("validation", "test")}
        before = {part: linear.accuracy(features[part], splits[part].labels) for part in logits}
        after = {part: accuracy(logits[part], splits[part].labels) for part in logits}

    with stopwatch.stage("save"):
        clear_results(options.output)
        if weights is not None:
            shutil.copytree(kept, options.output / BASE)
        model.save_pretrained(options.output / ADAPTER)
    draw_training(history.records, options.output / PICTURE)

    with stopwatch.stage("merge"):
        merged = model.merge_and_unload()
        merged.save_pretrained(options.output / MERGED)
        if not hasattr(processor, "data_config"):  # a timm model's is in the model's config
            processor.save_pretrained(options.output / MERGED)
        del run, base, model, merged

    with stopwatch.stage("verify"):
        saved_base = name if weights is None else str(options.output / BASE)
        fresh = load_model(saved_base, data.classes, options.seed)
        with upstream_deprecations():
            reloaded = PeftModel.from_pretrained(fresh, options.output / ADAPTER)
        plain = AutoModelForImageClassification.from_pretrained(options.output / MERGED, dtype=torch.float32)
        agreement = {
            kind: Agreement.of(logits["test"], predictor.logits(saved, splits["test"], f"Predicting, {kind}"))
            for kind, saved in (("merged", plain), ("reloaded", reloaded))
        }

    results = {
        "options": options.to_dict(),
        "recipe": recipe,
        "rates": training.rates,
        "centring": training.centring,
        "model": name if options.model else "embedded",
        "weights": weights,
        "data": options.data or "embedded",
        "images": {part: len(split) for part, split in splits.items()},
        "classes": data.classes,
        "image_shape": list(splits["train"][0]["pixel_values"].shape),
        "accuracy": {part: {"before": before[part], "after": after[part]} for part in after},
        "linear_head": {"C": linear.strength, "validation_accuracy": linear.validation},
        "learning_rate_trials": [trial.to_dict() for trial in trials],
        "training_loss": loss,
        **run_facts(report, options.output / ADAPTER, arguments.device, stopwatch.seconds),
        "merged_bytes": folder_bytes(options.output / MERGED),
        "agreement": {kind: checked.to_dict() for kind, checked in agreement.items()},
    }
    write_json(options.output / RESULTS, results)
    return results


def draw_training(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss over epochs from a Trainer's log; nothing if it is empty or matplotlib is not installed."""
    if not records:
        return
    try:
        from peft_fps.plots import plot_training
    except ImportError as error:
        logger.debug("no picture of the training: %s", error)
        return
    plot_training(records).savefig(path)
