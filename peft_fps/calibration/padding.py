"""Masks of the positions that are padding in a batch of token sequences."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.calibration.batch_masks import (
    CROSS_ATTENTION,
    FOREIGN,
    PATCHES,
    READERS,
    mask_named,
    mask_of_inputs,
    mask_of_patches,
    unread_masks,
)
from peft_fps.calibration.positions import Positions, fitted, positions_of
from peft_fps.layers.embedding import looks_up_distances


IGNORED = -100
"""The label that losses leave out. Collators pad labels with it."""


DECODER = re.compile(r"(^|[._])decoder\.")
"""Paths of the modules of a decoder."""

UNPADDED = re.compile(r"(_global|\.relative_k_proj|\.linear_pos)$")
"""Paths of the layers that read selected positions, or relative ones: no padding is among them."""


@dataclass(frozen=True)
class Padding:
    """Masks `(batch, positions)` that are zero at padding. A mask is None if every position counts.

    Attributes:
        inputs: mask of the model's inputs. In an encoder-decoder, mask of the encoder's positions.
        decoder: mask of the decoder's positions.
        separate: whether the model is an encoder-decoder, so that one mask does not replace the other.
        positions: how the model arranges the positions within.
        foreign: whether the batch has inputs beside texts with positions of their own, such as images.
        of_foreign: mask of their positions.
        sequences: number of sequences that the masks tell of.
        name: name of the mask of the model's inputs.
        unread: names of other masks, and the paths of the modules that they concern; None for all modules.
    """

    inputs: Tensor | None = None
    decoder: Tensor | None = None
    separate: bool = False
    positions: Positions = field(default=Positions(), compare=False)
    foreign: bool = False
    of_foreign: Tensor | None = None
    sequences: int = field(default=0, compare=False)
    name: str = field(default="attention_mask", compare=False)
    unread: Mapping[str, re.Pattern[str] | None] = field(default_factory=dict)
    _fitted: dict[Any, Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def inputs_are_padded(self) -> bool:
        """Whether any position of the inputs is padding."""
        return self.inputs is not None and bool((self.inputs == 0).any())

    @cached_property
    def decoder_is_padded(self) -> bool:
        """Whether any position of the decoder is padding."""
        return self.decoder is not None and bool((self.decoder == 0).any())

    @cached_property
    def foreign_is_padded(self) -> bool:
        """Whether any position of the inputs beside texts is padding."""
        return self.of_foreign is not None and bool((self.of_foreign == 0).any())

    def is_shorter_than(self, x: Tensor) -> bool:
        """Whether the mask of the inputs has fewer positions than `x`, as where texts and images are one sequence.

        Args:
            x: input of a layer, `(batch, positions, inputs)`.
        """
        mask = self.inputs
        return mask is not None and x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] > mask.shape[1]

    @property
    def telling(self) -> tuple[str, ...]:
        """Names of masks that are not read, or that of the mask which is."""
        return tuple(self.unread) or (self.name,)

    def fitting(self, mask: Tensor, shape: torch.Size, path: str) -> Tensor | None:
        """Return one of the masks in the form of a layer's input, each time the same tensor; see `fitted`."""
        first = self.positions.sequence_first
        is_first = first is not None and first.search(path) is not None
        key = (mask is self.decoder, mask is self.of_foreign, shape, is_first)
        if key not in self._fitted:
            self._fitted[key] = fitted(mask, shape, path, self.positions)
        return self._fitted[key]


def padding_of(batch: Any, model: nn.Module | None) -> Padding:
    """Return the masks of a batch.

    An encoder-decoder needs no `decoder_attention_mask`. If the model builds its decoder inputs from labels, they end
    with the last label that is not -100. If the batch has decoder inputs, they end before the padding tokens at their
    end. If the model builds them from the encoder's inputs, both have the same padding.

    Args:
        batch: inputs of the model. Only a mapping has masks.
        model: model that is called with the batch. The config of a transformers model says whether it is an
            encoder-decoder.
    """
    if not isinstance(batch, Mapping):
        return Padding()
    name, inputs = mask_of_inputs(batch)
    decoder, separate = mask_named(batch, "decoder_attention_mask"), False
    of_foreign = None if name == PATCHES else mask_of_patches(batch)
    masks = {"decoder_attention_mask": decoder, PATCHES: of_foreign, name: inputs}
    unread = unread_masks(batch, {name for name, mask in masks.items() if mask is not None})
    config = _config(model)
    if getattr(config, "is_encoder_decoder", False):
        separate = True
        if decoder is None:
            decoder = _of_decoder_inputs(batch, inputs, getattr(config, "pad_token_id", None))
    return Padding(
        inputs,
        decoder,
        separate,
        positions_of(model, batch, inputs),
        foreign=of_foreign is not None or _has_foreign(batch, inputs if name == "attention_mask" else None),
        of_foreign=of_foreign,
        sequences=max(
            (len(mask) for key in READERS if isinstance(mask := batch.get(key), Tensor) and mask.dim()), default=0
        ),
        name=name,
        unread=unread,
    )


def _config(model: nn.Module | None) -> Any:
    """Return the config of a model, or that of the first model of transformers inside."""
    if model is None or hasattr(model, "config"):
        return getattr(model, "config", None)
    return next((part.config for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def _has_foreign(batch: Mapping[str, Any], mask: Tensor | None) -> bool:
    """Return whether a batch has inputs with positions of their own, such as images, of which no mask tells."""
    if mask is None:
        return False
    if isinstance(batch.get("feature_attention_mask"), Tensor):  # sound with a mask of its own
        return True
    return any(
        name.startswith("pixel_values")  # whose channels may be as many as a text has tokens
        or value.shape[:2] != mask.shape
        # those of Whisper are (batch, features, steps)
        and not (name == "input_features" and value.shape[2] == mask.shape[1])
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2
    )


def _of_decoder_inputs(batch: Mapping[str, Any], inputs: Tensor | None, pad_token: int | None) -> Tensor | None:
    """Derive the mask of an encoder-decoder's decoder positions, or return None if every position counts.

    Args:
        batch: inputs of the model without a `decoder_attention_mask`.
        inputs: mask of the encoder's positions.
        pad_token: id of the padding token, if known.
    """
    labels, given = _matrix(batch, "labels"), _matrix(batch, "decoder_input_ids")
    if labels is not None and not labels.is_floating_point() and (given is None or given.shape == labels.shape):
        return _until_last(labels != IGNORED)
    if given is not None:
        if pad_token is None:
            return None
        kept = _until_last(given != pad_token)
        kept[:, 0] = True  # many models start with the padding token
        return kept
    return inputs if batch.get("decoder_inputs_embeds") is None else None


def _until_last(counts: Tensor) -> Tensor:
    """Return a mask of all positions of a row up to the last one that counts.

    Positions before it that do not count, such as ignored labels within a text, are no padding.

    Args:
        counts: whether a position counts, `(batch, positions)` bool.
    """
    return counts.flip(1).cumsum(1).flip(1) > 0


def _matrix(batch: Mapping[str, Any], key: str) -> Tensor | None:
    """Return an item of a batch if it is a tensor of two dimensions, else None."""
    value = batch.get(key)
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def mask_of(x: Tensor, padding: Padding, path: str) -> Tensor | None:
    """Return the mask that fits a layer's input, or None if all its positions count.

    The mask of the decoder comes first for modules that read the decoder's states, else the mask of the inputs.

    Args:
        x: the input, `(..., inputs)`.
        padding: masks of the batch.
        path: module path of the layer that reads the input.
    """
    if padding.foreign and FOREIGN.search(path):
        return None if padding.of_foreign is None else padding.fitting(padding.of_foreign, x.shape[:-1], path)
    for mask in _masks(padding, path):
        fitting = padding.fitting(mask, x.shape[:-1], path)
        if fitting is not None:
            return fitting
    return None


def is_padding_unknown(x: Tensor, padding: Padding, path: str, *, flat: bool = False) -> bool:
    """Return whether padding may be among the positions of an input that no mask fits.

    Args:
        x: the input, `(..., inputs)`, or images `(batch, channels, height, width)`.
        padding: masks of the batch.
        path: module path of the layer that reads the input.
        flat: whether the input is `(rows, inputs)` whose rows are the positions of all sequences.
    """
    positions = (x.dim() > 2 and x.shape[:-1].numel() > max(x.shape[:-1])) or "expert" in path.lower()
    positions = positions or (flat and x.shape[0] > padding.sequences)
    if not positions or UNPADDED.search(path):
        return False
    reads_foreign = FOREIGN.search(path) is not None
    joint = padding.foreign and not reads_foreign and padding.is_shorter_than(x)
    if any(
        concerned is None or concerned.search(path) or (joint and concerned is FOREIGN)
        for concerned in padding.unread.values()
    ):
        return True
    if padding.foreign:
        return (joint and padding.inputs_are_padded) or ((joint or reads_foreign) and padding.foreign_is_padded)
    padded = {id(padding.inputs): padding.inputs_are_padded, id(padding.decoder): padding.decoder_is_padded}
    return any(padded[id(mask)] for mask in _masks(padding, path))


def mask_of_tokens(tokens: Tensor, padding: Padding, path: str) -> Tensor | None:
    """Return the mask that fits the tokens which an embedding gets, or None if all of them count.

    Args:
        tokens: `(batch, positions)`, or the positions that all samples share, `(1, positions)` or `(positions,)`.
        padding: masks of the batch.
        path: module path of the embedding.
    """
    if looks_up_distances(path):
        return None
    for mask in _masks(padding, path):
        if tokens.numel() == tokens.shape[-1] == mask.shape[1]:
            return mask
    return mask_of(tokens[..., None], padding, path)


def _masks(padding: Padding, path: str) -> Iterator[Tensor]:
    """Yield the masks that a module's input may have, the likeliest first."""
    reads_decoder = bool(DECODER.search(path)) and not CROSS_ATTENTION.search(path)
    masks = [padding.decoder, padding.inputs]
    if not reads_decoder:
        masks.reverse()
    yield from (mask for mask in (masks[:1] if padding.separate else masks) if mask is not None)
