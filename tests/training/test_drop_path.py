import pytest
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_fps.training import drop_path as module
from peft_fps.training.drop_path import DropPath, add_drop_path, drop_path
from tests.support.helpers import adapted, drop_path_rates


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
KINDS = {
    "vit": (ViTForImageClassification, ViTConfig),
    "deit": (DeiTForImageClassification, DeiTConfig),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config),
}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vit(kind: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    build, config = KINDS[kind]
    return build(config(num_labels=2, **SIZES)).eval()


def test_examples_are_dropped_whole_and_the_others_scaled():
    torch.manual_seed(0)
    branch = torch.randn(4000, 2, 3)
    dropped = drop_path(branch, 0.25)
    zero = (dropped == 0).all(dim=(1, 2))
    assert zero.double().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~zero], branch[~zero] / 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype):
    assert drop_path(torch.ones(4, 2, dtype=dtype), 0.5).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_rates_grow_from_block_to_block(kind):
    model = vit(kind)
    add_drop_path(model, 0.2)
    assert drop_path_rates(model) == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_on_every_branch_and_nowhere_else(kind, monkeypatch):
    model = vit(kind)
    backbone = getattr(model, kind)
    embedded = backbone.embeddings(PIXELS)
    add_drop_path(model, 0.2)
    monkeypatch.setattr(DropPath, "__call__", lambda self, module, args, branch: torch.zeros_like(branch))
    torch.testing.assert_close(backbone(PIXELS).last_hidden_state, backbone.layernorm(embedded))


@pytest.mark.parametrize("adapter", [{}, {"token_keep_rate": 0.5, "token_blocks": [1]}, None])
def test_it_acts_in_training_alone_and_can_be_taken_away(adapter):
    model = vit() if adapter is None else adapted(vit(), **adapter)
    expected, names = model(PIXELS).logits, list(model.state_dict())
    handles = add_drop_path(model, 0.5)
    assert len(drop_path_rates(model)) == 3
    assert torch.equal(model(PIXELS).logits, expected)
    assert not torch.equal(model.train()(PIXELS).logits, expected)
    assert list(model.state_dict()) == names
    for handle in handles:
        handle.remove()
    assert torch.equal(model(PIXELS).logits, expected)


def test_a_rate_of_0_draws_nothing(monkeypatch):
    model = vit().train()
    add_drop_path(model, 0.0)
    monkeypatch.setattr(module, "drop_path", None)
    model(PIXELS)


def test_timms_blocks_get_two():
    blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block in blocks:
        block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()
    add_drop_path(blocks, 0.3)
    assert drop_path_rates(blocks) == pytest.approx([0.0, 0.0, 0.3, 0.3])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"A Sequential has no blocks .*ViTLayer.* or leave drop-path out"):
        add_drop_path(nn.Sequential(nn.Linear(2, 2)), 0.1)
    with pytest.raises(ValueError, match=r"rate is 1.0, expected at least 0 and below 1"):
        add_drop_path(vit(), 1.0)
