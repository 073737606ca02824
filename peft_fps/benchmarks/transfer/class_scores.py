"""Scores from forward passes and labels that are tried against FPS and GPS; none is part of the adapter's config.

Each uses statistics of a layer's inputs and outputs by class, gathered in one pass, and the weights themselves.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import base_model, fps_layers
from peft_fps.saved_selection import Selection


@dataclass
class Moments:
    """Sums over images of a layer's inputs and outputs, each image averaged over its tokens; all float64.

    Attributes:
        counts: `(classes,)`, images of each class.
        inputs: `(classes, inputs)`, sums of the images' mean inputs.
        outputs: `(classes, neurons)`, likewise of outputs.
        token_sums: `(inputs,)`, sum of the inputs of all tokens.
        token_squares: `(inputs,)`, sum of their squares.
        tokens: number of tokens.
    """

    counts: Tensor
    inputs: Tensor
    outputs: Tensor
    token_sums: Tensor
    token_squares: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, classes: int, inputs: int, neurons: int) -> "Moments":
        """Return sums over nothing."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64)

        return cls(zeros(classes), zeros(classes, inputs), zeros(classes, neurons), zeros(inputs), zeros(inputs))

    def add(self, x: Tensor, y: Tensor, labels: Tensor) -> None:
        """Add a batch: inputs `(images, tokens, inputs)`, outputs `(images, tokens, neurons)`, labels `(images,)`."""
        means = x.double().mean(1)
        self.counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.inputs.index_add_(0, labels, means)
        self.outputs.index_add_(0, labels, y.double().mean(1))
        self.token_sums += x.double().sum((0, 1))
        self.token_squares += x.double().square().sum((0, 1))
        self.tokens += x.shape[0] * x.shape[1]

    @property
    def class_inputs(self) -> Tensor:
        """Mean input of each class that was seen, `(classes seen, inputs)`, centred over these classes."""
        return _centred(self.inputs, self.counts)

    @property
    def class_outputs(self) -> Tensor:
        """Mean output of each class that was seen, `(classes seen, neurons)`, centred over these classes."""
        return _centred(self.outputs, self.counts)

    def spread_of_classes(self) -> Tensor:
        """Standard deviation over classes of the class-mean input, `(inputs,)`."""
        return self.class_inputs.square().mean(0).sqrt()

    def spread_of_tokens(self) -> Tensor:
        """Standard deviation over all tokens, `(inputs,)`."""
        return (self.token_squares / self.tokens - (self.token_sums / self.tokens).square()).clamp_min(0).sqrt()


MomentScore = Callable[[Tensor, Moments], Tensor]


def _by_class_covariance(weight: Tensor, moments: Moments) -> Tensor:
    """Return |covariance over classes of mean output and mean input|, `(neurons, inputs)`."""
    return (moments.class_outputs.t() @ moments.class_inputs).abs() / len(moments.class_inputs)


SCORES: dict[str, MomentScore] = {
    "class-spread": lambda weight, moments: weight.abs() * moments.spread_of_classes(),
    "token-spread": lambda weight, moments: weight.abs() * moments.spread_of_tokens(),
    "class-covariance": _by_class_covariance,
    "weighted-covariance": lambda weight, moments: weight.abs() * _by_class_covariance(weight, moments),
    "output-spread": lambda weight, moments: (
        weight.abs() * moments.spread_of_classes() * moments.class_outputs.square().mean(0).sqrt()[:, None]
    ),
}
"""From a weight `(neurons, inputs)` and the moments of its layer to scores of the same shape; float64."""


def select_by(model: nn.Module, score: str, data: Iterable[Mapping[str, Any]], classes: int) -> None:
    """Give an FPS adapter the entries that are best by a score, as many and spread as its config says.

    Args:
        model: with an FPS adapter that is not trained.
        score: key of `SCORES`.
        data: batches of `pixel_values` and `labels`.
        classes: number of classes.
    """
    moments = gather_moments(model, data, classes)
    formula = SCORES[score]
    selection = Selection.from_scores(
        model, lambda path, weight: formula(weight.double(), moments[path]), importance=score
    )
    selection.apply(model)


@torch.no_grad()
def gather_moments(model: nn.Module, data: Iterable[Mapping[str, Any]], classes: int) -> dict[str, Moments]:
    """Run the model over data, adapters changing nothing yet, and return the moments of its layers by path."""
    found: dict[str, Moments] = {}
    labels = torch.empty(0)
    handles = []

    def observe(path: str, layer: FPSLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = as_tokens(layer.base_layer, args[0], output)
            if path not in found:
                found[path] = Moments.empty(classes, x.shape[-1], y.shape[-1])
            found[path].add(x, y, labels)

        return hook

    was_training = model.training
    model.eval()
    try:
        for path, layer in fps_layers(base_model(model)).items():
            assert isinstance(layer, nn.Module)
            handles.append(layer.register_forward_hook(observe(path, layer)))
        for batch in data:
            labels = batch["labels"]
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return found


def as_tokens(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs and outputs as `(images, tokens, features)`; a convolution's token is a patch."""
    if isinstance(layer, nn.Conv2d):
        assert isinstance(layer.padding, tuple)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2), y.flatten(2).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])


def _centred(sums: Tensor, counts: Tensor) -> Tensor:
    """Return means of the classes that were seen, `(classes seen, features)`, centred over these classes."""
    seen = counts > 0
    means = sums[seen] / counts[seen, None]
    return means - means.mean(0)
