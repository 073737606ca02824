"""What the Trainer is given: images as the recipe augments them, arguments, and the choice of the epoch."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from peft_fps.reproduce.crops import CentreCrop, Direct, RandomCrop, Transform
from peft_fps.reproduce.epochs import RAW, BestEpoch
from peft_fps.reproduce.mixing import soft_cross_entropy
from peft_fps.reproduce.reproduce_options import ReproduceOptions
from peft_fps.reproduce.task_images import TaskData
from peft_fps.vision.pixels import ImageSplit
from peft_fps.vision.prediction import Predictor, accuracy
from peft_fps.vision.training_loop import train, training_arguments


def image_splits(
    data: TaskData, options: ReproduceOptions, normal: dict[str, list[float]]
) -> tuple[ImageSplit, dict[str, ImageSplit]]:
    """Return the images to train on, and the splits as they are evaluated, the training split among them.

    Where nothing is augmented, the first is the last of these.

    Args:
        data: the splits.
        options: say how they are cut, resized and augmented.
        normal: `mean` and `std` of the normalisation.
    """
    used = options.settings()
    size = used["image_size"]
    evaluated = Transform((CentreCrop if options.benchmark == "fgvc" else Direct)(size), **normal)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {name: ImageSplit(part, evaluated) for name, part in parts.items() if part is not None}
    if not used["augmentation"]:
        return splits["train"], splits
    return ImageSplit(data.train, Transform(RandomCrop(size), **normal)), splits


def check_precision(precision: str) -> None:
    """Refuse float16 without a GPU.

    Raises:
        ValueError: there is none.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision is fp16, which needs a CUDA GPU; there is none. Use fp32 or bf16.")


def trainer_arguments(options: ReproduceOptions, images: int, workers: int) -> TrainingArguments:
    """Return the arguments of the Trainer; as in the scripts, an incomplete last batch of an epoch is left out.

    Args:
        options: what the user asked for.
        images: number of training images; if they make no batch, the incomplete one is trained on.
        workers: processes that prepare images.
    """
    recipe = options.training()
    complete = images >= recipe["per_device_train_batch_size"]
    recipe |= {"dataloader_drop_last": complete}
    seed = options.settings()["seed"]
    return training_arguments(recipe, images, workers, options.folder, seed, options.precision)


def best_epoch(predictor: Predictor, validation: ImageSplit | None, decay: float | None) -> BestEpoch | None:
    """Return what keeps the epoch that is best on the validation images; None if there are none."""
    if validation is None:
        return None
    split = validation
    return BestEpoch(lambda model: accuracy(predictor.logits(model, split, "Validating"), split.labels), decay)


def fit(
    model: nn.Module,
    arguments: TrainingArguments,
    images: ImageSplit,
    collator: Any,
    best: BestEpoch | None,
    soft: bool,
) -> float:
    """Train the model in place, leave it with the weights of the best epoch, and return the mean training loss.

    Args:
        model: with a calibrated adapter.
        arguments: of the Trainer.
        images: to train on.
        collator: makes a batch.
        best: keeps the best epoch; without it the last epoch's weights stay.
        soft: labels are shares of the classes, not class indices.

    Raises:
        DivergedError: the loss is not finite.
    """
    loss = train(
        model,
        arguments,
        images,
        collator,
        callbacks=[] if best is None else [best],
        compute_loss_func=soft_cross_entropy if soft else None,
    )
    if best is not None:
        best.restore(model)
    return loss


def kept_weights(best: BestEpoch | None, epochs: int) -> dict[str, Any]:
    """Return which epoch's weights were kept, raw or averaged, and by what they were chosen."""
    if best is None or best.best is None:
        return {"epoch": epochs, "weights": RAW, "chosen_by": "the last epoch"}
    return {"epoch": best.best["epoch"], "weights": best.weights, "chosen_by": "validation accuracy"}
