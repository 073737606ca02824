"""Which tensors of a batch tell padding, in which form, and which of them are not understood here."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


MASKED = -5000.0
"""What is added to scores of attention where a position is not to be read: this or less. Some models add -10000."""

PATCHES = "pixel_attention_mask"
"""The mask of the patches of images of different sizes."""

INVERTED = ("src_key_padding_mask", "key_padding_mask")
"""Masks in PyTorch's form, which are True at padding."""

CROSS_ATTENTION = re.compile(r"(cross|encdec|encoder_?attn)([^.]*|.*\.(k|v|key|value)(_proj)?)$", re.IGNORECASE)
"""Paths of the modules of a decoder that read the states of the encoder."""

FOREIGN = re.compile(r"(^|[._])(vision|visual|image|pixel|audio|speech)", re.IGNORECASE)
"""Paths of the modules that read images or sound beside texts, whose positions a mask of texts does not tell."""

READERS = {
    "attention_mask": None,
    "decoder_attention_mask": None,
    "encoder_attention_mask": CROSS_ATTENTION,
    "qformer_attention_mask": re.compile("qformer", re.IGNORECASE),
    **dict.fromkeys(("padding_mask", "observed_mask", "past_observed_mask", *INVERTED)),
    **dict.fromkeys(
        (
            "pixel_mask",
            PATCHES,
            "vision_attention_mask",
            "visual_attention_mask",
            "feature_attention_mask",
            "input_features_mask",
            "input_values_mask",
            "padding_mask_videos",
        ),
        FOREIGN,
    ),
}
"""Masks of padding by name, and the paths of the modules that read what they mask; None for all modules.

`FOREIGN` holds where there are texts besides.

Others tell something else: what attention reads further away, what a loss counts, what is to be predicted.
"""


def mask_named(batch: Mapping[str, Any], name: str) -> Tensor | None:
    """Return a mask as `(sequences, positions)`, zero at padding, or None if the batch has none of such a form.

    Several texts per example, `(batch, texts, positions)`, go through the model as so many sequences. Of a mask of
    pairs, `(batch, positions, positions)` or `(batch, heads, positions, positions)`, a position counts that any other
    reads.

    Args:
        batch: inputs of the model.
        name: name of the mask.
    """
    mask, tokens = batch.get(name), batch.get("input_ids")
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return None
    if mask.dim() == 2:
        return mask
    if isinstance(tokens, Tensor) and tokens.shape == mask.shape:
        return mask.flatten(0, -2)
    if mask.shape[-2] != mask.shape[-1]:
        return None
    added = mask.is_floating_point() and not bool((mask > 0).any())
    is_read = mask > MASKED if added else mask != 0
    return is_read.any(tuple(range(1, mask.dim() - 1)))


def mask_of_inputs(batch: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """Return name and mask `(sequences, positions)` of the model's inputs, None if every position counts.

    Args:
        batch: inputs of the model.
    """
    mask = mask_named(batch, "attention_mask")
    if mask is not None or batch.get("attention_mask") is not None:
        return "attention_mask", mask
    for name in INVERTED:
        padding = batch.get(name)
        if isinstance(padding, Tensor) and padding.dim() == 2:
            return name, padding > MASKED if padding.is_floating_point() else padding == 0
    return ("attention_mask", None) if _has_texts(batch) else (PATCHES, mask_of_patches(batch))


def mask_of_patches(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the mask `(batch, patches)` of images of different sizes, or None if the batch has none."""
    mask = batch.get(PATCHES)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None  # that of pixels has more dimensions


def _has_texts(batch: Mapping[str, Any]) -> bool:
    return bool(batch.keys() & {"input_ids", "inputs_embeds"})


def unread_masks(batch: Mapping[str, Any], read: set[str]) -> dict[str, re.Pattern[str] | None]:
    """Return the masks of a batch that tell padding and are not read, with the paths that they concern; see `READERS`.

    Args:
        batch: inputs of the model.
        read: names of the masks that are.
    """
    return {
        name: paths if paths is not FOREIGN or _has_texts(batch) else None
        for name, paths in READERS.items()
        if name not in read and isinstance(mask := batch.get(name), Tensor) and _varies(mask)
    }


def _varies(mask: Tensor) -> bool:
    """Return whether not all elements of a mask are equal, so that some of them may be padding."""
    return mask.numel() > 0 and not torch.equal(mask, mask.flatten()[0].expand_as(mask))
