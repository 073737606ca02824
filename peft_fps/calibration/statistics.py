"""Streaming sums of |a|, a² or a per input column; the first two are those of FPS (arXiv 2510.27359, eqs. 3 and 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor


RUN_ELEMENTS = 1 << 18
"""Elements of one float32 sum: few enough for its precision and for the cache, many enough for speed."""


@dataclass(frozen=True)
class Unmasked:
    """An input with padding that no mask of its batch fits.

    Attributes:
        shape: its shape.
        masks: names of the masks.
    """

    shape: tuple[int, ...]
    masks: tuple[str, ...]


@dataclass
class InputStatistics:
    """Running sums over the positions (tokens, patches) of a layer's input.

    Attributes:
        sums: sum of |a| (`norm="l1"`), of a² (`"l2"`) or of a (`"signed"`) of each input, `(groups, inputs)` float64
            (float32 on Apple's GPUs). Only grouped convolutions, whose neurons read different channels, and stacked
            weights have several groups.
        positions: number of summed positions; `(groups,)` int64 if the groups read different positions, as experts do.
        unmasked: an input whose padding counts, because no mask fits it. None if there was none.
    """

    sums: Tensor
    positions: int | Tensor = 0
    unmasked: Unmasked | None = None

    @classmethod
    def of_groups(cls, groups: int, x: Tensor) -> "InputStatistics":
        """Return statistics of no positions yet, for groups that read different positions.

        Args:
            groups: number of groups.
            x: `(..., inputs)`, an input of one of them; gives fan-in and device.
        """
        sums = torch.zeros(groups, x.shape[-1], dtype=wide_dtype(x.device), device=x.device)
        return cls(sums, torch.zeros(groups, dtype=torch.int64, device="cpu"))

    def typical(self, norm: str) -> Tensor:
        """Return the typical magnitude of each input, `(groups, inputs)` in the dtype of `sums`.

        Args:
            norm: `"l1"` for mean |a| (FPS, arXiv 2510.27359, eq. 3), `"l2"` for the root mean square (eq. 4).
        """
        return self.mean().sqrt() if norm == "l2" else self.mean()

    def mean(self) -> Tensor:
        """Return the mean of what was summed, `(groups, inputs)` in the dtype of `sums`."""
        counts = self.positions
        return self.sums / (
            counts.to(self.sums.device).clamp(min=1)[:, None] if isinstance(counts, Tensor) else max(counts, 1)
        )


def column_sums(x: Tensor, norm: str, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum |a|, a² or a of every input over all positions, without a copy of the activations.

    Args:
        x: activations, `(..., inputs)`.
        norm: `"l1"` for |a|, `"l2"` for a², `"signed"` for a.
        mask: `(...)`, zero at padding, which does not count. Default: all positions count.

    Returns:
        Sums `(inputs,)` in the dtype of `wide_dtype`, and the number of positions that count.
    """
    x = x.reshape(-1, x.shape[-1])
    total = x.new_zeros(x.shape[-1], dtype=wide_dtype(x.device))
    kept = None if mask is None else mask.reshape(-1).nonzero()[:, 0]
    count = x.shape[0] if kept is None else kept.numel()
    # float64 sums of short float32 sums, because long float32 sums lose precision
    length = max(RUN_ELEMENTS // max(x.shape[1], 1), 1)
    for first in range(0, count, length):
        run = x[first : first + length] if kept is None else x[kept[first : first + length]]
        run = run.to(torch.promote_types(x.dtype, torch.float32))
        total += summand(run, norm).sum(0).to(total.dtype)
    return total, count


def summand(x: Tensor, norm: str) -> Tensor:
    """Return |x| (`norm="l1"`), x² (`"l2"`) or x (`"signed"`)."""
    return x if norm == "signed" else x.abs() if norm == "l1" else x.square()


def add_rows(
    statistics: InputStatistics, group: int, x: Tensor, norm: str, mask: Tensor | None, *, gated: bool
) -> None:
    """Add inputs of one group.

    Args:
        statistics: with a tensor of `positions`.
        group: index of the group.
        x: `(rows, inputs)`.
        norm: as in `column_sums`.
        mask: `(rows,)`, zero at padding. None if all rows count.
        gated: rows that are zero do not count, since a gate has taken them from the group.
    """
    if gated:
        seen = (x != 0).any(1)
        mask = seen if mask is None else seen & mask.to(seen.device).bool()
    sums, positions = column_sums(x, norm, mask)
    statistics.sums[group] += sums
    statistics.positions[group] += positions  # type: ignore[index]


def check_dense(path: str, x: Tensor) -> None:
    """Raise ValueError if the input of the module at `path` is a nested tensor."""
    if x.is_nested:
        raise ValueError(
            f"{path}: its input is a nested tensor, expected a dense one. Build torch.nn.TransformerEncoder with "
            "enable_nested_tensor=False. Nothing was changed."
        )


def token_counts(tokens: Tensor, inputs: int, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Count how many positions hold each token. These are the sums of |a| and of a² of one-hot inputs.

    Args:
        tokens: integers from 0 to `inputs - 1`, `(...)`.
        inputs: number of tokens.
        mask: zero at padding, which does not count. It has as many elements as there are tokens, or the positions of
            several samples, `(batch, positions)`, of which all have these tokens. Default: all positions count.

    Returns:
        Counts `(inputs,)` in the dtype of `wide_dtype`, and the number of positions that count.
    """
    if mask is not None:
        kept = mask.bool()
        tokens = (tokens.reshape(kept.shape) if tokens.numel() == kept.numel() else tokens.expand_as(kept))[kept]
    flat = tokens.reshape(-1)
    return torch.bincount(flat, minlength=inputs).to(wide_dtype(flat.device)), flat.numel()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
