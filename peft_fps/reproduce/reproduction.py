"""The stages of `peft-fps reproduce`, in order."""

from typing import Any

from peft import get_peft_model
from rich.console import Console
from transformers import set_seed

from peft_fps.reproduce.deviations import deviations
from peft_fps.reproduce.mixing import MixingCollator
from peft_fps.reproduce.recipe_model import normalisation, prepared_model
from peft_fps.reproduce.recipe_training import (
    best_epoch,
    check_precision,
    fit,
    image_splits,
    kept_weights,
    trainer_arguments,
)
from peft_fps.reproduce.recipes import NORMALISATION, training_images
from peft_fps.reproduce.reproduce_options import ReproduceOptions
from peft_fps.reproduce.task_images import load_task
from peft_fps.vision.locations import check_locations
from peft_fps.vision.measurements import Stopwatch, run_facts
from peft_fps.vision.output_folders import ADAPTER, RESULTS, clear_results, write_json
from peft_fps.vision.pixels import Collator, prepare, two_views
from peft_fps.vision.prediction import Predictor, accuracy
from peft_fps.vision.timm_names import check_timm
from peft_fps.vision.training_loop import calibration_loader, worker_count
from peft_fps.vision.upstream_noise import upstream_deprecations


def reproduce(options: ReproduceOptions, console: Console) -> dict[str, Any]:
    """Train a task as published and evaluate it; returns what `results.json` holds.

    The test split is read once, at the end. Nothing is chosen on it.

    Args:
        options: what the user asked for.
        console: where the stages and the selection report are shown.

    Raises:
        ValueError, TypeError, OSError: an option, the model or the data cannot be used.
        ImportError: the model or the selection needs a library that is not installed.
    """
    task, used, config = options.recipe(), options.settings(), options.config()
    name, seed, batch_size = used["model"], used["seed"], used["batch_size"]
    check_precision(options.precision)
    check_timm(name)
    check_locations(name, options.data, options.folder, options.overwrite)
    set_seed(seed)
    stopwatch = Stopwatch(console)

    with stopwatch.stage("load"):
        columns = options.image_column, options.label_column
        data = load_task(options.data, task, seed, options.train_on_all, *columns)
        published = task.classes, training_images(task, options.train_on_all)
        differences = options.differences(
            classes=(published[0], len(data.classes)),
            training_images=(published[1], published[1] and len(data.train)),
        )
        data = data if options.limit is None else data.first(options.limit)
        base, interpolate = prepared_model(name, data.classes, seed, used["image_size"], used["drop_path"])
        normal = normalisation(name)
        if normal != NORMALISATION:
            differences["normalisation"] = {"recipe": NORMALISATION, "here": normal}
        train, splits = image_splits(data, options, normal)
        views = two_views(splits["train"].processor) if config.loss == "contrastive" else None
        workers = {"test": worker_count(prepare({"test": splits["test"]}))}
        workers["train"] = worker_count(prepare({part: splits[part] for part in splits if part != "test"}))
        collator = Collator(interpolate)
        mixing = MixingCollator(collator, len(data.classes)) if used["augmentation"] else None
    arguments = trainer_arguments(options, len(train), worker_count(train.kept is not None))

    with stopwatch.stage("calibrate"):
        with upstream_deprecations():
            model: Any = get_peft_model(base, config).to(arguments.device)
        loader = calibration_loader(seed, batch_size, splits["train"], collator, workers["train"])
        report = model.calibrate(loader, views=views, training_mode=options.method == "gps")
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    with stopwatch.stage("train"):
        predictor = Predictor(arguments.device, batch_size, collator, workers["train"])
        best = best_epoch(predictor, splits.get("validation"), used["ema"])
        loss = fit(model, arguments, train, mixing or collator, best, soft=mixing is not None)

    with stopwatch.stage("evaluate"):
        reached = {}
        for part in (part for part in splits if part != "train"):
            predictor = Predictor(arguments.device, batch_size, collator, workers.get(part, workers["train"]))
            logits = predictor.logits(model, splits[part], f"Predicting {part}")
            reached[part] = accuracy(logits, splits[part].labels)

    with stopwatch.stage("save"):
        clear_results(options.folder)
        model.save_pretrained(options.folder / ADAPTER)

    results = {
        "benchmark": options.benchmark,
        "task": task.name,
        "method": options.method,
        "options": options.to_dict(),
        "settings": used | {"normalisation": normal},
        "recipe": options.training(),
        "differences": differences,
        "deviations": deviations(task, options.method),
        "data": data.source,
        "images": {part: len(split) for part, split in splits.items()},
        "classes": data.classes,
        "accuracy": reached,
        "published": task.published,
        "epochs": best.history if best is not None else [],
        "kept": kept_weights(best, used["epochs"]),
        "training_loss": loss,
        **run_facts(report, options.folder / ADAPTER, arguments.device, stopwatch.seconds),
    }
    write_json(options.folder / RESULTS, results)
    return results
