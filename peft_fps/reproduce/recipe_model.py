"""The pre-trained model of a recipe: whether it can be loaded, how large its images are, how they are normalised."""

from typing import Any

from transformers import PreTrainedModel

from peft_fps.reproduce.recipes import NORMALISATION
from peft_fps.training.drop_path import add_drop_path
from peft_fps.vision.classifiers import interpolates, load_model, load_processor


def prepared_model(
    name: str, classes: list[str], seed: int, image_size: int, drop_path: float
) -> tuple[PreTrainedModel, bool]:
    """Load a model with a new head and drop-path for images of a size.

    Returns:
        The model, and whether it is to be asked to interpolate its position embeddings.

    Raises:
        ValueError: it cannot be loaded, or takes neither the size nor drop-path.
    """
    model = load_model(name, classes, seed)
    wrapped: Any = getattr(model, "timm_model", None)
    if drop_path:
        add_drop_path(model, drop_path)
    own = model_size(model)
    if own in (None, image_size):
        return model, False
    if hasattr(wrapped, "set_input_size"):
        wrapped.set_input_size(img_size=(image_size, image_size))
    elif wrapped is not None or not interpolates(model):
        raise ValueError(
            f"--image-size is {image_size}, but a {type(model).__name__} of this kind takes {own} pixels only."
        )
    return model, wrapped is None


def model_size(model: PreTrainedModel) -> int | None:
    """Return the height of the images that a model was made for; None if it does not tell."""
    size: Any = getattr(model.config, "image_size", None)
    if hasattr(model, "timm_model"):
        size = getattr(getattr(model.timm_model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, (tuple, list)) else size


def normalisation(name: str) -> dict[str, list[float]]:
    """Return mean and standard deviation per colour that a model's images are normalised with.

    Those of its image processor, which for the recipes' model are the recipes'.
    """
    processor = load_processor(name, None)
    config = getattr(processor, "data_config", {})  # of a timm model
    values = {key: getattr(processor, f"image_{key}", None) or config.get(key) for key in ("mean", "std")}
    if not getattr(processor, "do_normalize", True):
        return dict(NORMALISATION)
    return {key: [float(number) for number in value or NORMALISATION[key]] for key, value in values.items()}
