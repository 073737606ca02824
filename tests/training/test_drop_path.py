import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_fps.training.drop_path import DropPath, add_drop_path


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes))


def test_examples_are_dropped_whole_and_the_others_scaled():
    torch.manual_seed(0)
    branch = torch.randn(4000, 2, 3)
    dropped = DropPath(0.25)(branch)
    zero = (dropped == 0).all(dim=(1, 2))
    assert zero.double().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~zero], branch[~zero] / 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype):
    assert DropPath(0.5)(torch.ones(4, 2, dtype=dtype)).dtype == dtype


def test_nothing_is_dropped_in_evaluation_or_at_rate_0():
    branch = torch.randn(5, 2)
    assert torch.equal(DropPath(0.9).eval()(branch), branch)
    assert torch.equal(DropPath(0.0)(branch), branch)


def test_rates_grow_from_block_to_block():
    model = vit()
    add_drop_path(model, 0.2)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_drop_path_stands_on_every_branch_and_nowhere_else(monkeypatch):
    model, pixels = vit(), torch.randn(2, 3, 16, 16)
    add_drop_path(model, 0.2)
    monkeypatch.setattr(DropPath, "forward", lambda self, branch: torch.zeros_like(branch))
    embedded = model.vit.embeddings(pixels)
    torch.testing.assert_close(model.vit(pixels).last_hidden_state, model.vit.layernorm(embedded))


def test_predictions_and_parameter_names_stay():
    model, plain, pixels = vit().eval(), vit().eval(), torch.randn(2, 3, 16, 16)
    add_drop_path(model, 0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(pixels).logits, plain(pixels).logits)
    assert not torch.equal(model.train()(pixels).logits, plain(pixels).logits)


def test_timms_blocks_get_both_modules():
    blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block in blocks:
        block.drop_path1 = block.drop_path2 = nn.Identity()
    add_drop_path(blocks, 0.3)
    assert [(block.drop_path1.rate, block.drop_path2.rate) for block in blocks] == [
        (0.0, 0.0),
        (pytest.approx(0.3), pytest.approx(0.3)),
    ]


def test_a_model_without_such_blocks():
    with pytest.raises(ValueError, match=r"A Sequential has no blocks .*ViTLayer.* or --drop-path 0"):
        add_drop_path(nn.Sequential(nn.Linear(2, 2)), 0.1)
