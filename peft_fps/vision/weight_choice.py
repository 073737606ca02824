"""Choose the entries of an adapter on labelled images, and keep the selection without training."""

from typing import Any

from rich.console import Console

from peft_fps import Selection, SelectionReport
from peft_fps.vision.finetune_options import TRAINING_ONLY, FinetuneOptions
from peft_fps.vision.locations import check_path, local_path
from peft_fps.vision.measurements import Stopwatch
from peft_fps.vision.output_folders import check_output, write_json, written_whole
from peft_fps.vision.pixels import prepare
from peft_fps.vision.preparation import prepared
from peft_fps.vision.training_loop import worker_count


SELECTION, REPORT = "selection.safetensors", "report.json"


def choose_weights(options: FinetuneOptions, console: Console) -> SelectionReport:
    """Calibrate as `peft-fps finetune` does, and write the selection and its report to `options.output`.

    Args:
        options: what the user asked for; those of training have no effect, but for the images in a batch.
        console: where the stages are shown.

    Raises:
        ValueError, TypeError, OSError: an option, the model or the data cannot be used.
        ImportError: the selection needs a library that is not installed.
    """
    sources = {name: value for name, value in (("--model", options.model), ("--data", options.data)) if value}
    for option, source in sources.items():
        check_path(option, source)
    check_output(options.output, options.overwrite, tuple(map(local_path, sources.values())))
    config, stopwatch = options.fps_config(), Stopwatch(console)
    with stopwatch.stage("load"):
        run = prepared(options, config)
        images, limit = run.split("train"), options.calibration_batches
        few = not config.needs_calibration or (limit is not None and limit * run.batch_size < len(images))
        workers = 0 if few else worker_count(prepare({"train": images}))
    with stopwatch.stage("calibrate"):
        model, report = run.calibrated(images, workers)
    with written_whole(options.output) as folder:
        Selection.of(model).save(folder / SELECTION)
        of_selection: dict[str, Any] = {
            key: value
            for key, value in options.to_dict().items()
            if key not in (*TRAINING_ONLY, "overwrite", "output")
        }
        facts = {"model": run.name, "weights": run.weights, "options": of_selection}
        write_json(folder / REPORT, facts | report.to_dict())
    return report
