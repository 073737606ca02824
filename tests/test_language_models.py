"""Causal, masked and encoder-decoder language models, dense and of experts: calibration, training, tied embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from peft_fps import FPSCallback, FPSConfig
from peft_fps.calibration import Observed, Pass, observe
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import (
    base_bytes,
    bits,
    config,
    layers_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from tests.support.language_models import (
    SHORT,
    SOURCES,
    TARGETS,
    Batch,
    of_one_stack,
    of_two_stacks,
    padded,
    read,
    tiny_bart,
    tiny_bart_classifier,
    tiny_masked,
    tiny_mixtral,
    tiny_opt,
    tiny_qwen_moe,
    tiny_switch,
    tiny_t5,
)
from tests.training.trainers import arguments


KINDS = (nn.Linear, Conv1D)


def naive_inputs(base: nn.Module, singles: list[Batch]) -> dict[str, tuple[Tensor, int]]:
    """Sum of |a| per column, and number of positions, of every linear layer; one text after the other, all of it."""
    found: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, x: Tensor) -> None:
        rows = x.double().abs().reshape(-1, x.shape[-1])
        sums, positions = found.get(name, (torch.zeros(rows.shape[1], dtype=torch.float64), 0))
        found[name] = (sums + rows.sum(0), positions + len(rows))

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in base.named_modules()
        if isinstance(module, KINDS)
    ]
    with torch.no_grad():
        for single in singles:
            base(**single)
    for handle in handles:
        handle.remove()
    return found


def assert_padding_is_left_out(base: nn.Module, batches: list[Any], singles: list[Batch]) -> None:
    expected = naive_inputs(base, singles)
    layers = {
        name: Observed(module, module, 1, module.weight.shape[0 if isinstance(module, Conv1D) else 1])
        for name, module in base.named_modules()
        if isinstance(module, KINDS) and name in expected
    }
    found, counts = observe(base, layers, "l1", Pass(batches, progress=False))
    assert counts == {"batches": len(batches), "examples": len(singles)}
    heads = ("lm_head", "classification_head.dense", "classification_head.out_proj")
    for name in set(expected) - set(heads):
        sums, positions = expected[name]
        assert found[name].positions == positions, name
        torch.testing.assert_close(found[name].sums[0], sums, rtol=1e-4, atol=1e-5, msg=name)


ONE_STACK: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "gpt2": (tiny_gpt2, False),
    "llama": (tiny_llama, False),
    "llama, padded on the left": (tiny_llama, True),
    "opt": (tiny_opt, False),
    "masked bert": (tiny_masked, False),
    "bert classifier": (tiny_bert, False),
    "mixtral": (tiny_mixtral, False),
    "qwen-moe": (tiny_qwen_moe, False),
}


@pytest.mark.parametrize("kind", ONE_STACK)
def test_padding_counts_for_nothing(kind: str) -> None:
    build, left = ONE_STACK[kind]
    assert_padding_is_left_out(build(), *of_one_stack(left))


def test_a_mask_within_a_pair_counts_as_well() -> None:
    batches, singles = of_one_stack()
    assert_padding_is_left_out(tiny_llama(), [(batch, torch.zeros(2)) for batch in batches], singles)


@pytest.mark.parametrize("targets", [TARGETS, SHORT], ids=["equal-lengths", "different-lengths"])
@pytest.mark.parametrize("given", ["labels", "labels and inputs", "inputs", "inputs and mask"])
@pytest.mark.parametrize("build", [tiny_t5, tiny_bart], ids=["t5", "bart"])
def test_padding_counts_for_nothing_in_an_encoder_decoder(
    build: Callable[[], PreTrainedModel], given: str, targets: list[Tensor]
) -> None:
    model = build()
    assert_padding_is_left_out(model, *of_two_stacks(given, model, targets))


@pytest.mark.parametrize("labels", [{}, {"labels": torch.tensor([0, 1, 2, 1])}], ids=["no-labels", "classes"])
def test_padding_counts_for_nothing_where_the_decoder_reads_the_encoders_text(labels: Batch) -> None:
    rows = [torch.cat([row, torch.tensor([2])]) for row in SOURCES]  # the classifier reads at the end of the text
    assert_padding_is_left_out(tiny_bart_classifier(), [read(rows) | labels], [read([row]) for row in rows])


def test_without_its_own_mask_a_decoder_is_not_given_the_encoders() -> None:
    """Equally long, and no labels: every position of the decoder counts, every padded one of the encoder does not."""
    batch = read(SOURCES) | {"decoder_inputs_embeds": torch.ones(4, 6, 16)}
    model = tiny_t5()
    layers = {
        path: Observed(model.get_submodule(path), model.get_submodule(path), 1, 16)
        for path in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q")
    }
    found, _ = observe(model, layers, "l1", Pass([batch], progress=False))
    assert [statistics.positions for statistics in found.values()] == [6 + 3 + 1 + 5, 4 * 6]


# --- calibration through the model ----------------------------------------------------------------------------------

CALIBRATED: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], Any]]] = {
    "gpt2": (tiny_gpt2, lambda model: of_one_stack()),
    "llama": (tiny_llama, lambda model: of_one_stack(left=True)),
    "masked bert": (tiny_masked, lambda model: of_one_stack()),
    "bert classifier": (tiny_bert, lambda model: of_one_stack()),
    "t5 from labels": (tiny_t5, lambda model: of_two_stacks("labels", model, TARGETS)),
    "bart without loss": (tiny_bart, lambda model: of_two_stacks("inputs", model, TARGETS)),
}


@pytest.mark.parametrize("kind", CALIBRATED)
def test_calibration_from_token_batches_selects_as_from_unpadded_texts(kind: str) -> None:
    build, make = CALIBRATED[kind]
    batches, singles = make(build())
    chosen = []
    for data in (batches, singles):
        model = get_peft_model(build(), FPSConfig(per_neuron=3))
        report = model.calibrate(data, progress=False)
        assert f"over {len(singles)} examples" in report.method
        chosen.append(selection_of(model))
    assert chosen[0] == chosen[1]
    assert selection_of(get_peft_model(build(), config(per_neuron=3))) != chosen[0]


# --- training -------------------------------------------------------------------------------------------------------


def examples(kind: str) -> list[dict[str, Any]]:
    """Texts in which each token follows from the one before."""
    found = []
    for number in range(12):
        row = [3 + (number + step) % 20 for step in range(4 + number % 3)]
        labels = [token + 1 for token in row] if kind == "t5" else row
        found.append({"input_ids": row, "labels": number % 3 if kind == "bert classifier" else labels})
    return found


def collate(items: list[dict[str, Any]]) -> Batch:
    batch = read([torch.tensor(item["input_ids"]) for item in items])
    if isinstance(items[0]["labels"], int):
        return batch | {"labels": torch.tensor([item["labels"] for item in items])}
    return batch | {"labels": padded([torch.tensor(item["labels"]) for item in items], -100)}


TRAINED = {kind: ONE_STACK[kind][0] for kind in ("gpt2", "llama", "masked bert", "bert classifier")} | {"t5": tiny_t5}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", TRAINED)
def test_trainer_calibrates_trains_saves_and_loads(kind: str, tmp_path: Path) -> None:
    build = TRAINED[kind]
    model = get_peft_model(build(), FPSConfig(per_neuron=3))
    before, data = base_bytes(model), examples(kind)
    whole = collate(data)
    with torch.no_grad():
        first = float(model.eval()(**whole).loss)
    options = arguments(tmp_path, max_steps=20, learning_rate=0.05)
    Trainer(model, options, train_dataset=data, data_collator=collate, callbacks=[FPSCallback()]).train()
    with torch.no_grad():
        assert float(model.eval()(**whole).loss) < first - 0.02
    assert "12 examples" in model.selection_report().method
    assert base_bytes(model) == before
    assert all(bool(layer.fps_values["default"].any()) for layer in layers_of(model).values())

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    batch = collate(data[:4])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(build()(**batch).logits, expected, atol=1e-2)


# --- tied embeddings ------------------------------------------------------------------------------------------------

TIED: dict[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
    # model, output embeddings, input embeddings
    "gpt2": (tiny_gpt2, "lm_head", "transformer.wte"),
    "opt": (tiny_opt, "lm_head", "model.decoder.embed_tokens"),
    "masked bert": (tiny_masked, "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    "t5": (tiny_t5, "lm_head", "shared"),
    "bart": (tiny_bart, "lm_head", "model.shared"),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_tied_embeddings_are_left_alone_and_counted_once(kind: str, targets: str | None) -> None:
    build, head, embeddings = TIED[kind]
    base = build()
    assert base.get_submodule(head).weight is base.get_submodule(embeddings).weight
    model = get_peft_model(base, config(target_modules=targets))
    assert head not in layers_of(model)
    assert not any("embed" in path for path in layers_of(model))
    sizes = {name: p.numel() for name, p in build().named_parameters() if not name.startswith(f"{head}.")}
    assert f"{embeddings}.weight" in sizes
    assert model.selection_report().base_parameters == sum(sizes.values())


@pytest.mark.parametrize("kind", TIED)
def test_targeted_tied_output_embeddings_are_refused(kind: str) -> None:
    build, head, embeddings = TIED[kind]
    base = build()
    before = {name: bits(parameter) for name, parameter in base.named_parameters()}
    advice = rf"exclude_modules.*name the embedding {embeddings}, whose changes count in both"
    with pytest.raises(ValueError, match=rf"{head}\.weight is the same tensor as .*tied weights.*{advice}"):
        get_peft_model(base, config(target_modules=[head]))
    both = rf"same tensor as {embeddings}.weight .*target_modules names both, .*Name {embeddings} alone"
    with pytest.raises(ValueError, match=both):
        get_peft_model(base, config(target_modules=[head, embeddings]))
    assert {name: bits(parameter) for name, parameter in base.named_parameters()} == before
    assert not any(isinstance(module, PeftModel) or "fps" in name for name, module in base.named_modules())


def test_output_embeddings_of_their_own_can_be_targeted() -> None:
    model = get_peft_model(tiny_llama(), config(target_modules=["lm_head"]))
    assert set(layers_of(model)) == {"lm_head"}


# --- mixtures of experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "linear"), [(tiny_mixtral, []), (tiny_qwen_moe, ["shared_expert"])])
def test_packed_experts_are_adapted_beside_linear_layers(
    build: Callable[[], PreTrainedModel], linear: list[str]
) -> None:
    base = build()
    packed = {name for name, _ in base.named_parameters() if name.endswith(("gate_up_proj", "experts.down_proj"))}
    found = layers_of(get_peft_model(base, config())).keys()
    assert packed <= found
    assert len(packed) == 4
    rest = found - packed
    assert all("self_attn" in path or any(part in path for part in linear) for path in rest)
    assert bool(linear) == any("shared_expert" in path for path in rest)


def test_packed_experts_are_adapted_where_blocks_are_chosen() -> None:
    found = layers_of(get_peft_model(tiny_mixtral(), config(layers_to_transform=1)))
    assert {path for path in found if "experts" in path} == {
        f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }


def test_no_word_of_experts_where_targets_are_chosen_loaded_or_linear(tmp_path: Path) -> None:
    model = get_peft_model(tiny_mixtral(), config(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_mixtral(), tmp_path)
    get_peft_model(tiny_switch(), config())
    get_peft_model(tiny_llama(), config())


def test_packed_experts_as_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts is a MixtralExperts, expected one of Linear"):
        get_peft_model(tiny_mixtral(), config(target_modules=["experts"]))


def test_experts_without_a_token_are_named_and_not_trained() -> None:
    base = tiny_switch()
    with torch.no_grad():
        for name, module in base.named_modules():
            if name.endswith("router.classifier"):
                module.weight.zero_()  # the first of equals gets every token
    idle = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and any(f"expert_{number}." in name for number in (1, 2, 3))
    ]
    model = get_peft_model(base, FPSConfig(per_neuron=2))
    batch = {"input_ids": tokens(), "labels": tokens(seed=3)}
    with pytest.warns(UserWarning, match="saw no input") as caught:
        model.calibrate([batch], progress=False)
    message = str(caught[0].message)
    assert message.startswith(f"{len(idle)} of {len(layers_of(model))} modules saw no input")
    assert f"will not be trained: {', '.join(idle)}." in message
    assert all(layers_of(model)[name].fps_values["default"].numel() == 0 for name in idle)
    assert len(idle) == 2 * 3 * 2
    model(**batch).loss.backward()  # a warning would be an error
