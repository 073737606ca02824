"""The maths of token selection, beside loops over images and tokens."""

import pytest
import torch
from torch import Tensor

from peft_fps.tokens.token_reduction import cls_attention, fuse_inattentive, kept_count
from tests.support.helpers import normal


def test_cls_attention_is_a_row_of_the_whole_attention() -> None:
    query, keys = normal(3, 2, 7, 5), normal(3, 2, 7, 5, seed=1)
    whole = torch.softmax(query @ keys.transpose(2, 3) * 0.7, dim=-1)
    torch.testing.assert_close(cls_attention(query[:, :, 0], keys, 0.7), whole[:, :, 0].mean(1))


def test_cls_attention_is_exact_in_half_precision_and_under_autocast() -> None:
    query, keys = normal(2, 2, 5), normal(2, 2, 7, 5, seed=1)
    half = cls_attention(query.bfloat16(), keys.bfloat16(), 1.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cls_attention(query.bfloat16().float(), keys.bfloat16().float(), 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cls_attention(query, keys, 1.0)
    assert torch.equal(inside, cls_attention(query, keys, 1.0))


@pytest.mark.parametrize(
    ("patches", "rate", "kept"),
    [(196, 0.7, 137), (10, 0.7, 7), (100, 0.29, 29), (10, 0.99, 9), (3, 0.1, 1), (5, 1.0, 5), (1, 0.5, 1)],
)
def test_the_floor_of_the_share_stays_and_at_least_one(patches: int, rate: float, kept: int) -> None:
    assert kept_count(patches, rate) == kept


def naive(x: Tensor, attention: Tensor, protected: int, kept: int) -> Tensor:
    rows = []
    for image, scores in zip(x, attention, strict=True):
        patches = range(protected, len(image))
        best = sorted(patches, key=lambda i: -float(scores[i].detach()))[:kept]
        rest = [i for i in patches if i not in best]
        fused = sum((scores[i] * image[i] for i in rest), torch.zeros_like(image[0])) / sum(scores[i] for i in rest)
        rows.append(torch.stack([*image[:protected], *(image[i] for i in sorted(best)), fused]))
    return torch.stack(rows)


@pytest.mark.parametrize(("protected", "rate", "kept"), [(1, 0.5, 4), (2, 0.9, 6), (1, 0.1, 1)])
def test_fusing_is_the_paper_s_formula_with_its_gradients(protected: int, rate: float, kept: int) -> None:
    x = normal(3, 9, 4).double().requires_grad_()
    attention = torch.softmax(normal(3, 9, seed=1).double(), dim=1).requires_grad_()
    found, wanted = fuse_inattentive(x, attention, protected, rate), naive(x, attention, protected, kept)
    torch.testing.assert_close(found, wanted)
    direction = normal(*wanted.shape, seed=2).double()
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, attention), direction),
        torch.autograd.grad(wanted, (x, attention), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_all_patches_stay_untouched() -> None:
    x = normal(2, 5, 3)
    assert fuse_inattentive(x, torch.full((2, 5), 0.2), 1, 1.0) is x


def test_patches_without_attention_give_a_finite_token() -> None:
    attention = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert torch.equal(fuse_inattentive(normal(1, 4, 3), attention, 1, 0.4)[0, -1], torch.zeros(3))
