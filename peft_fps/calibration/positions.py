"""Positions of a layer's input that differ from those of the model's input: in their order, or in their number."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SEQUENCE_FIRST = {
    "xlnet": re.compile(r"\.ff\."),
    "fsmt": re.compile(r"\.((self|encoder)_attn\.|fc[12]$)"),
    "longformer": re.compile(r"\.(query|key|value)(_global)?$"),
    "led": re.compile(r"\.longformer_self_attn\.(query|key|value)(_global)?$"),
}
"""Paths of the layers that get `(positions, batch, inputs)`, by the model type of transformers."""


@dataclass(frozen=True)
class Positions:
    """How a model arranges the positions of its inputs.

    Attributes:
        sequence_first: paths of the layers that get `(positions, batch, inputs)`.
        multiple: the model pads sequences at their end to a multiple of this.
        frames: from numbers of samples of waveforms, or of steps of spectrograms, to numbers of frames behind the
            model's convolutions, or to None if they are not known. None if the batch has no such input.
    """

    sequence_first: re.Pattern[str] | None = None
    multiple: int = 1
    frames: Callable[[list[int]], list[int] | None] | None = None


def positions_of(model: nn.Module | None, batch: Mapping[str, Any], mask: Tensor | None) -> Positions:
    """Return how a model arranges the positions of a batch.

    Args:
        model: model that is called with the batch.
        batch: inputs of the model.
        mask: `(batch, positions)`, mask of its inputs, if there is one.
    """
    config = getattr(model, "config", None)
    window = getattr(config, "attention_window", None) or getattr(config, "block_size", None) or 1
    window = max(window) if isinstance(window, (list, tuple)) and window else window
    return Positions(
        SEQUENCE_FIRST.get(getattr(config, "model_type", "")),
        window if isinstance(window, int) else 1,
        None if model is None or mask is None or not _is_sound(batch, mask) else _frames(model),
    )


def _is_sound(batch: Mapping[str, Any], mask: Tensor) -> bool:
    """Return whether the mask is that of a waveform or a spectrogram."""
    if isinstance(batch.get("feature_attention_mask"), Tensor):  # then the other mask is that of texts
        return False
    sounds = (batch.get(name) for name in ("input_values", "input_features"))
    return any(isinstance(sound, Tensor) and mask.shape[1] in sound.shape[1:] for sound in sounds)


def _frames(model: nn.Module) -> Callable[[list[int]], list[int] | None] | None:
    """Return transformers' own way to count the frames behind a model's convolutions, None if it has none."""
    name = "_get_feat_extract_output_lengths"
    count: Any = next((getattr(module, name) for module in model.modules() if hasattr(module, name)), None)
    if count is None:
        return None
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}

    def frames(lengths: list[int]) -> list[int] | None:
        try:
            counts = [count(torch.tensor([length]), **options) for length in lengths]
            return [int(each[-1] if isinstance(each, tuple) else each) for each in counts]
        except Exception:  # a private method of others, of no fixed form; then no mask fits, which is said
            return None

    return frames


def fitted(mask: Tensor, shape: torch.Size, path: str, positions: Positions) -> Tensor | None:
    """Return a mask in the form of a layer's input, or None if it does not fit.

    Args:
        mask: `(batch, positions)` of the model's inputs.
        shape: of the layer's input, without its last dimension.
        path: module path of the layer.
        positions: how the model arranges positions.
    """
    first = positions.sequence_first is not None and positions.sequence_first.search(path) is not None
    for form in _forms(mask, positions):
        orders = (form.t(), form) if first else (form, form.t())
        for order in orders:
            if shape == order.shape:
                return order
        if len(shape) == 1 and shape[0] == form.numel() and form.shape[1] > 1:
            return orders[0]
    return None


def _forms(mask: Tensor, positions: Positions) -> Iterator[Tensor]:
    """Yield the forms `(batch, positions)` that a mask may have within the model."""
    yield mask
    length = mask.shape[1]
    padded = -(-length // positions.multiple) * positions.multiple
    if padded > length:
        yield F.pad(mask, (0, padded - length))
    if positions.frames is not None:
        counts = positions.frames([length, *(mask != 0).sum(1).tolist()])
        if counts is not None:
            kept = torch.tensor(counts[1:], device=mask.device)
            yield torch.arange(counts[0], device=mask.device) < kept[:, None]
