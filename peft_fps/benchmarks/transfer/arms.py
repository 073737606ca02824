"""The methods that are compared. All train the new output head besides, and share data, schedule and seeds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, ShiraConfig
from peft.tuners.supertuning import SupertuningConfig
from torch import nn
from transformers import PreTrainedModel

from peft_fps.base.head import output_head
from peft_fps.benchmarks.transfer.class_scores import SCORES, select_by
from peft_fps.benchmarks.transfer.training_candidates import TRAINING_CANDIDATES, TrainingCandidate
from peft_fps.benchmarks.transfer.tried_choices import CHOICES, choose
from peft_fps.config import FPSConfig
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.tokens.token_placement import quarter_blocks
from peft_fps.tokens.vision_trunk import vision_trunk


FULL, DENSE, FEW = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
"""Learning rates to choose from: for full fine-tuning, for methods that put many entries into few layers, and for
others that train few numbers."""

QUERIES_VALUES = ("q_proj", "v_proj", "query", "value")
"""How the paths of the layers of queries and values end."""

Build = Callable[[PreTrainedModel, float | None, int], PeftConfig]
Choose = Callable[[Any, Iterable[Mapping[str, Any]], int], None]
"""Gives an FPS adapter its entries, from batches of `pixel_values` and `labels` and the number of classes."""


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        label: its name in tables.
        build: returns the PEFT config for a model, a share of its backbone to train, and a seed; None for a method
            without an adapter.
        budgeted: whether it can be asked for a share of parameters.
        learning_rates: to choose from; none for the linear head, which is fitted.
        choose: selects in place of the config's importance.
        images: training images that selection sees, all if None.
        augmented: whether it sees two augmented views of each, as GPS's code makes them, instead of the image itself.
        rates_by_input: whether each entry has a learning rate in inverse proportion to the size of its input.
        tuned_as: the method whose learning rate it takes, for variants of a method; None: its own.
        varies: whether it is another method with something changed, although it has learning rates of its own.
        beside: as `build`, the config of a LoRA adapter that shares model and budget, for which `build` leaves room;
            None for a method of one adapter.
        training: how it is trained, beyond what all methods have in common.
    """

    label: str
    build: Build | None = None
    budgeted: bool = True
    learning_rates: tuple[float, ...] = FEW
    tuned_as: str | None = None
    choose: Choose | None = None
    images: int | None = None
    augmented: bool = False
    rates_by_input: bool = False
    varies: bool = False
    beside: Build | None = None
    training: TrainingCandidate = TrainingCandidate()

    @property
    def is_variant(self) -> bool:
        """Whether it is another method with something changed, or a candidate, rather than a published method."""
        return self.varies or self.tuned_as is not None


def selecting(**options: Any) -> Build:
    """Return a method of this package: the best entries by some importance, without biases unless asked for."""

    def build(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
        budget = {} if share is None else {"budget": share}
        return FPSConfig(**({"bias": "none"} | budget | options), seed=seed)

    return build


def selecting_at_quarters(**options: Any) -> Build:
    """Return a method of this package that selects tokens in the blocks of TR-PTS's code, 4, 7 and 10 of 12."""

    def build(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
        blocks = quarter_blocks(len(vision_trunk(base).blocks))
        return selecting(token_blocks=blocks, **options)(base, share, seed)

    return build


def _by_score(score: str) -> Choose:
    """Return what selects by a key of `SCORES`."""
    return lambda model, data, classes: select_by(model, score, data, classes)


def _by_choice(choice: str) -> Choose:
    """Return what selects by a key of `CHOICES`."""
    return lambda model, data, classes: choose(model, choice, data)


def _bitfit(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of BitFit, which has no budget."""
    return FPSConfig.preset("bitfit", seed=seed)


def _lora(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of LoRA of rank 1, on layers that stay within the budget."""
    return LoraConfig(r=1, lora_alpha=1, target_modules=_within(base, share), modules_to_save=list(output_head(base)))


def _shira(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of SHiRA, on layers that stay within the budget."""
    return ShiraConfig(
        r=1, random_seed=seed, target_modules=_within(base, share), modules_to_save=list(output_head(base))
    )


def _supertuning(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of PEFT's Super-Tuning on all linear layers, at a sparsity that meets the budget."""
    assert share is not None
    layers = linear_layers(base)
    held = sum(layer.weight.numel() for layer in layers.values())
    return SupertuningConfig(
        sparsity=1 - share * count_base_parameters(base) / held,
        target_modules=list(layers),
        modules_to_save=list(output_head(base)),
    )


def _lora_queries_values(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of LoRA of rank 1 on queries and values, without the head."""
    return LoraConfig(r=1, lora_alpha=1, target_modules=list(_queries_values(base)))


def _biases_beside_lora(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of FPS with biases, with what a rank of 1 on queries and values leaves of the budget."""
    assert share is not None
    spent = sum(layer.in_features + layer.out_features for layer in _queries_values(base).values())
    left = share - spent / count_base_parameters(base)
    if left <= 0:
        raise ValueError(
            f"A rank of 1 on queries and values trains {spent:,} parameters, all of the budget {share} of a "
            f"{type(base).__name__} or more, expected a larger budget, with room for FPS besides."
        )
    return selecting(bias="all")(base, left, seed)


def _queries_values(base: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in linear_layers(base).items() if name.endswith(QUERIES_VALUES)}


def _within(base: PreTrainedModel, share: float | None) -> list[str]:
    """Return the linear layers that a rank of 1 can train within the share: all, or attention's, or fewer of these."""
    assert share is not None
    layers = linear_layers(base)
    kinds = [("",), (*QUERIES_VALUES, "k_proj", "key"), QUERIES_VALUES]
    for endings in kinds:
        chosen = [name for name in layers if name.endswith(endings)]
        size = sum(layers[name].in_features + layers[name].out_features for name in chosen)
        if chosen and size <= share * count_base_parameters(base):
            return chosen
    raise ValueError(
        f"A rank of 1 on queries and values trains more than the budget {share} of a {type(base).__name__}, expected "
        "a larger budget for methods that train whole rows and columns."
    )


def linear_layers(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return all linear layers outside the output head by path."""
    heads = tuple(output_head(base))
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(heads)
    }


ARMS: dict[str, Arm] = {
    "linear": Arm("linear head, frozen model", None, False, ()),
    "full": Arm("full fine-tuning", None, False, FULL),
    "bitfit": Arm("BitFit", _bitfit, False),
    "lora": Arm("LoRA", _lora),
    "shira": Arm("SHiRA", _shira),
    "supertuning": Arm("Super-Tuning (PEFT)", _supertuning),
    "random": Arm("random", selecting(importance="random")),
    "magnitude": Arm("magnitude, as NeuroAda", selecting(importance="magnitude")),
    "fps": Arm("FPS", selecting()),
    "fps-input-rates": Arm("FPS, rates by input", selecting(), rates_by_input=True, varies=True),
    "gps": Arm("GPS, contrastive", selecting(importance="gradient", loss="contrastive")),
    "gps-task": Arm("GPS, cross-entropy", selecting(importance="gradient"), tuned_as="gps"),
    "fish-mask": Arm("FISH Mask", selecting(importance="fisher", granularity="model"), learning_rates=DENSE),
    "random-biases": Arm("random, with biases", selecting(importance="random", bias="all"), tuned_as="random"),
    "magnitude-biases": Arm(
        "magnitude, with biases", selecting(importance="magnitude", bias="all"), tuned_as="magnitude"
    ),
    "fps-biases": Arm("FPS, with biases", selecting(bias="all"), tuned_as="fps"),
    "fps-biases-lora": Arm(
        "FPS, with biases, and LoRA", _biases_beside_lora, beside=_lora_queries_values, varies=True
    ),
    "gps-biases": Arm(
        "GPS, with biases", selecting(importance="gradient", loss="contrastive", bias="all"), tuned_as="gps"
    ),
    "fps-l2": Arm("FPS, l2", selecting(norm="l2"), tuned_as="fps"),
    "fps-layer": Arm("FPS, layer", selecting(granularity="layer"), tuned_as="fps"),
    "fps-l2-layer": Arm("FPS, l2, layer", selecting(norm="l2", granularity="layer"), tuned_as="fps"),
    "fps-unweighted": Arm("FPS, activation alone", selecting(weight_magnitude=False), tuned_as="fps"),
    "fps-l2-unweighted": Arm(
        "FPS, l2, activation alone", selecting(norm="l2", weight_magnitude=False), tuned_as="fps"
    ),
    "fps-model": Arm("FPS, model", selecting(granularity="model"), learning_rates=DENSE, varies=True),
    "magnitude-layer": Arm(
        "magnitude, layer", selecting(importance="magnitude", granularity="layer"), tuned_as="magnitude"
    ),
    "sensitivity": Arm("sensitivity", selecting(importance="sensitivity")),
    "movement": Arm("movement", selecting(importance="movement")),
    "tr-pts": Arm("TR-PTS, parameters alone", selecting(importance="fisher", granularity="block", block_top=0.03)),
    **{
        f"fps-{images}-images": Arm(f"FPS, {images} images", selecting(), tuned_as="fps", images=images)
        for images in (8, 32, 128)
    },
    **{
        f"keep-{rate:g}-biases": Arm(
            f"FPS, with biases, keep rate {rate:g}", selecting(bias="all", token_keep_rate=rate), tuned_as="fps"
        )
        for rate in (0.9, 0.7, 0.5)
    },
    **{
        f"keep-{rate:g}-fixed-biases": Arm(
            f"FPS, with biases, keep rate {rate:g}, fixed blocks",
            selecting_at_quarters(bias="all", token_keep_rate=rate),
            tuned_as="fps",
        )
        for rate in (0.9, 0.7, 0.5)
    },
    "gate-biases": Arm("FPS, with biases, gated", selecting(bias="all", token_gate="threshold"), tuned_as="fps"),
    "fps-augmented": Arm("FPS, augmented images", selecting(), tuned_as="fps", augmented=True),
    **{
        f"try-{score}": Arm(
            f"try: {score}", selecting(importance="magnitude"), tuned_as="fps", choose=_by_score(score)
        )
        for score in SCORES
    },
    "fps-layer-biases": Arm("FPS, layer, with biases", selecting(granularity="layer", bias="all"), tuned_as="fps"),
    "fps-block-biases": Arm("FPS, block, with biases", selecting(granularity="block", bias="all"), tuned_as="fps"),
    "fps-bottom-biases": Arm("FPS, bottom, with biases", selecting(order="bottom", bias="all"), tuned_as="fps"),
    **{
        f"try-{choice}-biases": Arm(
            f"try: {choice}, with biases",
            selecting(importance="magnitude", bias="all"),
            tuned_as="fps",
            choose=_by_choice(choice),
        )
        for choice in CHOICES
    },
    **{
        name: Arm(label, how.build, tuned_as="fps", training=how) for name, (label, how) in TRAINING_CANDIDATES.items()
    },
}
"""All methods by the names of the command line."""
