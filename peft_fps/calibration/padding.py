"""Which of the positions that a layer reads are padding."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peft_fps.calibration.batch_masks import CROSS_ATTENTION, FOREIGN
from peft_fps.calibration.positions import Positions, fitted
from peft_fps.layers.embedding import looks_up_distances


DECODER = re.compile(r"(^|[._])decoder\.")
"""Paths of the modules of a decoder."""

UNPADDED = re.compile(r"(_global|\.relative_k_proj|\.linear_pos)$")
"""Paths of the layers that read selected positions, or relative ones: no padding is among them."""


QUERIES = re.compile(r"(^|[._])(intermediate_query|output_query)(\.|$)|qformer\..*crossattention")
"""Paths of the layers that read the learned queries of a Q-Former, or images by them, and never its texts."""


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
        root: name of the attribute under which a model of transformers for texts has its body (`speecht5`,
            `visual_bert`); it tells nothing of what the modules read.
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
    root: str = field(default="", compare=False)
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

    def reads_foreign(self, path: str) -> bool:
        """Whether the module at a path reads inputs beside texts."""
        parts = [part for part in path.split(".") if part != self.root]
        return FOREIGN.search(".".join(parts)) is not None

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


def mask_of(x: Tensor, padding: Padding, path: str) -> Tensor | None:
    """Return the mask that fits a layer's input, or None if all its positions count.

    The mask of the decoder comes first for modules that read the decoder's states, else the mask of the inputs.

    Args:
        x: the input, `(..., inputs)`.
        padding: masks of the batch.
        path: module path of the layer that reads the input.
    """
    if QUERIES.search(path):
        return None
    if padding.foreign and padding.reads_foreign(path):
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
    if not positions or UNPADDED.search(path) or QUERIES.search(path):
        return False
    reads_foreign = padding.reads_foreign(path)
    joint = padding.foreign and not reads_foreign and padding.is_shorter_than(x)
    if any(
        concerned is None or (reads_foreign or joint if concerned is FOREIGN else concerned.search(path))
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
