"""Token selection follows the adapters of a model: added, switched, disabled, merged, deleted, saved and loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_fps import FPSConfig, Selection, hotswap_adapter
from peft_fps.tokens.token_placement import eligible
from tests.support.helpers import config, dense_change, fill, normal
from tests.tokens.vision_models import IMAGES, build, logits, naive_logits


def adapter(rate: float | None = 0.5, blocks: Any = (1, 3), **options: Any) -> FPSConfig:
    chosen = {} if rate is None else {"token_keep_rate": rate, "token_blocks": list(blocks)}
    return FPSConfig(**{"per_neuron": 1, "importance": "magnitude", **chosen, **options})


def adapted(rate: float | None = 0.5, name: str = "vit", **options: Any) -> PeftModel:
    model = get_peft_model(build(name), adapter(rate, **options))
    fill(model)
    return model.eval()


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return logits(model(IMAGES))


def wanted(model: PeftModel, rate: float, blocks: Any = (1, 3), name: str = "vit") -> Tensor:
    """What the formula gives for a model whose present adapters are merged into plain weights."""
    plain = copy.deepcopy(model)
    plain.set_token_keep_rate(1.0)
    return naive_logits(name, plain.merge_and_unload(), IMAGES, rate, blocks).detach()


def classes(model: Any) -> list[str]:
    return [type(module).__mro__[1].__name__ for module in model.modules() if hasattr(module, "token_switch")]


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_an_adapter_selects_tokens(name: str) -> None:
    model = adapted(name=name)
    torch.testing.assert_close(output(model), wanted(model, 0.5, name=name), rtol=1e-4, atol=1e-4)


def test_without_the_setting_no_module_and_no_hook_is_touched() -> None:
    model, plain = adapted(None), build("vit")
    assert [type(m) for m in model.base_model.model.vit.layers] == [type(m) for m in plain.vit.layers]
    assert classes(model) == []


def test_disabling_and_the_share_of_one_restore_the_plain_model_at_once() -> None:
    model, plain = adapted(), output(build("vit"))
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    selecting = output(model)
    model.set_token_keep_rate(1.0)
    assert torch.equal(output(model), output(copy.deepcopy(model).merge_and_unload()))
    model.set_token_keep_rate(0.5)
    assert torch.equal(output(model), selecting)


def test_adapters_have_their_own_settings() -> None:
    model = adapted()
    model.add_adapter("few", adapter(0.3, [2], modules_to_save=[]))
    model.add_adapter("all", adapter(None))
    for name in ("few", "all"):
        fill(model, name)
    for name, rate, blocks in (("default", 0.5, [1, 3]), ("few", 0.3, [2]), ("all", 1.0, [])):
        model.set_adapter(name)
        single = copy.deepcopy(model)
        for other in {"default", "few", "all"} - {name}:
            single.delete_adapter(other)
        if rate == 1.0:
            assert classes(single) == []
        else:
            torch.testing.assert_close(output(model), wanted(single, rate, blocks), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output(model), output(single))
    model.base_model.set_adapter(["default", "few"])
    states = model(IMAGES, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [17, 17, 10, 4, 3, 3]


def test_one_batch_cannot_mix_lengths() -> None:
    model = adapted()
    model.add_adapter("all", adapter(None))
    model.eval()
    with pytest.raises(ValueError, match=r"adapter_names holds \['default'\], which select tokens"):
        model(IMAGES, adapter_names=["default", "all", "all"])
    with torch.no_grad():  # the active adapter selects, and the adapters of the batch do not
        found = logits(model(IMAGES, adapter_names=["all", "__base__", "all"]))
    torch.testing.assert_close(found, output(build("vit")))
    assert torch.equal(output(model), output(adapted()))


def test_merging_in_place_and_unmerging_keep_selecting() -> None:
    model = adapted()
    before = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model), output(build("vit")))
    model.unmerge_adapter()
    assert torch.equal(output(model), before)


def test_unloading_and_deleting_leave_a_plain_model() -> None:
    assert classes(adapted().unload()) == []
    assert torch.equal(output(adapted().unload()), output(build("vit")))
    model = adapted()
    model.delete_adapter("default")
    assert classes(model) == []


def test_saving_and_loading_keep_the_blocks(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build("vit"), str(tmp_path)).eval()
    assert torch.equal(output(loaded), output(model))
    assert loaded.selection_report().token_blocks == (1, 3)
    card = (tmp_path / "README.md").read_text()
    assert "50 % of the patches stay in blocks 1, 3" in card
    other = adapted(0.3, blocks=[2])
    hotswap_adapter(other, str(tmp_path), "default")
    assert torch.equal(output(other), output(model))


def test_a_refused_file_leaves_the_plain_model(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    state = tmp_path / "adapter_config.json"
    state.write_text(
        state.read_text().replace('"selecting_blocks": [\n      1,\n      3\n    ]', '"selecting_blocks": [9]')
    )
    model = build("vit")
    with pytest.raises(ValueError, match=r"token_blocks names \[9\], expected indices from 0 to 4"):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert classes(model) == []


def test_tokens_are_not_selected_while_entries_are_chosen() -> None:
    batches = [{"pixel_values": IMAGES}]
    plain = get_peft_model(build("vit"), config(importance="activation"))
    model = get_peft_model(build("vit"), config(importance="activation", token_keep_rate=0.2, token_blocks=[0, 1, 2]))
    for each in (plain, model):
        each.calibrate(batches, progress=False)
    assert Selection.of(model).modules == Selection.of(plain).modules


def test_tensors_alone_do_not_say_which_blocks(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    fresh = get_peft_model(build("vit"), FPSConfig(per_neuron=1, token_keep_rate=0.5))
    with pytest.raises(ValueError, match=r"not calibrated, expected the indices .* token_blocks=\[...\]"):
        fresh.load_adapter(str(tmp_path), "default")
    named = get_peft_model(build("vit"), FPSConfig(per_neuron=1, token_keep_rate=0.5, token_blocks=[1, 3]))
    named.load_adapter(str(tmp_path), "default")
    with pytest.raises(ValueError, match="a selection holds no scores to choose them by"):
        Selection.of(named).apply(fresh)


def test_a_combination_needs_one_setting() -> None:
    model = adapted()
    model.add_adapter("same", adapter())
    model.add_adapter("all", adapter(None))
    fill(model, "same", seed=4)
    model.base_model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "mean", modules_to_save_from="same")
    model.set_adapter("mean")
    assert model.selection_report("mean").token_blocks == (1, 3)
    states = model(IMAGES, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [17, 17, 10, 10, 6, 6]
    with pytest.raises(ValueError, match="The adapters differ in token_keep_rate and token_blocks"):
        model.base_model.add_weighted_adapter(["default", "all"], [0.5, 0.5], "other")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_a_compiled_block_follows_the_adapters() -> None:
    torch._dynamo.reset()
    model, states = adapted(target_modules=["layers.1.mlp.fc1"]), normal(2, 17, 16)
    block = model.base_model.model.vit.layers[1]
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        assert compiled(states).shape[1] == 10
        torch.testing.assert_close(compiled(states), block(states))
        with model.disable_adapter():
            torch.testing.assert_close(compiled(states), build("vit").vit.layers[1](states))
        model.set_token_keep_rate(0.3)
        torch.testing.assert_close(compiled(states), block(states))


def test_training_reaches_the_values_through_the_selection() -> None:
    model = adapted().train()
    logits(model(IMAGES)).square().sum().backward()
    plain = copy.deepcopy(model)
    plain.set_token_keep_rate(1.0)
    merged = plain.merge_and_unload().requires_grad_()
    naive_logits("vit", merged, IMAGES, 0.5, (1, 3)).square().sum().backward()
    layer = model.base_model.model.vit.layers[1].attention.q_proj
    dense = merged.vit.layers[1].attention.q_proj.weight.grad
    expected = dense[dense_change(layer) != 0]
    torch.testing.assert_close(layer.fps_values["default"].grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("blocks", "indices"), [(12, range(2, 11)), (4, [2]), (3, [1]), (2, [0]), (1, [0])])
def test_the_first_two_and_the_last_block_are_not_chosen(blocks: int, indices: Any) -> None:
    assert list(eligible(blocks)) == list(indices)
