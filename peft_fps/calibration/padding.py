"""Which positions of a batch of token sequences are padding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


IGNORED = -100
"""The label that losses leave out, by which collators pad labels."""


@dataclass(frozen=True)
class Padding:
    """Masks `(batch, positions)`, zero where a position is padding; None where every position counts.

    Attributes:
        inputs: of what the model reads; in an encoder-decoder, of the encoder's positions.
        decoder: of the decoder's own positions.
        separate: whether the model is known to be an encoder-decoder, so that neither mask may stand in for the other.
    """

    inputs: Tensor | None = None
    decoder: Tensor | None = None
    separate: bool = False


def padding_of(batch: Any, model: nn.Module | None) -> Padding:
    """Return the masks of a batch.

    An encoder-decoder needs no `decoder_attention_mask`: where it builds its decoder inputs from the labels, those end
    with the last label that is not -100; given decoder inputs end before their closing padding tokens; built from the
    encoder's input, they are padded where that is.

    Args:
        batch: what goes to the model; anything but a mapping has no masks.
        model: called with it; a transformers model says whether it is an encoder-decoder.
    """
    if not isinstance(batch, Mapping):
        return Padding()
    inputs, decoder = _matrix(batch, "attention_mask"), _matrix(batch, "decoder_attention_mask")
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return Padding(inputs, decoder)
    if decoder is None:
        decoder = _of_decoder_inputs(batch, inputs, getattr(config, "pad_token_id", None))
    return Padding(inputs, decoder, separate=True)


def _of_decoder_inputs(batch: Mapping[str, Any], inputs: Tensor | None, pad_token: int | None) -> Tensor | None:
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


def _until_last(found: Tensor) -> Tensor:
    """Mask of all positions of a row up to the last one found: what is skipped within a text is no padding."""
    return found.flip(1).cumsum(1).flip(1) > 0


def _matrix(batch: Mapping[str, Any], key: str) -> Tensor | None:
    found = batch.get(key)
    return found if isinstance(found, Tensor) and found.dim() == 2 else None
