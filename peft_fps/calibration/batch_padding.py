"""The padding of a batch, read off its masks, labels and padding tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.calibration.batch_masks import (
    PATCHES,
    READERS,
    mask_named,
    mask_of_inputs,
    mask_of_patches,
    unread_masks,
)
from peft_fps.calibration.padding import Padding
from peft_fps.calibration.positions import positions_of


IGNORED = -100
"""The label that losses leave out. Collators pad labels with it."""


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
        root=_root_of_texts(model),
    )


def _config(model: nn.Module | None) -> Any:
    """Return the config of a model, or that of the first model of transformers inside."""
    return getattr(model if hasattr(model, "config") else _transformers_model(model), "config", None)


def _transformers_model(model: nn.Module | None) -> PreTrainedModel | None:
    """Return the model itself, or the first model of transformers inside."""
    parts = () if model is None else model.modules()
    return next((part for part in parts if isinstance(part, PreTrainedModel)), None)


def _root_of_texts(model: nn.Module | None) -> str:
    """Return the name before the paths of a model of transformers that reads texts first, else an empty one."""
    found = _transformers_model(model)
    # a tower of images that is called within another model says by its name, vision_model, what it reads
    return found.base_model_prefix if found is not None and found.main_input_name == "input_ids" else ""


def reads_beside_texts(part: Any, inputs: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Return whether a model of transformers inside another one reads images or sound, and the whole texts besides.

    No mask of the texts is one of its positions then, even if it fits.

    Args:
        part: the model inside.
        inputs: of its call.
        whole: of the call of the whole.
    """
    texts, own = {"input_ids", "inputs_embeds"}, part.main_input_name
    return own not in texts and inputs.get(own) is not None and bool(texts & whole.keys() - inputs.keys())


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
