"""Ways to train FPS with biases: the package's default, and what was tried beside it.

They differ in what is trained besides, at which rates, and how it is regularised. What is trained besides counts in
the budget, and the entries get the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peft_fps.base.head import output_head
from peft_fps.benchmarks.transfer.tried_choices import CHOICES
from peft_fps.config import FPSConfig
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.layer_types import entry_layer_class
from peft_fps.layers.lookup import fps_layers
from peft_fps.layers.norm import Norm, is_biased_norm
from peft_fps.selection.budget_allocation import exact
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.training.drop_path import add_drop_path
from peft_fps.training.parameter_groups import HEAD, parameter_groups
from peft_fps.vision.default_training import LOW_RATE, RECIPE


@dataclass(frozen=True)
class TrainingCandidate:
    """A way to train an adapter; the defaults are how every method is trained.

    Attributes:
        bias: which biases are trained, as `FPSConfig` says.
        options: further fields of `FPSConfig`.
        choice: key of `CHOICES`, by which entries are chosen; FPS's own if empty.
        norm_weights: whether the weights of LayerNorms are trained, in the base model itself.
        scales: whether each neuron of an adapted layer gets a trained factor 1 + γ of (W + ΔW) x, as in SSF
            (arXiv 2210.08823).
        bias_rate: learning rate of bias deltas as a multiple of that of entries.
        head_rate: learning rate of the output head as a multiple of that of entries.
        weight_decay: of all that is trained but the head, so that it draws to the base model.
        drop_path: rate of stochastic depth in the last block.
        fitted_head: whether the output head starts as the linear head that is fitted to the frozen model's features,
            rather than at random.
        centred: whether entries are trained as if their inputs had the mean 0; None: where possible, as the command.
        recipe: training arguments that differ.
        learning_rates: of entries, to choose from; those of `tuned_as` if empty.
        tuned_as: the method whose learning rate it takes.
    """

    bias: Literal["none", "all", "with_norms"] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    choice: str = ""
    norm_weights: bool = False
    scales: bool = False
    bias_rate: float = 1.0
    head_rate: float = 1.0
    weight_decay: float = 0.0
    drop_path: float = 0.0
    fitted_head: bool = False
    centred: bool | None = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    tuned_as: str = "fps"

    def build(self, base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
        """Return the config of FPS that trains a share of the backbone, what is trained besides included."""
        assert share is not None
        parameters = count_base_parameters(base)
        entries_and_biases = int(exact(share) * parameters) - self._besides(base)
        budget = (max(entries_and_biases, 0) + 0.5) / parameters
        importance = {"importance": "magnitude"} if self.choice else {}  # which needs no data
        return FPSConfig(budget=budget, bias=self.bias, seed=seed, **(importance | dict(self.options)))

    def _besides(self, base: PreTrainedModel) -> int:
        """Return how many numbers are trained beyond those that the config counts."""
        heads = tuple(output_head(base))
        modules = {name: module for name, module in base.named_modules() if not name.startswith(heads)}
        kinds = {name: kind for name, module in modules.items() if (kind := entry_layer_class(module)) is not None}
        norms = [module.weight.numel() for module in modules.values() if is_biased_norm(module)]
        scales = [kind.shape_of(modules[name]).neurons for name, kind in kinds.items()]
        return self.norm_weights * sum(norms) + self.scales * sum(scales)

    def prepare(self, model: nn.Module) -> None:
        """Add what the candidate says to a model whose entries are selected."""
        for layer in fps_layers(model).values():
            if self.norm_weights and isinstance(layer, Norm):
                layer.base_layer.weight.requires_grad_(True)
            if self.scales and isinstance(layer, EntryLayer):
                add_scale(layer)
        if self.drop_path:
            add_drop_path(model, self.drop_path)

    def optimizers(self, model: nn.Module, arguments: TrainingArguments) -> tuple[Any, None]:
        """Return the Trainer's own optimizer with the candidate's groups, None where nothing is grouped."""
        if self.bias_rate == self.head_rate == 1 and self.weight_decay == 0:
            return None, None
        rate = arguments.learning_rate
        groups = parameter_groups(model, rate, bias_lr=self.bias_rate * rate, head_lr=self.head_rate * rate)
        for group in groups:
            group["weight_decay"] = 0.0 if group["name"] in HEAD else self.weight_decay
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind(groups, **options), None


def scaled(y: Tensor, scale: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    """Return (1 + γ) · (y - b) + b: an output with another scale of what the weight gives.

    Args:
        y: output, with the neurons in dimension `channels`.
        scale: `(neurons,)`, γ.
        bias: `(neurons,)`, b, included in y; None if there is none.
        channels: dimension of the neurons, negative.
    """
    shape = (-1, *(1,) * (-channels - 1))
    product = y if bias is None else y - bias.to(y.dtype).view(shape)
    return y + scale.to(y.dtype).view(shape) * product


def add_scale(layer: EntryLayer) -> None:
    """Give each neuron of an FPS layer a trained scale γ, the parameter `output_scale`, at first 0."""
    base: Any = layer.base_layer
    layer.output_scale = nn.Parameter(base.weight.new_zeros(layer.neurons))
    channels = -3 if isinstance(base, nn.Conv2d) else -1

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        deltas = [module.fps_bias[name] for name in module.active_adapters if name in module.fps_bias]
        held = [] if base.bias is None else [base.bias]
        bias = sum([*held, *deltas]) if held or deltas else None
        return scaled(output, module.output_scale, bias, channels)

    layer.register_forward_hook(hook)


LOW_RATES: dict[str, Any] = {
    **{"bias_rate": LOW_RATE, "head_rate": LOW_RATE},
    "recipe": {"adam_beta2": RECIPE["adam_beta2"]},
}
"""What keeps the first steps from overshooting: biases and head move less, and large gradients are soon forgotten."""

CENTRED: dict[str, Any] = {**LOW_RATES, "centred": True}
"""The package's default, to which others are added."""

DEFAULT = TrainingCandidate(**{**CENTRED, "centred": None})
"""How `peft-fps finetune` trains."""

ADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("layer", {"options": {"granularity": "layer"}}),
    "block": ("block", {"options": {"granularity": "block"}}),
    "bottom": ("bottom", {"options": {"order": "bottom"}}),
    "norm-weights": ("weights and biases of norms", {"bias": "with_norms", "norm_weights": True}),
    "scales": ("scales", {"scales": True}),
    "drop-path": ("stochastic depth 0.1", {"drop_path": 0.1}),
    "decay": ("weight decay 0.1", {"weight_decay": 0.1}),
    **{choice: (choice, {"choice": choice}) for choice in CHOICES},
}
"""What is tried in addition to centred inputs and low rates: label and fields of the candidate by name."""

TRAINING_CANDIDATES: dict[str, tuple[str, TrainingCandidate]] = {
    "try-norms-biases": ("try: biases of norms", TrainingCandidate(bias="with_norms")),
    "try-norm-weights-biases": (
        "try: weights and biases of norms",
        TrainingCandidate(bias="with_norms", norm_weights=True),
    ),
    "try-scales": ("try: scales for biases", TrainingCandidate(bias="none", scales=True)),
    "try-scales-biases": ("try: scales", TrainingCandidate(scales=True)),
    "try-bias-rate-third": ("try: a third of the rate for biases", TrainingCandidate(bias_rate=1 / 3)),
    "try-bias-rate-triple": ("try: three times the rate for biases", TrainingCandidate(bias_rate=3.0)),
    "try-head-rate-third": ("try: a third of the rate for the head", TrainingCandidate(head_rate=1 / 3)),
    "try-head-rate-tenth": ("try: a tenth of the rate for the head", TrainingCandidate(head_rate=0.1)),
    "try-fitted-head": ("try: a fitted head", TrainingCandidate(fitted_head=True)),
    "try-fitted-head-third": (
        "try: a fitted head at a third of the rate",
        TrainingCandidate(fitted_head=True, head_rate=1 / 3),
    ),
    "try-fitted-head-tenth": (
        "try: a fitted head at a tenth of the rate",
        TrainingCandidate(fitted_head=True, head_rate=0.1),
    ),
    "try-drop-path": ("try: stochastic depth 0.1", TrainingCandidate(drop_path=0.1)),
    **{
        f"try-decay-{decay:g}": (f"try: weight decay {decay:g}", TrainingCandidate(weight_decay=decay))
        for decay in (0.01, 0.1)
    },
    "try-clip": ("try: gradients clipped at 1", TrainingCandidate(recipe={"max_grad_norm": 1.0})),
    "try-beta2": ("try: beta2 0.98", TrainingCandidate(recipe={"adam_beta2": 0.98})),
    "try-beta2-head-rate-tenth": (
        "try: beta2 0.98, a tenth of the rate for the head",
        TrainingCandidate(head_rate=0.1, recipe={"adam_beta2": 0.98}),
    ),
    "try-low-rates": ("try: low rates", TrainingCandidate(**LOW_RATES, learning_rates=(1e-2,))),
    "try-centred": ("try: centred inputs", TrainingCandidate(centred=True)),
    **{
        f"try-centred-{name}": (
            f"try: centred inputs, low rates, {label}",
            TrainingCandidate(**{**CENTRED, **changes}, tuned_as="fps-default"),
        )
        for name, (label, changes) in ADDED.items()
    },
}
"""Labels and candidates by the names of the command line."""
