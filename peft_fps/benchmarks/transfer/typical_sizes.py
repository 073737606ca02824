"""Typical sizes at every layer of a model: of its inputs, and of the loss's gradients at its outputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.benchmarks.transfer.class_scores import as_tokens
from peft_fps.calibration.statistics import column_sums
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import base_model, entry_layers, fps_layers


@dataclass
class Sizes:
    """Sums over all tokens of all images; float64.

    Attributes:
        inputs: of |a|, `(inputs,)`.
        squares: of a², `(inputs,)`.
        gradients: of |δ|, the gradient of an image's own loss at the outputs, `(neurons,)`; 0 without a backward pass.
        tokens: number of tokens.
    """

    inputs: Tensor
    squares: Tensor
    gradients: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, neurons: int, inputs: int) -> "Sizes":
        """Return sums over nothing."""

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return cls(zeros(inputs), zeros(inputs), zeros(neurons))

    @property
    def mean_input(self) -> Tensor:
        """Mean |a| of each input, `(inputs,)`."""
        return self.inputs / self.tokens

    @property
    def root_mean_square(self) -> Tensor:
        """Root mean square of each input, `(inputs,)`."""
        return (self.squares / self.tokens).sqrt()

    @property
    def mean_gradient(self) -> Tensor:
        """Mean |δ| at each output, `(neurons,)`."""
        return self.gradients / self.tokens


def gather_sizes(model: Any, data: Iterable[Mapping[str, Any]], backward: bool = False) -> dict[str, Sizes]:
    """Run the base model over data, and return the sizes at its adapted layers by path. The model is not changed.

    Args:
        model: a `PeftModel` with an FPS adapter.
        data: batches of `pixel_values` and `labels`.
        backward: whether gradients are gathered too. They are formed at the outputs alone: no weight gets a gradient,
            so a batch needs the memory of a frozen model.
    """
    layers = entry_layers(fps_layers(base_model(model)))
    found = {path: Sizes.empty(layer.shape.neurons, layer.shape.inputs) for path, layer in layers.items()}
    images = 0

    def observe(path: str, layer: EntryLayer) -> Callable[..., None]:
        def add_gradient(gradient: Tensor) -> None:
            last = gradient.movedim(1 if isinstance(layer.base_layer, nn.Conv2d) else -1, -1)
            found[path].gradients += images * column_sums(last, "l1")[0]  # the loss is a mean over images

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, _ = as_tokens(layer.base_layer, args[0].detach(), output.detach())
            found[path].tokens += x.shape[0] * x.shape[1]
            found[path].inputs += column_sums(x, "l1")[0]
            found[path].squares += column_sums(x, "l2")[0]
            if backward:
                if not output.requires_grad:  # nothing before it does
                    output.requires_grad_()
                output.register_hook(add_gradient)

        return hook

    was_training = model.training
    handles = [layer.register_forward_hook(observe(path, layer)) for path, layer in layers.items()]
    model.eval()
    try:
        with model.disable_adapter(), torch.set_grad_enabled(backward):
            for batch in data:
                images = len(batch["labels"])
                loss = model(**batch).loss
                if backward:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return found
