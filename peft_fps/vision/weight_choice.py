"""Choose the entries of an adapter on labelled images, and keep the selection without training."""

from typing import Any

from peft import get_peft_model
from rich.console import Console
from transformers import set_seed

from peft_fps import Selection, SelectionReport
from peft_fps.vision.labelled_images import load_images
from peft_fps.vision.output_folders import written_whole
from peft_fps.vision.measurements import Stopwatch
from peft_fps.vision.classifiers import interpolates, load_model, load_processor, upstream_deprecations
from peft_fps.vision.finetune_options import DEFAULT_MODEL, FinetuneOptions
from peft_fps.vision.pixels import Collator, ImageSplit, prepare, two_views
from peft_fps.vision.finetuning import write_json
from peft_fps.vision.timm_models import weights_of
from peft_fps.vision.training_loop import calibration_loader, worker_count


SELECTION, REPORT = "selection.safetensors", "report.json"


def select(options: FinetuneOptions, console: Console) -> SelectionReport:
    """Calibrate as `peft-fps finetune` does, and write the selection and its report.

    Args:
        options: what the user asked for; those of training do not matter, but for the images in a batch.
        console: where the stages are shown.

    Raises:
        ValueError, TypeError, OSError: an option, the model or the data cannot be used.
        ImportError: the selection needs a library that is not installed.
    """
    config = options.fps_config()
    batch_size = options.recipe(config)["per_device_train_batch_size"]
    set_seed(options.seed)
    stopwatch, name = Stopwatch(console), options.model or str(DEFAULT_MODEL)
    with stopwatch.stage("load"):
        data = load_images(options.data, options.seed, options.image_column, options.label_column)
        base = load_model(name, data.classes, options.seed, options.image_size)
        processor, weights = load_processor(name, options.image_size), weights_of(base)
        split = ImageSplit(data.train, processor)
        views = two_views(processor) if config.loss == "contrastive" else None
        limit = options.calibration_batches
        few = not config.needs_calibration or (limit is not None and limit * batch_size < len(split))
        workers = 0 if few else worker_count(prepare({"train": split}))
    with stopwatch.stage("calibrate"):
        with upstream_deprecations():
            model: Any = get_peft_model(base, config)
        collator = Collator(options.image_size is not None and interpolates(base))
        loader = calibration_loader(options.seed, batch_size, split, collator, workers)
        report: SelectionReport = model.calibrate(loader, num_batches=limit, views=views)
    with written_whole(options.output) as folder:
        Selection.of(model).save(folder / SELECTION)
        write_json(
            folder / REPORT, {"model": name, "weights": weights, "options": _chosen(options)} | report.to_dict()
        )
    return report


def _chosen(options: FinetuneOptions) -> dict[str, Any]:
    """The options that have a say in a selection."""
    of_training = ("epochs", "learning_rate", "precision", "overwrite", "output")
    return {key: value for key, value in options.to_dict().items() if key not in of_training}
