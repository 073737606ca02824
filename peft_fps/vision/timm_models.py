"""timm's models as models of transformers: built by name, their weights, and the size of their images.

transformers' wrapper is used, so that what is saved is a model folder like any other.
"""

import logging
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_fps.vision.timm_names import TimmName, check_timm_name, timm_name


logger = logging.getLogger(__name__)

READING = ("file", "state_dict", "source", "label_offset", "custom_load", "num_classes")
ORIGIN = (
    "tag",
    "url",
    "hf_hub_id",
    "hf_hub_filename",
    "license",
    "description",
    "origin_url",
    "paper_name",
    "paper_ids",
)
"""Of timm's description of weights: how they were read, and where published ones are from."""

PUBLISHED = ", published by timm"

MESSAGE = 400
"""Characters of an error of timm's that are shown; it may name every weight there is."""


def build_timm(name: str, classes: list[str], seed: int, image_size: int | None) -> PreTrainedModel:
    """Build a timm model in float32 for the classes; its head is random, and all else where there are no weights.

    Args:
        name: `timm:NAME`, for the weights that timm publishes, or `timm:NAME@FILE`; a head in the file is left out.
        classes: names of the classes.
        seed: the same seed gives the same random weights.
        image_size: height and width of the images that it will see, in pixels; its own if None.

    Returns:
        transformers' wrapper of it; `weights_of` tells what weights it has.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: timm knows no such model, the file does not hold its weights, or it does not take the size.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification  # they need timm

    check_timm_name("--model", name)
    parts = timm_name(name)
    assert parts is not None
    arguments = _size_arguments(parts.model, image_size)
    with torch.random.fork_rng(devices=[]):
        source, weights = _pretrained(parts, name, arguments, seed)
        described = {
            "architecture": parts.model,
            "pretrained_cfg": _described(source.pretrained_cfg, image_size, published=weights.endswith(PUBLISHED)),
            "model_args": arguments or None,
        }
        config = TimmWrapperConfig.from_dict(
            described,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={label: index for index, label in enumerate(classes)},
            problem_type="single_label_classification",
        )
        model: Any = TimmWrapperForImageClassification(config).float()
    heads = tuple(f"{head}." for head in _classifiers(source.pretrained_cfg))
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.startswith(heads)}
    unfit = model.timm_model.load_state_dict(state, strict=False)
    missing = [key for key in unfit.missing_keys if not key.startswith(heads)]
    if missing or unfit.unexpected_keys:
        raise ValueError(
            f"--model is {name!r}, whose weights do not fit it with {len(classes)} classes: "
            f"{', '.join([*missing, *unfit.unexpected_keys][:3])}."
        )
    if getattr(getattr(model.timm_model, "patch_embed", None), "num_patches", None) == 0:
        raise ValueError(f"--image-size is {image_size}, which is smaller than one patch of {name!r}.")
    model.name_or_path = name
    model.weights_of_timm = weights
    if weights.startswith("random"):
        logger.warning("%s has %s", name, weights)
    built: PreTrainedModel = model.eval()
    return built


def weights_of(model: PreTrainedModel) -> str | None:
    """Return in words what weights a model has that was built by its name; None for one that was loaded."""
    return getattr(model, "weights_of_timm", None)


def timm_processor(name: str) -> Any:
    """Return the image processor that timm's description of a model's weights says, for the model's own size."""
    from transformers import TimmWrapperImageProcessor  # it needs timm

    check_timm_name("--model", name)
    parts = timm_name(name)
    assert parts is not None
    described = import_module("timm.models").get_pretrained_cfg(parts.model).to_dict()
    return TimmWrapperImageProcessor(described, architecture=parts.model)


def resized_processor(processor: Any, image_size: int) -> Any:
    """Return a copy of a timm model's image processor that makes images of a size."""
    return type(processor)(processor.data_config | {"input_size": (3, image_size, image_size)})


def record_size(model: Any, name: str, image_size: int) -> None:
    """Record in a loaded timm model's config the size of its images, from which its image processor is made.

    Raises:
        ValueError: the model takes images of another size only.
    """
    inner = model.timm_model
    own = getattr(getattr(inner, "patch_embed", None), "img_size", None)
    if (inner.pretrained_cfg or {}).get("fixed_input_size") and own not in (None, (image_size, image_size)):
        raise ValueError(
            f"--image-size is {image_size}, but {name!r} takes {own[0]} pixels only. With "
            f"--model timm:{model.config.architecture}@FILE, FILE being that with its weights, it is made for another."
        )
    model.config.pretrained_cfg = _described(getattr(model.config, "pretrained_cfg", None) or {}, image_size)


def _pretrained(parts: TimmName, name: str, arguments: dict[str, Any], seed: int) -> tuple[Any, str]:
    """timm's own model with all weights of the file or the Hub, else random ones; and which in words."""
    models: Any = import_module("timm.models")
    published, create_model = models.get_pretrained_cfg(parts.model), models.create_model
    try:
        if parts.file is not None:
            state = _read(parts.file)
            number = _classes(state, _classifiers({"classifier": published.classifier}))
            read = {"state_dict": state, "custom_load": False, "num_classes": number, "label_offset": 0}
            overlay = {"pretrained_cfg_overlay": read, "num_classes": number}
            return create_model(parts.model, pretrained=True, **overlay, **arguments), f"from {parts.file}"
        why = "timm publishes none of this model"
        if published.has_weights:
            try:
                return create_model(parts.model, pretrained=True, **arguments), published.tag + PUBLISHED
            except OSError as error:
                logger.debug("no weights of %s: %s", parts.model, error)
            why = "those that timm publishes are not in the local cache and could not be fetched"
        torch.manual_seed(seed)
        model = create_model(parts.model, **arguments)
        return model, f"random weights: {why}; timm:{parts.model}@FILE reads a local file"
    except Exception as error:  # timm's models refuse sizes and files in many ways
        size = f" with images of {arguments['img_size']} pixels" if arguments else ""
        why = shorten(str(error) or repr(error), MESSAGE, placeholder=" …")
        raise ValueError(f"--model is {name!r}, which could not be built{size}: {why}") from error


def _size_arguments(model: str, image_size: int | None) -> dict[str, Any]:
    """What to build a model with for images of a size; nothing where it takes any size."""
    fixed = image_size is not None and import_module("timm.models").get_pretrained_cfg(model).fixed_input_size
    return {"img_size": image_size} if fixed else {}


def _read(file: Path) -> dict[str, Tensor]:
    """The weights in a file of timm's, or of transformers' wrapper."""
    state: dict[str, Tensor] = import_module("timm.models").load_state_dict(str(file))
    return {key.removeprefix("timm_model."): tensor for key, tensor in state.items()}


def _classes(state: dict[str, Tensor], heads: tuple[str, ...]) -> int:
    """Number of classes of the head among the weights; 0 if there is none."""
    return next((state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state), 0)


def _classifiers(described: dict[str, Any]) -> tuple[str, ...]:
    """Names of a timm model's output layers."""
    names = described.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _described(pretrained: dict[str, Any], image_size: int | None, published: bool = True) -> dict[str, Any]:
    """timm's description of weights as it is to be saved: for images of a size, with an origin if it is theirs."""
    dropped = READING if published else READING + ORIGIN
    kept = {key: value for key, value in pretrained.items() if key not in dropped}
    return kept | ({"input_size": [3, image_size, image_size]} if image_size is not None else {})
