"""The options that say which weights are trained, each with its description."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from peft_fps.config import DEFAULT_BUDGET, FPSConfig
from peft_fps.importance import IMPORTANCES
from peft_fps.presets import PRESETS
from peft_fps.vision.option_types import SELECTION, described, one_of


SELECTION_FIELDS = ("budget", "per_neuron", "importance", "order", "loss", "granularity", "bias")
"""Options that are fields of the config."""

SELECTION_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(FPSConfig) if field.name in SELECTION_FIELDS
}
"""What the config has without these options."""

PRESET_NAMES = one_of(tuple(PRESETS), f"{{value!r}} is none of {', '.join(PRESETS)}.")
IMPORTANCE_NAMES = one_of(tuple(IMPORTANCES), f"{{value!r}} is not one of {', '.join(map(repr, IMPORTANCES))}.")


def without(field: str) -> str:
    """Return the sentence of `--help` on what holds where an option of the selection is not given."""
    return f"Default: {SELECTION_DEFAULTS[field]}, unless --preset is given."


Preset = Annotated[
    str | None,
    described(
        f"A published method with all its settings, those of training included: {', '.join(PRESETS)}. Other "
        "options replace single settings of it.",
        SELECTION,
        metavar="NAME",
        callback=PRESET_NAMES,
    ),
]

Budget = Annotated[
    float | None,
    described(
        "Largest share of the model's parameters to train, 0 to 1: selected weights and biases together, output "
        f"head left out. 0 trains biases alone. Default: {DEFAULT_BUDGET}, that is {DEFAULT_BUDGET:.2%}, unless "
        "--per-neuron or --preset is given.",
        SELECTION,
        metavar="SHARE",
    ),
]

PerNeuron = Annotated[
    float | None,
    described("Selected weights per output neuron, instead of --budget. K need not be whole.", SELECTION, metavar="K"),
]

ImportanceName = Annotated[
    str | None,
    described(
        "How a weight is scored. "
        + "; ".join(f"{name}: {importance.help}" for name, importance in IMPORTANCES.items())
        + f". {without('importance')}",
        SELECTION,
        metavar="NAME",
        callback=IMPORTANCE_NAMES,
    ),
]

Order = Annotated[
    Literal["top", "bottom"] | None,
    described(f"Select the largest or the smallest scores. {without('order')}", SELECTION),
]

Loss = Annotated[
    Literal["task", "contrastive"] | None,
    described(
        "What gradient, fisher and sensitivity take gradients of: cross-entropy with the classes, or the "
        "supervised contrastive loss between two augmented views of each image (GPS). "
        f"{without('loss')}",
        SELECTION,
    ),
]

Granularity = Annotated[
    Literal["neuron", "layer", "model", "block", "row", "column"] | None,
    described(
        "Within what the best weights are chosen. neuron: the best of each output neuron, equally many for all; "
        "layer: the best of each layer; model: the best of all; block: as neuron, with more in blocks that have "
        f"large scores; row, column: whole neurons or whole inputs. {without('granularity')}",
        SELECTION,
        metavar="NAME",
    ),
]

Bias = Annotated[
    Literal["all", "with_norms", "none"] | None,
    described(
        f"all: train the biases of the adapted layers; with_norms: those of LayerNorms too; none: no biases. "
        f"{without('bias')}",
        SELECTION,
    ),
]
