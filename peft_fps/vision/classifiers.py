"""The pre-trained model, a new output head for the task, and the image processor that belongs to it."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from peft_fps.base.head import output_head
from peft_fps.vision.timm_models import build_timm, record_size, resized_processor, timm_processor
from peft_fps.vision.timm_names import timm_name
from peft_fps.vision.upstream_noise import no_head_report


def load_model(name: str, classes: list[str], seed: int, image_size: int | None = None) -> PreTrainedModel:
    """Load an image model in float32, its output layer replaced by a new one for the classes.

    Args:
        name: a folder, `owner/name` on the Hub, or `timm:NAME` or `timm:NAME@FILE`.
        classes: names of the classes.
        seed: the same seed gives the same output layer.
        image_size: height and width of the images that a timm model will see, in pixels; its own if None. Other
            models are told when they are called, see `interpolates`.

    Raises:
        ImportError: it is one of timm's by name, and timm cannot be imported.
        ValueError: there is no such model, weights other than the output head's are missing or have another shape, or
            there is no such head.
    """
    named = timm_name(name) is not None
    if named:
        model = build_timm(name, classes, seed, image_size)
    else:
        model = load_whole(name, classes, AutoModelForImageClassification)
    if image_size is not None and not named and hasattr(model, "timm_model"):
        record_size(model, name, image_size)
    renew_head(model, seed)
    return model


def renew_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the output layer of a classifier anew; the same seed gives the same weights.

    Raises:
        ValueError: the model does not have exactly one such layer.
    """
    head = classifier(model)
    generator = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02), generator=generator)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def load_whole(name: str, classes: list[str], kind: Any) -> PreTrainedModel:
    """Load a model from a folder or the Hub in float32; all weights but the head's must be there.

    Args:
        name: a folder, or `owner/name` on the Hub.
        classes: names of the classes.
        kind: one of transformers' classes for classification, `AutoModelForImageClassification` for example.

    Raises:
        ValueError: there is no such model, or weights other than the output head's are missing or have another shape.
    """
    try:
        # a timm model takes the number of classes by this name only; others complain if they get it beside the names
        of_timm = AutoConfig.from_pretrained(name).model_type == "timm_wrapper"
        number = {"num_labels": len(classes)} if of_timm else {}
        with no_head_report():
            model, loaded = kind.from_pretrained(
                name,
                id2label=dict(enumerate(classes)),
                label2id={label: index for index, label in enumerate(classes)},
                problem_type="single_label_classification",
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                output_loading_info=True,
                **number,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"--model is {name!r}, which could not be loaded: {error}") from error
    heads = tuple(f"{head}." for head in output_head(model))
    absent = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    unusable = sorted(key for key in absent if not key.startswith(heads))
    if unusable:
        raise ValueError(
            f"--model is {name!r}, whose file lacks {len(unusable)} weights of a {type(model).__name__} or holds them "
            f"in another shape: {', '.join(unusable[:3])}. Does {kind.__name__} load it?"
        )
    return model


def classifier(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that turns features into one logit per class.

    Raises:
        ValueError: the model does not have exactly one.
    """
    names = output_head(model)
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and any(name == head or name.startswith(f"{head}.") for head in names)
    ]
    if len(found) != 1:
        raise ValueError(
            f"A {type(model).__name__} has {len(found)} linear output layers of {model.config.num_labels} classes, "
            "expected one."
        )
    return found[0]


def load_processor(name: str, image_size: int | None) -> Any:
    """Load the image processor of a model.

    Args:
        name: a folder, `owner/name` on the Hub, or `timm:NAME`.
        image_size: height and width of the images that it makes, in pixels; the model's own if None.
    """
    named = timm_name(name) is not None
    processor = timm_processor(name) if named else AutoImageProcessor.from_pretrained(name)
    if image_size is None:
        return processor
    if hasattr(processor, "data_config"):  # a timm model's
        return resized_processor(processor, image_size)
    square = {"height": image_size, "width": image_size}
    changes: dict[str, Any] = {"size": square}
    if getattr(processor, "do_center_crop", False):
        crop, edge = processor.crop_size["height"], processor.size["shortest_edge"]
        changes = {"size": {"shortest_edge": round(image_size * edge / crop)} if edge else square, "crop_size": square}
    return AutoImageProcessor.from_pretrained(name, **changes)


def interpolates(model: PreTrainedModel) -> bool:
    """Return whether the model can be asked to interpolate its position embeddings to another image size."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
