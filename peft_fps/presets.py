"""The settings of published methods by name: which entries they train, how they choose them, and how they train."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published method as settings of this package.

    Attributes:
        settings: fields of `FPSConfig`.
        recipe: arguments of transformers' `TrainingArguments`.
        source: where it was published.
        deviations: what differs from the paper or the authors' code, and what these leave open.
    """

    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    source: str
    deviations: str


ADAM = {"optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 0.0}
"""Adam: AdamW without weight decay, and without clipping."""

VTAB = ADAM | {
    "learning_rate": 2e-3,
    "num_train_epochs": 100,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
"""GPS's training on VTAB-1k: 100 epochs of 1,000 images, over the first 10 of which the learning rate rises."""

CLIPPED = {
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
}
"""As transformers' own scripts for GLUE train, on which several methods are built."""

TR_PTS = {
    **{"importance": "fisher", "fisher": "example", "granularity": "block", "block_top": 0.03},
    **{"per_neuron": 2, "bias": "all"},
}
"""TR-PTS's choice of parameters."""

TR_PTS_RECIPE = VTAB | {"learning_rate": 6e-4, "per_device_train_batch_size": 32, "warmup_steps": 0.2}

TR_PTS_OPEN = (
    "No official code; numbers are from a public working tree. C_min and M "
    "are not printed: M = 0.03 is the tree's, and K = 2 on average gives the paper's 0.34 % on VTAB-1k. Entries "
    "follow the paper's Fisher information, of every example; the tree squares the running sum of gradients and "
    "ranks within a neuron by GPS's score. The learning rate is the median of the logged VTAB-1k runs (3e-5 to "
    "7e-3); the tree trains the head alone first and often starts above the learning rate, which rises from 0 "
    "here."
)
"""What differs from TR-PTS's sources, or is open there, in its choice of parameters and its training."""

AGAINST_THE_BUDGET = ("budget", "per_neuron", "budget_pattern")
"""Fields of which a given one replaces all that a preset says about the number of entries."""

OF_AN_IMPORTANCE = (
    *("norm", "weight_magnitude", "fisher", "loss"),
    *("selection_learning_rate", "selection_epochs", "l0_penalty"),
)
"""Fields that a preset sets for its importance; another importance starts from the defaults."""

PRESETS: dict[str, Preset] = {
    "fps": Preset(
        {"importance": "activation", "norm": "l1", "granularity": "neuron", "per_neuron": 1, "bias": "all"},
        VTAB,
        "FPS, arXiv 2510.27359",
        "No code is public; the paper takes budget and training over from GPS without numbers per task, so both are "
        "GPS's for VTAB-1k. For FGVC the paper prints 0.77 %: `budget=0.0077`. Not stated, and so ours: inputs "
        "averaged over all tokens and images, evaluation mode, no augmentation while selecting.",
    ),
    "gps": Preset(
        {"importance": "gradient", "loss": "contrastive", "granularity": "neuron", "per_neuron": 1, "bias": "all"},
        VTAB,
        "GPS, arXiv 2312.10136",
        "K and learning rate are chosen per task in the scripts: K = 1 in 18 of 19 for VTAB-1k (0.25 %, head "
        "included), learning rates from 3e-4 to 1e-2, of which this is the median, batches of 16 or 32. The paper's "
        "0.77 % on FGVC does not follow from its scripts (1.07 %). They select in training mode with drop-path under "
        "float16 (here: float32 in evaluation mode unless `calibrate(training_mode=True)`), run 10 more epochs at "
        "1e-8, and keep the epoch that is best on the test set. No drop-path in transformers' ViT; on FGVC they add "
        "mixup, cutmix and label smoothing.",
    ),
    "tr-pts": Preset(
        TR_PTS | {"token_keep_rate": 0.95},
        TR_PTS_RECIPE,
        "TR-PTS, arXiv 2507.22872",
        f"{TR_PTS_OPEN} Tokens are selected by the paper's formula: ⌊ρN⌋ patches stay, and the others become their "
        "mean weighted by CLS attention; the tree keeps ⌈ρN⌉ and does not divide by the weights. ρ = 0.95 is the "
        "paper's in its comparison of placements; runs of the tree have 0.5 to 1. How many blocks, and which, the "
        'paper does not say beyond "where few parameters were selected": here three, with the fewest; the tree has '
        "always the 4th, 7th and 10th (`token_blocks=[3, 6, 9]`). Vision transformers with a head on CLS alone.",
    ),
    "tr-pts-parameters": Preset(
        TR_PTS,
        TR_PTS_RECIPE,
        "TR-PTS, arXiv 2507.22872",
        f"Parameters alone, no token selection, so for any model. {TR_PTS_OPEN}",
    ),
    "fish-mask": Preset(
        {"importance": "fisher", "fisher": "example", "granularity": "model", "budget": 0.005, "bias": "none"},
        CLIPPED | {"learning_rate": 3e-3, "num_train_epochs": 100, "per_device_train_batch_size": 16},
        "FISH Mask, arXiv 2111.09839",
        "Made for BERT on GLUE. There embeddings, normalisations and biases compete for the 0.5 % too, and the "
        "classifier counts; here weights of linear and convolutional layers alone, head left out. Fisher information "
        "is taken over all examples that `calibrate` gets, 1,024 in the paper. Ours are the epochs (GPS's) and the "
        "learning rate, the best of 1e-3, 3e-3 and 1e-2 (which diverges) in runs of 3 epochs on validation images; "
        "the source has 7 epochs at 5e-5, for GLUE.",
    ),
    "far": Preset(
        {
            **{"importance": "movement", "selection_learning_rate": 1e-4, "selection_epochs": 1},
            **{"granularity": "row", "budget": 0.0077, "bias": "all"},
        },
        VTAB | {"learning_rate": 3e-3},
        "FAR, arXiv 2205.01541",
        "From the abstract and secondary sources alone. Retention share, length of priming, optimizer, learning rates "
        "and treatment of layers other than the feed-forward ones are unknown to us. So the budget, an epoch of "
        "priming at 1e-4 and the recipe are ours: GPS's, with the better of 1e-3 and 3e-3 in runs of 2 epochs on "
        "validation images. Neurons of all targeted layers are candidates; FAR's are feed-forward nodes: name these "
        "in `target_modules`. All biases are trained, FAR's with their nodes. Learners are entries of a sparse change "
        "here, not separate layers, so FAR's savings of time do not apply.",
    ),
    "diff-pruning": Preset(
        {
            **{"importance": "l0", "l0_penalty": 1.25e-7, "selection_learning_rate": 1e-5, "selection_epochs": 3},
            **{"granularity": "model", "budget": 0.005, "bias": "none"},
        },
        CLIPPED | {"learning_rate": 3e-3, "num_train_epochs": 100, "per_device_train_batch_size": 8},
        "DiffPruning, arXiv 2012.07463",
        "Made for BERT on GLUE. There every parameter is gated, and the classifier counts in the 0.5 %; here weights "
        "of linear and convolutional layers alone, head left out. Its third phase starts from the ungated change of "
        "the first, here from 0. Its bisection to 0.5 % is a top-k of sizes here, under typical gates rather than "
        "the last sampled ones; no clipping while selecting. After selection, epochs (GPS's) and learning rate "
        "(that of fish-mask) are ours; the source has 3 epochs at 5e-5, for GLUE.",
    ),
    "bitfit": Preset(
        {"budget": 0, "bias": "with_norms"},
        CLIPPED
        | {
            **{"learning_rate": 1e-3, "num_train_epochs": 16, "per_device_train_batch_size": 8},
            **{"lr_scheduler_type": "constant"},
        },
        "BitFit, arXiv 2106.10199",
        "Made for BERT on GLUE; the recipe holds the defaults of the authors' code. Biases of linear and "
        "convolutional layers and of LayerNorms, as there, but for those of keys, which softmax cancels, so that they "
        "change nothing; biases that are parameters of other modules stay frozen.",
    ),
    "neuroada": Preset(
        {"importance": "magnitude", "granularity": "neuron", "per_neuron": 1, "bias": "none"},
        CLIPPED
        | {
            **{"learning_rate": 8e-3, "num_train_epochs": 100, "per_device_train_batch_size": 8},
            **{"warmup_steps": 0.1},
        },
        "NeuroAda, arXiv 2510.18940",
        "Made for Llama, whose query, key, value, output and feed-forward layers it targets; here all linear and "
        "convolutional layers but the head, which is trained whole. The recipe is that of the commonsense script for "
        "K = 1, with 100 epochs for 3, since vision tasks have few images; for K = 20 (`per_neuron=20`) the scripts "
        "have 7e-4 or 3e-3.",
    ),
    "super-tuning": Preset(
        {
            **{"importance": "magnitude", "order": "top", "granularity": "layer", "bias": "none"},
            **{"budget": 0.01, "budget_pattern": {".*": 0.01}},
        },
        VTAB | {"learning_rate": 1e-2},
        "Super-Tuning, arXiv 2607.09287, as in PEFT",
        "Selection as in PEFT's implementation, 1 % of every matrix (sparsity 0.99); its low-rank part (`r`) is left "
        "out. Made for Llama. We know no recipe of the paper: this one is GPS's, with the best learning rate of 1e-3, "
        "3e-3 and 1e-2 in runs of 2 epochs on validation images.",
    ),
}


def preset_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `FPSConfig` that a preset sets, `recipe` among them, with some of them replaced.

    Args:
        name: name of the preset.
        overrides: fields to replace. `budget` or `per_neuron` replaces everything that the preset says about the
            number of entries; `budget_pattern` replaces the pattern. An `importance` other than the preset's starts
            from the defaults of the fields that belong to an importance.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(map(repr, PRESETS))}.")
    preset = PRESETS[name]
    settings = deepcopy(dict(preset.settings)) | {"recipe": deepcopy(dict(preset.recipe))}
    dropped: set[str] = set()
    if {"budget", "per_neuron"} & set(overrides):
        dropped |= set(AGAINST_THE_BUDGET)
    if overrides.get("importance", settings.get("importance")) != settings.get("importance"):
        dropped |= set(OF_AN_IMPORTANCE)
    return {key: value for key, value in settings.items() if key not in dropped} | dict(overrides)


def recipe_line(recipe: Mapping[str, Any]) -> str:
    """Return training arguments on one short line. Arguments that no preset sets are left out."""
    parts = {
        "optim": "{}",
        "learning_rate": "learning rate {:g}",
        "adam_beta2": "beta2 {:g}",
        "weight_decay": "weight decay {:g}",
        "lr_scheduler_type": "{}",
        "warmup_steps": "warm-up {:.0%}",
        "num_train_epochs": "{} epoch" if recipe.get("num_train_epochs") == 1 else "{} epochs",
        "per_device_train_batch_size": "batches of {}",
        "max_grad_norm": "gradients clipped at {:g}" if recipe.get("max_grad_norm") else "no clipping",
        "label_smoothing_factor": "label smoothing {:g}",
    }
    return ", ".join(text.format(recipe[key]) for key, text in parts.items() if key in recipe).replace("%", " %")
