"""Blocks that select tokens, beside a naive forward of each model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_fps.tokens.merged_tokens import select_tokens, set_token_keep_rate
from tests.support.helpers import COPIES, normal
from tests.tokens.vision_models import BLOCKS, IMAGES, MODELS, RATE, build, logits, naive_logits, vit


def selecting(name: str) -> Any:
    model = build(name)
    select_tokens(model, RATE, BLOCKS)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_formula(name: str) -> None:
    model, plain = selecting(name), build(name)
    found, wanted = logits(model(IMAGES)), naive_logits(name, plain, IMAGES)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, logits(plain(IMAGES)), atol=1e-3)
    direction = normal(*found.shape, seed=5)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    for (path, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_a_share_of_one_runs_the_plain_model(name: str) -> None:
    model = selecting(name)
    set_token_keep_rate(model, 1.0)
    assert torch.equal(logits(model(IMAGES)), logits(build(name)(IMAGES)))


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_attention_that_is_not_fused_gives_the_same(name: str) -> None:
    model = selecting(name)
    if name == "vit":
        model.set_attn_implementation("eager")
    else:
        for block in model.blocks:
            block.attn.fused_attn = False
    torch.testing.assert_close(logits(model(IMAGES)), logits(selecting(name)(IMAGES)))


def test_attentions_and_hidden_states_are_recorded() -> None:
    model = selecting("vit")
    model.set_attn_implementation("eager")
    output = model(IMAGES, output_attentions=True, output_hidden_states=True)
    assert [states.shape[1] for states in output.hidden_states] == [17, 17, 10, 10, 6, 6]
    assert [weights.shape[-1] for weights in output.attentions] == [17, 17, 10, 10, 6]


def gradients(model: Any) -> list[Tensor]:
    logits(model(IMAGES)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_gradient_checkpointing_changes_no_bit(name: str) -> None:
    model, plain = selecting(name).train(), selecting(name).train()
    if name == "vit":
        model.activation_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    assert all(map(torch.equal, gradients(model), gradients(plain)))


def test_autocast_chooses_by_exact_scores() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = logits(selecting("vit")(IMAGES))
    torch.testing.assert_close(output.float(), logits(selecting("vit")(IMAGES)), rtol=0.2, atol=0.2)


def test_copies_and_pickles_select_too() -> None:
    model = selecting("vit")
    for copied in COPIES.values():
        other = copied(model)
        assert torch.equal(logits(other(IMAGES)), logits(model(IMAGES)))
        set_token_keep_rate(other, 1.0)
        assert torch.equal(logits(other(IMAGES)), logits(build("vit")(IMAGES)))
        assert not torch.equal(logits(other(IMAGES)), logits(model(IMAGES)))


def test_masks_are_refused_by_the_block_that_they_meet() -> None:
    mask = torch.ones(3, 17)
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="vit.layers.1: found an attention mask while tokens are selected"):
        selecting("vit")(IMAGES, attention_mask=mask)
    with pytest.raises(ValueError, match="blocks.1: found an attention mask"):
        selecting("timm")(IMAGES, attn_mask=torch.ones(18, 18, dtype=torch.bool))
    model = vit().vit
    select_tokens(model, 0.5, [2])
    model.embeddings.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match="embeddings: found bool_masked_pos while tokens are selected"):
        model(IMAGES, bool_masked_pos=torch.ones(3, 16, dtype=torch.bool))
    set_token_keep_rate(model, 1.0)
    model(IMAGES, bool_masked_pos=torch.ones(3, 16, dtype=torch.bool))


def test_maps_of_fewer_patches_are_refused_even_where_their_number_fits() -> None:
    model = build("timm")
    whole = model.forward_intermediates(IMAGES)[1]
    select_tokens(model, 0.5, [2])  # 9 tokens of 16 numbers are 16 of 9
    for call in (model.forward_intermediates, lambda x: model.get_intermediate_layers(x, reshape=True)):
        with pytest.raises(ValueError, match="VisionTransformer: found a call for maps of patches"):
            call(IMAGES)
    assert [len(x[0]) for x in model.forward_intermediates(IMAGES, output_fmt="NLC")[1]] == [16, 16, 9, 9, 9]
    assert type(copy.deepcopy(model)).__name__ == "VisionTransformer"
    set_token_keep_rate(model, 1.0)
    for found, wanted in zip(model.forward_intermediates(IMAGES)[1], whole, strict=True):
        assert torch.equal(found, wanted)


def test_names_of_classes_stay() -> None:
    block = selecting("vit").vit.layers[1]
    assert [type(block).__name__, type(block.attention).__name__] == ["ViTLayer", "ViTAttention"]
    assert isinstance(block, type(build("vit").vit.layers[1]))
