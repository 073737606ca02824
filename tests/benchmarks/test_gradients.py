import math

import pytest
import torch

from peft_fps.benchmarks.gradients import VARIANTS, GradientSelection, supervised_contrastive
from peft_fps.benchmarks.models import batches


def test_contrastive_loss_against_its_definition():
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0])
    unit = [[value / math.hypot(*row) for value in row] for row in features.tolist()]
    dot = [[math.exp(sum(a * b for a, b in zip(one, other, strict=True)) / 0.07) for other in unit] for one in unit]
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        positive = [j for j in others if labels[j] == labels[i]]
        total = sum(dot[i][j] for j in others)
        losses.append(-sum(math.log(dot[i][j] / total) for j in positive) / len(positive))
    assert supervised_contrastive(features, labels).item() == pytest.approx(sum(losses) / 8)


def test_selection_takes_the_largest_accumulated_gradients(base):
    data = batches(base, 4, count=2)
    selected = GradientSelection(base, VARIANTS["gps-one-view"]).select(data)
    plain = base.requires_grad_(True).eval()
    for batch in data:
        plain(**batch).loss.backward()
    assert len(selected) == 13
    for name, columns in selected.items():
        gradients = plain.get_submodule(name).weight.grad.flatten(1).abs()
        kept = gradients.gather(1, columns).min(1).values
        assert torch.equal(
            (gradients > kept[:, None] * 1.001).sum(1).clamp(max=5), (gradients > kept[:, None] * 1.001).sum(1)
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_selects_and_keeps_no_gradients(base, name):
    selection = GradientSelection(base, VARIANTS[name])
    selected = selection.select(batches(base, 4, count=2))
    assert "classifier" not in selected
    assert all(columns.shape == (len(columns), 6) for columns in selected.values())
    assert all(parameter.grad is None for parameter in selection.model.parameters())
    assert selection.model.config._attn_implementation == ("eager" if name == "gps" else "sdpa")
