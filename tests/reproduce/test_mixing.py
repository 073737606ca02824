import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.reproduce.mixing import MixingCollator, cutmix, mixup, smoothed, soft_cross_entropy
from peft_fps.vision.pixels import Collator


def test_smoothed_labels():
    shares = smoothed(torch.tensor([2, 0]), classes=4, smoothing=0.1)
    torch.testing.assert_close(shares, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_mixup_mixes_with_the_reverse_order():
    rows = torch.tensor([[0.0], [10.0], [100.0]])
    torch.testing.assert_close(mixup(rows, 0.75), torch.tensor([[25.0], [10.0], [75.0]]))


@given(st.floats(0, 1), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_cutmix_takes_every_pixel_of_one_image_and_counts_them(share, height, width, seed):
    torch.manual_seed(seed)
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, height, width).contiguous()
    mixed, stayed = cutmix(images, share)
    assert ((mixed == images) | (mixed == images.flip(0))).all()
    assert (mixed[0] == 0).double().mean().item() == pytest.approx(stayed)
    assert (mixed[2] == 2).double().mean().item() == pytest.approx(stayed)
    assert stayed >= share - 2 / min(height, width)
    assert (images[0] == 0).all()  # not in place


def test_the_box_is_one_rectangle_for_the_whole_batch():
    torch.manual_seed(3)
    images = torch.zeros(2, 3, 16, 16)
    images[1] = 1
    pasted = cutmix(images, 0.75)[0][0]
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted[0].bool(), rows[:, None] & columns[None, :])
    assert torch.equal(pasted[0], pasted[1])


def test_labels_of_mixed_batches_are_the_shares_of_the_images():
    torch.manual_seed(0)
    labels = [0, 1, 1, 0, 1]  # an image is as bright as its label
    examples = [{"pixel_values": torch.full((3, 8, 8), float(y)), "labels": torch.tensor(y)} for y in labels]
    collator = MixingCollator(Collator(interpolate=True), classes=2)
    kinds = set()
    for _ in range(40):
        batch = collator(examples)
        assert batch["interpolate_pos_encoding"] is True
        brightness = batch["pixel_values"].flatten(1).mean(1)
        expected = torch.stack([1 - brightness, brightness], 1) * 0.9 + 0.05
        torch.testing.assert_close(batch["labels"], expected)
        kinds.add(bool(((batch["pixel_values"] == 0) | (batch["pixel_values"] == 1)).all()))
    assert kinds == {True, False}  # CutMix and mixup


def test_soft_cross_entropy_is_the_mean_over_the_batch():
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 3.0]])
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    expected = 0.0
    for row, target in zip(logits.tolist(), shares.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        expected += sum(share * (log_sum - value) for value, share in zip(row, target, strict=True)) / 2
    for outputs in (SimpleNamespace(logits=logits), {"logits": logits}):
        assert float(soft_cross_entropy(outputs, shares, num_items_in_batch=2)) == pytest.approx(expected)
