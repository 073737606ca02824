import pytest
import torch

from peft_fps.benchmarks.cost.gradient_selection import VARIANTS, GradientSelection
from peft_fps.benchmarks.cost.random_models import batches


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
