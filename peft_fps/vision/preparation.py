"""What fine-tuning and choosing weights begin with: images, a model, and an adapter calibrated on the images."""

from dataclasses import dataclass
from typing import Any

from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from peft_fps import FPSConfig, SelectionReport
from peft_fps.gradients import TwoViews
from peft_fps.training import FPSCallback, parameter_groups
from peft_fps.training.optimizer_creation import GROUPS
from peft_fps.vision.classifiers import interpolates, load_model, load_processor
from peft_fps.vision.default_training import LOW_RATE
from peft_fps.vision.finetune_options import DEFAULT_MODEL, FinetuneOptions
from peft_fps.vision.labelled_images import ImageData, load_images
from peft_fps.vision.pixels import Collator, ImageSplit, two_views
from peft_fps.vision.timm_models import weights_of
from peft_fps.vision.training_loop import calibration_loader
from peft_fps.vision.upstream_noise import upstream_deprecations


@dataclass(frozen=True)
class Prepared:
    """Images and a model, as the options of a command say.

    Attributes:
        options: what the user asked for.
        config: of the adapter.
        name: of the model, the embedded one's folder included.
        data: the images of all splits.
        base: the model in float32, with a new head for the classes.
        processor: its image processor.
        views: makes two augmented views of images; None unless the loss is contrastive.
    """

    options: FinetuneOptions
    config: FPSConfig
    name: str
    data: ImageData
    base: PreTrainedModel
    processor: Any
    views: TwoViews | None

    @property
    def weights(self) -> str | None:
        """In words, what weights a model of timm has; None for a model that was loaded from a folder or the Hub."""
        return weights_of(self.base)

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return int(self.options.recipe(self.config)["per_device_train_batch_size"])

    @property
    def collator(self) -> Collator:
        """Makes batches of examples."""
        return Collator(self.options.image_size is not None and interpolates(self.base))

    def split(self, part: str) -> ImageSplit:
        """Return the examples of `"train"`, `"validation"` or `"test"`."""
        return ImageSplit(getattr(self.data, part), self.processor)

    def calibrated(self, images: ImageSplit, workers: int) -> tuple[Any, SelectionReport]:
        """Put an adapter on the model and choose its entries.

        Args:
            images: to choose by.
            workers: processes that prepare them.

        Returns:
            The PEFT model, and the report of the selection.
        """
        with upstream_deprecations():
            model: Any = get_peft_model(self.base, self.config)
        loader = calibration_loader(self.options.seed, self.batch_size, images, self.collator, workers)
        return model, model.calibrate(loader, num_batches=self.options.calibration_batches, views=self.views)


def prepared(options: FinetuneOptions, config: FPSConfig) -> Prepared:
    """Set the seed, and load images and model.

    Args:
        options: what the user asked for.
        config: of the adapter.

    Raises:
        ValueError, TypeError, OSError: the model or the data cannot be used.
        ImportError: the model or the loss needs a library that is not installed.
    """
    set_seed(options.seed)
    name = options.model or str(DEFAULT_MODEL)
    data = load_images(options.data, options.seed, options.image_column, options.label_column)
    base = load_model(name, data.classes, options.seed, options.image_size)
    processor = load_processor(name, options.image_size)
    views = two_views(processor) if config.loss == "contrastive" else None
    return Prepared(options, config, name, data, base, processor, views)


def training_callback(options: FinetuneOptions, model: nn.Module, learning_rate: float) -> FPSCallback:
    """Return what trains biases and head at their rates, and with centred inputs, as the options say.

    Args:
        options: what the user asked for.
        model: what is trained.
        learning_rate: of the selected weights.
    """
    centred, low = options.centred, dict.fromkeys(("bias_lr", "head_lr"))
    if options.preset is None:
        groups = parameter_groups(model, learning_rate)
        trained = {group["name"] for group in groups if any(parameter.numel() for parameter in group["params"])}
        lower = low if "entries" in trained else {}  # biases alone have the given rate
        low |= {name: learning_rate * LOW_RATE for name in lower if trained.intersection(GROUPS[name])}
    elif centred is None:
        centred = False  # as published
    return FPSCallback(
        bias_lr=options.bias_learning_rate or low["bias_lr"],
        head_lr=options.head_learning_rate or low["head_lr"],
        centred=centred,
    )
