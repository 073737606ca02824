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

OF_TARGETS = ("tgt_key_padding_mask", "memory_key_padding_mask")
"""The same of the decoder of `nn.Transformer`, whose layers read both sequences."""

CROSS_ATTENTION = re.compile(
    r"(cross|encdec|encoder_?attn|encoder_decoder)([^.]*|.*\.(c_attn|(k|v|kv|key|value)(_proj)?))$", re.IGNORECASE
)
"""Paths of the modules of a decoder that read the states of the encoder."""

FOREIGN = re.compile(
    r"(^|[._])(vision(?!_language)|visual(?!_attention)|visn|image|pixel|audio|speech|connector|(multi_?modal_)?projector|r_layers)",
    re.IGNORECASE,
)
"""Paths of the modules that read images or sound beside texts, whose positions a mask of texts does not tell."""

LIKELY = re.compile(
    r"((input|inputs|text|tokens?|query|doc|document|passage|src|source|seq|sequence|words?)_)?masks?"
    r"|(attention|attn|padding|pad)_masks?_\w+|(?!global_|cross_|local_)\w+_(attention|attn|padding|pad)_masks?"
)
"""Names that masks of padding have in models that nobody here has written. What they hold is not known."""

READERS = {
    "attention_mask": None,
    "decoder_attention_mask": None,
    "encoder_attention_mask": CROSS_ATTENTION,
    "qformer_attention_mask": re.compile("qformer", re.IGNORECASE),
    **dict.fromkeys(("padding_mask", "entity_attention_mask", *INVERTED, *OF_TARGETS)),
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
            "aspect_ratio_mask",
        ),
        FOREIGN,
    ),
}
"""Masks of padding by name, and the paths of the modules that read what they mask; None for all modules.

`FOREIGN` holds where there are texts besides.

Others tell something else: what attention reads further away, what a loss counts, what is missing or to be predicted.
"""


def mask_named(batch: Mapping[str, Any], name: str) -> Tensor | None:
    """Return a mask as `(sequences, positions)`, zero at padding, or None if the batch has none of such a form.

    Ones and True allow a position to be read, as everywhere in transformers; numbers below zero are added to the
    scores of attention. Several texts per example, `(batch, texts, positions)`, go through the model as so many
    sequences. Of a mask of pairs, `(batch, positions, positions)` or `(batch, heads, positions, positions)`, a
    position counts that any other reads, or that reads itself and any other.

    Args:
        batch: inputs of the model.
        name: name of the mask.
    """
    mask = batch.get(name)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return None
    added = mask.is_floating_point() and bool((mask < 0).any())
    if mask.dim() == 2:
        return mask > MASKED if added else mask
    if mask.shape in _text_shapes(batch):
        return mask.flatten(0, -2)
    if mask.shape[-2] != mask.shape[-1]:
        return None
    added = added or (mask.is_floating_point() and not bool((mask > 0).any()))
    return _members(mask > MASKED if added else mask != 0)


def _members(is_read: Tensor) -> Tensor:
    """Return which positions count, `(batch, positions)`, from the pairs in which the first reads the second."""
    pairs = is_read.any(1) if is_read.dim() == 4 else is_read
    alone = torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
    if pairs.shape[-1] == 1:
        return pairs[..., 0]
    others = pairs & ~alone  # padding often reads itself, so that softmax gives numbers
    return others.any(1) | (others.any(2) & (pairs & alone).any(2))


def _text_shapes(batch: Mapping[str, Any]) -> list[torch.Size]:
    """Return the shapes of the texts of a batch, as tokens and as embeddings without their last dimension."""
    tokens, embedded = batch.get("input_ids"), batch.get("inputs_embeds")
    shapes = [tokens.shape] if isinstance(tokens, Tensor) else []
    return shapes + ([embedded.shape[:-1]] if isinstance(embedded, Tensor) else [])


def mask_of_inputs(batch: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """Return name and mask `(sequences, positions)` of the model's inputs, None if every position counts.

    Args:
        batch: inputs of the model.
    """
    mask = mask_named(batch, "attention_mask")
    if mask is not None or batch.get("attention_mask") is not None:
        return "attention_mask", mask
    for name in () if batch.keys() & {"tgt", *OF_TARGETS} else INVERTED:
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
    unread = {
        name: paths if paths is not FOREIGN or _has_texts(batch) else None
        for name, paths in READERS.items()
        if name not in read and isinstance(mask := batch.get(name), Tensor) and _varies(mask)
    }
    for name, mask in batch.items() if not read else ():
        if name not in READERS and LIKELY.fullmatch(name) and isinstance(mask, Tensor) and _is_likely(mask):
            unread[name] = None
    return unread


def _is_likely(mask: Tensor) -> bool:
    """Return whether a tensor may be a mask `(sequences, positions)` of padding; one of pairs is square."""
    if mask.dim() != 2 or mask.shape[0] == mask.shape[1] or not _varies(mask):
        return False
    return bool(((mask == 0) | (mask == 1)).all())


def _varies(mask: Tensor) -> bool:
    """Return whether not all elements of a mask are equal, so that some of them may be padding."""
    return mask.numel() > 0 and not torch.equal(mask, mask.flatten()[0].expand_as(mask))
