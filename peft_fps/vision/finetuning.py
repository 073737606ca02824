"""The stages of `peft-fps finetune`, in order."""

import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import AutoModelForImageClassification, set_seed

from peft_fps.vision.labelled_images import load_images
from peft_fps.vision.linear_head import fit_linear_head
from peft_fps.vision.measurements import Stopwatch, folder_bytes, peak_memory, versions
from peft_fps.vision.classifiers import (
    classifier,
    interpolates,
    load_model,
    load_processor,
    upstream_deprecations,
)
from peft_fps.vision.finetune_options import ADAPTER, BASE, DEFAULT_MODEL, MERGED, PICTURE, RESULTS, FinetuneOptions
from peft_fps.vision.pixels import Collator, ImageSplit, prepare, two_views
from peft_fps.vision.prediction import Agreement, Predictor
from peft_fps.vision.timm_models import weights_of
from peft_fps.vision.training_loop import LogHistory, calibration_loader, train, training_arguments, worker_count


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
    """The stages; a base model that its name alone does not tell is kept in the folder until it is saved."""
    config = options.fps_config()
    recipe = options.recipe(config)
    batch_size = recipe["per_device_train_batch_size"]
    options.check_paths()
    set_seed(options.seed)
    stopwatch = Stopwatch(console)
    name = options.model or str(DEFAULT_MODEL)

    with stopwatch.stage("load"):
        data = load_images(options.data, options.seed, options.image_column, options.label_column)
        base = load_model(name, data.classes, options.seed, options.image_size)
        processor, weights = load_processor(name, options.image_size), weights_of(base)
        if weights is not None:
            base.save_pretrained(kept)
            base.name_or_path = str((options.output / BASE).resolve())
        splits = {part: ImageSplit(getattr(data, part), processor) for part in ("train", "validation", "test")}
        views = two_views(processor) if config.loss == "contrastive" else None
        workers = worker_count(prepare(splits))
    collator = Collator(options.image_size is not None and interpolates(base))
    arguments = training_arguments(options, recipe, len(data.train), workers)
    predictor = Predictor(arguments.device, batch_size, collator, workers)

    with stopwatch.stage("linear head"):
        head = classifier(base)
        features = {part: predictor.features(base, head, split, f"Features, {part}") for part, split in splits.items()}
        linear = fit_linear_head(*((features[part], splits[part].labels) for part in ("train", "validation")))

    with stopwatch.stage("calibrate"):
        with upstream_deprecations():
            model: Any = get_peft_model(base, config)
        loader = calibration_loader(options.seed, batch_size, splits["train"], collator, workers)
        report = model.calibrate(loader, num_batches=options.calibration_batches, views=views)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    with stopwatch.stage("train"):
        history = LogHistory()
        loss = train(model, arguments, splits["train"], collator, callbacks=[history])

    with stopwatch.stage("evaluate"):
        logits = {part: predictor.logits(model, splits[part], f"Predicting {part}") for part in ("validation", "test")}
        before = {part: linear.accuracy(features[part], splits[part].labels) for part in logits}
        after = {part: accuracy(logits[part], splits[part].labels) for part in logits}

    with stopwatch.stage("save"):
        options.clear_output()
        if weights is not None:
            shutil.copytree(kept, options.output / BASE)
        model.save_pretrained(options.output / ADAPTER)
    draw_training(history.records, options.output / PICTURE)

    with stopwatch.stage("merge"):
        merged = model.merge_and_unload()
        merged.save_pretrained(options.output / MERGED)
        if not hasattr(processor, "data_config"):  # a timm model's is in the model's config
            processor.save_pretrained(options.output / MERGED)
        del base, model, merged

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
        "model": name if options.model else "embedded",
        "weights": weights,
        "data": options.data or "embedded",
        "images": {part: len(split) for part, split in splits.items()},
        "classes": data.classes,
        "image_shape": list(splits["train"][0]["pixel_values"].shape),
        "accuracy": {part: {"before": before[part], "after": after[part]} for part in after},
        "linear_head": {"C": linear.strength, "validation_accuracy": linear.validation},
        "training_loss": loss,
        "trainable_parameters": report.trained + report.head_parameters,
        "selection": report.to_dict(),
        "adapter_bytes": folder_bytes(options.output / ADAPTER),
        "merged_bytes": folder_bytes(options.output / MERGED),
        "peak_memory": peak_memory(arguments.device),
        "seconds": stopwatch.seconds,
        "agreement": {kind: checked.to_dict() for kind, checked in agreement.items()},
        "device": str(arguments.device),
        "versions": versions(),
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


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of `logits`, `(images, classes)`, that are largest at `labels`, `(images,)`."""
    return float(accuracy_score(labels.numpy(), logits.argmax(-1).numpy()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
