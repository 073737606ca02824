"""Top-k with a rule for ties: of equal scores the lowest index wins, on every device and with any number of threads.

`torch.topk` leaves the order of ties open, and a stable sort costs many times more. So `torch.topk` ranks first. Only
where it meets equal scores, which are rare in float32 and common with bfloat16 weights, the index decides as well.
"""

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rank the k best columns of every row.

    Args:
        scores: `(rows, inputs)` float32, finite and not negative.
        k: number of columns, from 0 to `inputs`.

    Returns:
        Columns `(rows, k)` int64, best first, and their scores `(rows, k)`.
    """
    inputs = scores.shape[1]
    # one column more than asked for shows whether the last one is tied
    values, columns = scores.topk(min(k + 1, inputs), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero()[:, 0]
    if tied.numel():
        # bit patterns of non-negative floats have the order of the floats; the low half prefers the lower index
        index = torch.arange(inputs, device=scores.device)
        keys = scores[tied].view(torch.int32).to(torch.int64) << 32 | (inputs - 1 - index)
        columns[tied] = keys.topk(columns.shape[1], dim=1).indices
        values[tied] = scores[tied].gather(1, columns[tied])
    return columns[:, :k], values[:, :k]


def top_k_flat(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores.

    Args:
        scores: tensor of any shape.
        k: number of positions, from 0 to the number of scores.

    Returns:
        Positions in the flattened scores, increasing, `(k,)` int64.
    """
    flat = scores.reshape(-1)
    values, positions = flat.topk(min(k + 1, flat.numel()))
    if 0 < k < flat.numel() and bool(values[k - 1] == values[k]):
        above = (flat > values[k]).nonzero()[:, 0]
        level = (flat == values[k]).nonzero()[: k - above.numel(), 0]
        positions = torch.cat([above, level])
    return positions[:k].sort().values


def reversed_order(scores: Tensor) -> Tensor:
    """Return scores of the same shape in exactly the opposite order. Equal scores stay equal.

    Only their order has a meaning. They are float32, finite and not negative, like the given scores.

    Args:
        scores: float32, finite and not negative. -0.0 is not allowed.
    """
    # subtraction of bit patterns, which have the order of the floats, rounds nothing
    return (_LARGEST - scores.view(torch.int32)).view(torch.float32)


_LARGEST = 0x7F7FFFFF  # the bits of the largest finite float32
