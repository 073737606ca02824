"""Adapted embeddings compute what an embedding with W + ΔW computes, whatever they look up and wherever they are."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from peft_fps import FPSConfig, hotswap_adapter, rescale_adapter_scale
from peft_fps.layers import embedding
from tests.layers.comparisons import activate, assert_adapter_gradients, compiled_alike, several_adapters
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    dense_change,
    dense_reference,
    fill,
    layers_of,
    normal,
    selected_columns,
    tiny_bert,
    tiny_gpt2,
    tokens,
    unchanged,
)


TOKENS, SIZE, WIDTH = 9, (2, 5), 4
IDS = tokens(*SIZE, vocabulary=TOKENS)


class ReadsItsWeight(nn.Embedding):
    """Looks up, and reads its weight in another way too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.weight.mean(0)


class Slices(nn.Embedding):
    """As Whisper's positions."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[: input.shape[1]].expand(len(input), -1, -1)


class Frozen(nn.Embedding):
    """Looks up in a copy of its weight that was made before."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.copy = self.weight.detach().clone()

    def forward(self, input: Tensor) -> Tensor:
        return self.copy[input]


KINDS: dict[str, Callable[[], nn.Embedding]] = {
    "plain": lambda: nn.Embedding(TOKENS, WIDTH),
    "padding": lambda: nn.Embedding(TOKENS, WIDTH, padding_idx=4),
    "sparse": lambda: nn.Embedding(TOKENS, WIDTH, sparse=True),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(TOKENS, WIDTH, 0, embed_scale=3.0),
    "bart positions": lambda: BartLearnedPositionalEmbedding(TOKENS, WIDTH),
    "opt positions": lambda: OPTLearnedPositionalEmbedding(TOKENS, WIDTH),
    "reads its weight": lambda: ReadsItsWeight(TOKENS, WIDTH),
    "slices": lambda: Slices(TOKENS, WIDTH),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Text(nn.Module):
    """Tokens, looked up and then mixed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.mix = layer, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.words(x).tanh())


def text(kind: str = "plain") -> Text:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Text(KINDS[kind]()).eval()


def read(kind: str) -> Tensor:
    return (IDS > 3).long() if kind == "opt positions" else IDS


def with_words(kind: str = "plain", **options: Any) -> Any:
    options = {"target_modules": ["words"], "per_neuron": 3, "importance": "random"} | options
    return adapted(text(kind), **options)


# --- the product ----------------------------------------------------------------------------------------------------


@kinds
def test_forward_and_gradients_equal_those_of_a_dense_weight(kind: str) -> None:
    model, x = with_words(kind).train(), read(kind)
    plain = dense_reference(text(kind), model, ["default"]).train()
    result, expected = model(x), plain(x)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(expected, text(kind)(x), atol=1e-3)
    result.square().sum().backward()
    expected.square().sum().backward()
    assert_adapter_gradients(model, plain)
    assert layers_of(model)["words"].base_layer.weight.grad is None


@kinds
def test_merged_unmerged_and_disabled(kind: str) -> None:
    model, x = with_words(kind), read(kind)
    expected, before, base = model(x), base_bytes(model), text(kind)(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.unmerge_adapter()
    assert base_bytes(model) == before
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    merged = model.merge_and_unload()
    assert type(merged.words) is type(KINDS[kind]())
    assert torch.equal(merged(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too_a_merge_changes_nothing(dtype: torch.dtype) -> None:
    model = adapted(text().to(dtype), target_modules=["words"])
    expected = layers_of(model)["words"](IDS)
    model.merge_adapter()
    assert bits(layers_of(model)["words"](IDS)) == bits(expected)


@pytest.mark.parametrize("kind", ["plain", "scaled", "reads its weight"])
def test_hooks_of_the_base_layer_run_and_count(kind: str) -> None:
    model = with_words(kind)
    layers_of(model)["words"].base_layer.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    if kind == "plain":  # the change is looked up as the model asked
        base = text().words(IDS.flip(1))
        expected = base + dense_change(layers_of(model)["words"]).float()[IDS]
    else:
        expected = dense_reference(text(kind), model, ["default"]).words(IDS.flip(1))
    torch.testing.assert_close(layers_of(model)["words"](IDS), expected)


def test_a_lookup_alone_forms_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    monkeypatch.setattr(embedding.ProductLayer, "_changed_base", lambda *args, **kwargs: formed.append(args))
    for kind in ("scaled", "bart positions", "opt positions"):
        with_words(kind)(read(kind))
    assert not formed


@pytest.mark.parametrize("kind", ["plain", "padding", "scaled", "bart positions"])
def test_a_compiled_model_is_one_graph_with_the_same_results(kind: str) -> None:
    model, x = with_words(kind), read(kind)
    compiled_alike(model, x, warm=False)


def test_what_models_and_peft_read_off_the_layer() -> None:
    layer: Any = layers_of(with_words("scaled"))["words"]
    assert (layer.in_features, layer.out_features) == (TOKENS, WIDTH)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.scalar_embed_scale) == (9, 4, 0, 3.0)


# --- entries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "random"},
        {"importance": "magnitude", "granularity": "layer"},
        {"importance": "magnitude", "per_neuron": 20},
        {"importance": "magnitude", "granularity": "row", "per_neuron": 4},
        {"init_weights": False},
    ],
    ids=str,
)
def test_the_padding_token_gets_no_entry(options: dict[str, Any]) -> None:
    layer: Any = layers_of(get_peft_model(text("padding"), config(target_modules=["words"], **options)))["words"]
    assert layer.fps_values["default"].numel()
    assert not any(4 in row for row in selected_columns(layer))
    if options.get("per_neuron") == 20:
        assert selected_columns(layer) == [[0, 1, 2, 3, 5, 6, 7, 8]] * WIDTH


def test_calibration_counts_tokens_and_leaves_out_padding() -> None:
    """Scores against a count by hand; the tokens at masked places, all of them 8, are never chosen."""
    batches = [tokens(3, 6, vocabulary=8, seed=seed) for seed in range(2)]
    masks = [torch.ones_like(ids) for ids in batches]
    for ids, mask in zip(batches, masks, strict=True):
        ids[1, 4:], mask[1, 4:] = 8, 0

    class Masked(Text):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids) * attention_mask[..., None]

    torch.manual_seed(0)
    base = Masked(nn.Embedding(TOKENS, WIDTH, padding_idx=5))
    share = [0.0] * TOKENS
    for ids, mask in zip(batches, masks, strict=True):
        for token, counts in zip(ids.flatten().tolist(), mask.flatten().tolist(), strict=True):
            share[token] += counts / 32
    scores = (base.words.weight.abs() * torch.tensor(share)[:, None]).tolist()
    model = get_peft_model(base, FPSConfig(per_neuron=2, target_modules=["words"], modules_to_save=[]))
    data = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(batches, masks, strict=True)]
    report = model.calibrate(data, progress=False)
    for neuron, row in enumerate(selected_columns(layers_of(model)["words"])):
        allowed = [token for token in range(TOKENS) if token != 5]
        assert row == sorted(sorted(allowed, key=lambda token, n=neuron: -scores[token][n])[:2])
    assert report.unseen == {}
    model = get_peft_model(Masked(nn.Embedding(TOKENS, WIDTH)), FPSConfig(per_neuron=7, target_modules=["words"]))
    report = model.calibrate(data, progress=False)
    unseen = sum(share[token] == 0 for token in range(TOKENS))
    assert report.unseen == {"words": (7 - (TOKENS - unseen)) * WIDTH}
    assert f"at tokens that calibration never saw: {(7 - (TOKENS - unseen)) * WIDTH} entries of words" in str(report)


def test_positions_that_samples_share_count_once_for_each_sample_that_reaches_them() -> None:
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[0, 2:], mask[1, 3:] = 0, 0
    model = get_peft_model(tiny_gpt2(), FPSConfig(per_neuron=6, target_modules=["wpe"]))
    layer: Any = layers_of(model)["transformer.wpe"]
    with torch.no_grad():
        layer.base_layer.weight.fill_(1)
    model.calibrate([{"input_ids": ids, "attention_mask": mask}], progress=False)
    assert selected_columns(layer) == [[0, 1, 2, 3, 4, 5]] * 16


@pytest.mark.parametrize("importance", ["gradient", "fisher", "movement"])
@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_importances_of_gradients_select_tokens_that_were_read(kind: str, importance: str) -> None:
    x = torch.tensor([[3, 6, 3, 7]])
    options = {"importance": importance, "per_neuron": 3, "target_modules": ["words"], "modules_to_save": []}
    model = get_peft_model(text(kind), FPSConfig(**options))
    model.calibrate([x], progress=False, loss=lambda output, batch: output.square().mean())
    assert selected_columns(layers_of(model)["words"]) == [[3, 6, 7]] * WIDTH


# --- several adapters, batches of several, files --------------------------------------------------------------------


def with_two(build: Callable[[], nn.Module], targets: list[str]) -> Any:
    second = {"importance": "random", "per_neuron": 4}
    return several_adapters(build(), {"a": {}, "b": second}, target_modules=targets, modules_to_save=[])


def test_adapters_add_up_scale_and_combine() -> None:
    model = with_two(text, ["words"])
    activate(model, "a", "b")
    both = dense_reference(text(), model, ["a", "b"])(IDS)
    torch.testing.assert_close(model(IDS), both)
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model(IDS), dense_reference(text(), model, {"a": 0.5, "b": 0.5})(IDS))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS), both)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_gpt2, ["wte", "wpe"]), (tiny_bert, ["word_embeddings", "position_embeddings"])],
    ids=["gpt2", "bert"],
)
def test_a_batch_of_several_adapters(build: Callable[[], Any], targets: list[str]) -> None:
    model, x = with_two(build, targets), tokens(4)
    names = ["b", "__base__", "a", "b"]
    result = model(input_ids=x, adapter_names=names).logits
    for place, name in enumerate(names):
        alone = build() if name == "__base__" else dense_reference(build(), model, [name])
        torch.testing.assert_close(result[place : place + 1], alone(input_ids=x[place : place + 1]).logits)
    torch.testing.assert_close(
        model(input_ids=x, adapter_names=["a"] * 4).logits, dense_reference(build(), model, ["a"])(input_ids=x).logits
    )


def test_saving_loading_and_hot_swapping(tmp_path: Any) -> None:
    model = with_words("padding")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(text("padding"), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    other = with_words("padding", importance="magnitude")
    hotswap_adapter(other, str(tmp_path), "default")
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_peft_saves_no_whole_weight_of_a_target_by_these_names(name: str, tmp_path: Any) -> None:
    def build() -> nn.Module:
        base = text()
        base.get_input_embeddings = lambda: base.words
        return nn.ModuleDict({name: base.words})

    model = adapted(build(), target_modules=[name], modules_to_save=[])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(layers_of(loaded)[name](IDS), layers_of(model)[name](IDS))


def test_a_copy_is_independent() -> None:
    model = with_words("scaled")
    twin = copy.deepcopy(model)
    fill(twin, seed=9)
    assert not torch.equal(twin(IDS), model(IDS))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(tiny_gpt2(), target_modules=["wte", "wpe", "c_attn"])
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([layer.fps_values["default"].grad for layer in layers_of(model).values()])
    torch.testing.assert_close(found[0], found[1])


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], nn.Embedding], str]] = {
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm=1.0 makes every lookup write to the weight"),
    "frequencies": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
    "copy": (lambda: Frozen(9, 4), "the forward of Frozen does not follow its weight"),
    "one row": (lambda: nn.Embedding(1, 4, padding_idx=0), "only row is that of the padding token"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    base = Text(make())
    with unchanged(base), pytest.raises(ValueError, match=rf"^words: .*{message}"):
        get_peft_model(base, config(target_modules=["words"]))


def test_a_weight_of_torchao_is_refused() -> None:
    class TorchAOBaseTensor(torch.Tensor):
        pass

    TorchAOBaseTensor.__module__ = "torchao.utils"
    base = text()
    base.words._parameters["weight"] = base.words.weight.detach().as_subclass(TorchAOBaseTensor)
    with pytest.raises(ValueError, match=r"words: its weight is quantised by torchao"):
        get_peft_model(base, config(target_modules=["words"]))


def test_adapted_embeddings_are_not_resized() -> None:
    model = adapted(tiny_gpt2(), target_modules=["wte"])
    with unchanged(model), pytest.raises(ValueError, match=r"transformer\.wte: an adapter changes single entries"):
        model.resize_token_embeddings(60)
    other = adapted(tiny_gpt2(), target_modules=["c_attn"])
    assert other.resize_token_embeddings(60).weight.shape == (60, 16)
    model = with_words()
    layer: Any = layers_of(model)["words"]
    layer.base_layer.weight.data = normal(12, WIDTH)
    with pytest.raises(ValueError, match=r"words has 12 tokens, expected the 9 .*Resize token embeddings before"):
        model(IDS)


class Positions(nn.Module):
    """Adds a row for each position, as many as the batch has samples; with or without a batch axis."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.words, self.rows = nn.Embedding(TOKENS, WIDTH), layer

    def forward(self, x: Tensor) -> Tensor:
        own = type(self.rows).forward is not nn.Embedding.forward and not hasattr(self.rows, "fps_values")
        return self.words(x) + self.rows(x if own or hasattr(self.rows, "reads") else torch.arange(x.shape[1]))


def distances() -> nn.Module:
    return nn.Sequential(OrderedDict(relative_bias=nn.Embedding(TOKENS, WIDTH)))


class WithoutBatch(nn.Embedding):
    """As Whisper's decoder's positions."""

    reads = True

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[: input.shape[1]]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (distances, "relative_bias"),
        (lambda: Positions(nn.Embedding(TOKENS, WIDTH)), "rows"),
        (lambda: Positions(WithoutBatch(TOKENS, WIDTH)), "rows"),
    ],
    ids=["distances", "positions", "positions-without-batch"],
)
def test_positions_or_distances_that_all_samples_share_are_not_mixed(
    build: Callable[[], nn.Module], name: str
) -> None:
    shared = rf"{name} looks up positions or distances, which all samples share.*batch of their own"
    model, square = with_two(build, [name]), IDS[:, :2]
    with pytest.raises(ValueError, match=shared):
        model(square, adapter_names=["a", "b"])
    assert torch.equal(model(square, adapter_names=["a", "a"]), model(square))


def test_calibration_does_not_count_tokens_where_nothing_is_looked_up() -> None:
    asked = config(target_modules=["rows", "words"], importance="activation")
    model = get_peft_model(Positions(WithoutBatch(TOKENS, WIDTH)).eval(), asked)
    with pytest.warns(UserWarning, match=r"saw no input during calibration and will not be trained: rows"):
        model.calibrate([IDS], progress=False)
