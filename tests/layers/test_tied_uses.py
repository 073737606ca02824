"""Modules that share the weight of an adapted embedding compute with its changes; it is trained and merged once."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartForConditionalGeneration, Gemma3ForCausalLM, Gemma3TextConfig

from peft_fps import FPSConfig
from peft_fps.layers.tied_uses import is_tied_use
from tests.layers.comparisons import activate, assert_adapter_gradients, compiled_alike, several_adapters
from tests.support.helpers import (
    _seeded,
    adapted,
    base_bytes,
    bits,
    dense_change,
    fill,
    layers_of,
    normal,
    selected_columns,
    tiny_gpt2,
    tokens,
    unchanged,
    with_fields,
)
from tests.support.language_models import bart_config, tiny_masked, tiny_t5


TOKENS, WIDTH = 9, 4
IDS = tokens(2, 5, vocabulary=TOKENS)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Offset(nn.Embedding):
    """Reads its weight in another way than by a lookup."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - self.weight.mean(0)


class Tied(nn.Module):
    """Words that are looked up in three ways, and written by the same weight."""

    def __init__(self, *, bias: bool = True, writes: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH)
        self.again, self.scaled, self.offset = (kind(TOKENS, WIDTH) for kind in (nn.Embedding, Scaled, Offset))
        self.mix, self.write = nn.Linear(WIDTH, WIDTH), writes(WIDTH, TOKENS, bias=bias)
        for module in (self.again, self.scaled, self.offset, self.write):
            module.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        read = self.words(x) + self.again(x).tanh() + self.scaled(x).sin() + self.offset(x).cos()
        return self.write(self.mix(read))


def tied() -> Tied:
    return _seeded(Tied)


def adapted_words(**options: Any) -> Any:
    return adapted(tied(), **({"target_modules": ["words"], "importance": "random"} | options))


def dense(model: Any, *names: str, base: Callable[[], nn.Module] = tied, path: str = "words") -> Any:
    """The plain model, with the changes added to the one weight that all uses have."""
    plain = base()
    with torch.no_grad():
        for name in names or ("default",):
            plain.get_submodule(path).weight += dense_change(layers_of(model)[path], name).float()
    return plain


def test_all_uses_see_the_change_and_its_gradient_is_the_sum_over_them() -> None:
    model = adapted_words().train()
    plain = dense(model).train()
    torch.testing.assert_close(model(IDS), plain(IDS))
    assert (plain(IDS) - tied()(IDS)).abs().max() > 0.1
    grad = normal(2, 5, TOKENS)
    model(IDS).backward(grad)
    plain(IDS).backward(grad)
    assert_adapter_gradients(model, plain, rtol=1e-4, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.words.fps_values.default"
    ]


def test_merging_disabling_and_unloading() -> None:
    model = adapted_words()
    expected, base, before = model(IDS), tied()(IDS), base_bytes(model)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(model(IDS), dense(model)(IDS))
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), base)
    model.unmerge_adapter()
    assert base_bytes(model) == before
    assert torch.equal(model(IDS), expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base)
    assert is_tied_use(model.base_model.model.write)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS), expected)
    assert merged.write.weight is merged.words.weight
    assert not any(module._forward_hooks for module in merged.modules())
    assert torch.equal(adapted_words().unload()(IDS), base)


def test_in_half_precision_too_a_merge_changes_nothing_that_counts() -> None:
    model = adapted(tied().bfloat16(), target_modules=["words"])
    before = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), before, rtol=0.02, atol=0.05)


def test_adapters_add_up_and_mix_in_a_batch() -> None:
    each = {"a": {"importance": "random"}, "b": {"per_neuron": 4}}
    model = several_adapters(tied(), each, target_modules=["words"])
    activate(model, "a", "b")
    torch.testing.assert_close(model(IDS), dense(model, "a", "b")(IDS))
    ids, names = tokens(4, 5, vocabulary=TOKENS), ["b", "__base__", "a", "b"]
    result = model(ids, adapter_names=names)
    for place, name in enumerate(names):
        alone = tied() if name == "__base__" else dense(model, name)
        torch.testing.assert_close(result[place], alone(ids)[place])
    model.delete_adapter("a")
    model.set_adapter("b")
    torch.testing.assert_close(model(IDS), dense(model, "b")(IDS))


def test_saving_loading_copying_and_pickling(tmp_path: Any) -> None:
    model = adapted_words()
    expected = model(IDS)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000
    torch.testing.assert_close(PeftModel.from_pretrained(tied(), tmp_path)(IDS), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), expected)
        fill(twin, seed=9)
        torch.testing.assert_close(twin(IDS), dense(twin)(IDS))
    assert torch.equal(model(IDS), expected)


def test_a_refused_file_leaves_no_hook_behind(tmp_path: Any) -> None:
    adapted_words().save_pretrained(tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    held = load_file(file)
    held["base_model.model.words.fps_values"][0] = torch.nan
    save_file(held, file)
    settings.write_text(json.dumps(with_fields(json.loads(settings.read_text()), tensors_sha256=None)))
    base = tied()
    with pytest.raises(ValueError, match="words: .*NaN"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(module._forward_hooks for module in base.modules())


def test_a_compiled_model_is_one_graph_with_the_same_results() -> None:
    base = tied()
    base.offset = base.again  # which would need a dense weight
    model = adapted(base, target_modules=["words"], importance="random")
    compiled_alike(model, IDS, warm=False)


def test_the_report_names_the_uses() -> None:
    model = adapted_words()
    assert model.selection_report().tied == {"words": ("again", "scaled", "offset", "write")}
    line = "tied weights: the changes of words count in again, scaled, offset, write too"
    assert line in str(model.selection_report())
    assert not any(name in ("words.weight", "write.weight") for name in model.selection_report().left_out)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_tokens_of_all_lookups_count() -> None:
    """In T5 the embedding that is adapted is never called: encoder and decoder have one each."""
    model = get_peft_model(tiny_t5(), FPSConfig(per_neuron=4, target_modules=["shared"]))
    layer: Any = layers_of(model)["shared"]
    with torch.no_grad():
        layer.base_layer.weight.fill_(1)
    read, mask = torch.tensor([[5, 5, 5, 7], [9, 9, 6, 6]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    written = torch.tensor([[8, 8, 8, 4], [8, 4, 3, 3]])
    batch = {"input_ids": read, "attention_mask": mask, "decoder_input_ids": written}
    model.calibrate([batch | {"decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}], progress=False)
    assert selected_columns(layer) == [[4, 5, 8, 9]] * 16  # 2, 3, 4 and 2 times; 7 once, 6 and 3 never


def test_gradients_of_all_uses_choose() -> None:
    plain, data = tied(), [IDS]
    for parameter in plain.parameters():
        parameter.requires_grad_()
    plain(IDS).square().mean().backward()
    best = plain.words.weight.grad.abs().topk(3, 0).indices.sort(0).values.t().tolist()
    options = {"importance": "gradient", "per_neuron": 3, "target_modules": ["words"]}
    model = get_peft_model(tied(), FPSConfig(**options))
    model.calibrate(data, progress=False, loss=lambda output, batch: output.square().mean())
    assert selected_columns(layers_of(model)["words"]) == best


class ReadsWithoutCalling(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.words(x)) @ self.write.weight.t()


def test_an_output_that_is_never_called_is_named() -> None:
    model = get_peft_model(_seeded(ReadsWithoutCalling), FPSConfig(per_neuron=2, target_modules=["words"]))
    with pytest.warns(UserWarning, match=r"^write: shares the weight of words .*was not called during calibration"):
        model.calibrate([IDS], progress=False)


# --- models of transformers -----------------------------------------------------------------------------------------


def tiny_gemma() -> Gemma3ForCausalLM:
    found = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return _seeded(lambda: Gemma3ForCausalLM(found))


def scaled_bart() -> BartForConditionalGeneration:
    return _seeded(lambda: BartForConditionalGeneration(bart_config(scale_embedding=True)))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (tiny_gpt2, "transformer.wte"),
    "gemma": (tiny_gemma, "model.embed_tokens"),
    "bert": (tiny_masked, "bert.embeddings.word_embeddings"),
    "t5": (tiny_t5, "shared"),
    "bart": (scaled_bart, "model.shared"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_language_models_calibrate_train_save_load_and_merge(kind: str, tmp_path: Any) -> None:
    build, path = MODELS[kind]
    ids = tokens(3, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = get_peft_model(build(), FPSConfig(per_neuron=3, target_modules=[path]))
    report = model.calibrate([batch], progress=False)
    head = "cls.predictions.decoder" if kind == "bert" else "lm_head"
    assert report.tied[path][-1] == head
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected, plain = model(**batch).logits, dense(model, base=build, path=path)
        torch.testing.assert_close(expected, plain(**batch).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, build()(**batch).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_weights_that_are_tied_again_are_the_same_ones(merged: bool, tmp_path: Path) -> None:
    """As transformers does when the base is saved, or its vocabulary changes: every use has the parameter itself."""
    base = tiny_gpt2()
    model = adapted(base, target_modules=["wte", "c_attn"])
    ids = tokens(2, 5, vocabulary=base.config.vocab_size)
    expected = model(input_ids=ids).logits
    expected.square().mean().backward()
    gradients = {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if merged:
        model.merge_adapter()
        expected = model(input_ids=ids).logits
    weight, state = base.transformer.wte.base_layer.weight, {name: bits(t) for name, t in base.state_dict().items()}
    base.tie_weights()
    assert base.lm_head.weight is base.transformer.wte.base_layer.weight is weight
    assert type(base.lm_head.weight) is nn.Parameter
    assert {name: bits(tensor) for name, tensor in base.state_dict().items()} == state
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    if not merged:
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        assert {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None} == gradients
    base.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert bits(kept["transformer.wte.base_layer.weight"]) == bits(weight)
    with pytest.raises(TypeError, match="Old embeddings are of type"):  # transformers' word, as with LoRA
        base.resize_token_embeddings(120)


def test_an_output_that_was_not_tied_is_not_tied_to_an_adapted_embedding() -> None:
    base = tiny_gpt2()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = adapted(base, target_modules=["wte"])
    before = base.lm_head.weight
    with unchanged(model), pytest.raises(ValueError, match=r"^transformer\.wte\.weight has an adapter.*Nothing was"):
        base.tie_weights()
    assert base.lm_head.weight is before
