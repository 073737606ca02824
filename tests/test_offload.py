"""Language models placed by `device_map`, in part on disk: indices and values stay where their weights are used.

And what loading takes in memory.

On one CPU "disk" is the only place that differs from the processor's memory; accelerate brings such weights, which are
on the meta device otherwise, for each call of their module.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from peft_fps import FPSConfig
from tests.calibration.naive_fps import selection_of
from tests.support.forked import run_program
from tests.support.helpers import fill, layers_of, tiny_gpt2, tiny_llama, tokens
from tests.support.language_models import of_one_stack, of_two_stacks, texts, tiny_t5


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

Placed = Callable[[], PreTrainedModel]

KINDS: dict[str, tuple[Callable[[], PreTrainedModel], Any, str, str]] = {
    # model, its auto class, the block that lies on disk, and what lies in memory
    "llama": (
        tiny_llama,
        AutoModelForCausalLM,
        "model.layers.0",
        "model.embed_tokens model.layers.1 model.norm model.rotary_emb lm_head",
    ),
    "gpt2": (
        tiny_gpt2,
        AutoModelForCausalLM,
        "transformer.h.1",
        "transformer.wte transformer.wpe transformer.drop transformer.h.0 transformer.ln_f lm_head",
    ),
    "t5": (
        tiny_t5,
        AutoModelForSeq2SeqLM,
        "decoder.block.1",
        "shared encoder decoder.embed_tokens decoder.block.0 decoder.final_layer_norm decoder.dropout lm_head",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def placed(kind: str, tmp_path: Path) -> Placed:
    """Builds the base model, a block of it on disk."""
    build, auto_class, block, others = KINDS[kind]
    build().save_pretrained(tmp_path / "base")
    device_map = dict.fromkeys(others.split(), "cpu") | {block: "disk"}

    def load() -> PreTrainedModel:
        model = auto_class.from_pretrained(
            tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
        )
        away = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
        assert away
        assert all(name.startswith(block) for name in away)
        return model

    return load


def batches(kind: str) -> list[dict[str, Tensor]]:
    return of_two_stacks("labels", tiny_t5(), texts(2, 6, 4, 3))[0] if kind == "t5" else of_one_stack()[0]


def example() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens(seed=4)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**example()).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def places(model: nn.Module) -> set[str]:
    """Devices of everything that adapters hold."""
    held = (
        tensor
        for layer in layers_of(model).values()
        for tensors in (layer.fps_values, layer.fps_bias, layer.fps_columns, layer.fps_row_counts)
        for tensor in tensors.values()
    )
    return {tensor.device.type for tensor in held}


def trained(base: nn.Module, kind: str) -> PeftModel:
    """Calibrated, and a step away from it, without dropout."""
    model = get_peft_model(base, FPSConfig(per_neuron=2))
    model.calibrate(batches(kind), progress=False)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    model.eval()(**example()).loss.backward()
    optimizer.step()
    return model


def filled(build: Placed, folder: Path) -> PeftModel:
    """An adapter on a model in memory, and in a folder."""
    model = get_peft_model(build(), FPSConfig(per_neuron=2, importance="magnitude"))
    fill(model)
    model.save_pretrained(folder)
    return model


def test_calibration_training_and_saving_are_those_of_a_model_in_memory(
    kind: str, placed: Placed, tmp_path: Path
) -> None:
    build = KINDS[kind][0]
    there, here = trained(placed(), kind), trained(build(), kind)
    assert places(there) == {"cpu"}
    assert any(layer.base_layer.weight.device.type == "meta" for layer in layers_of(there).values())
    assert selection_of(there) == selection_of(here)
    for path, layer in layers_of(there).items():
        close(layer.fps_values["default"], layers_of(here)[path].fps_values["default"])
        assert bool(layer.fps_values["default"].any())
    close(logits(there), logits(here))

    there.save_pretrained(tmp_path / "adapter")
    close(logits(PeftModel.from_pretrained(build(), tmp_path / "adapter")), logits(here))


def test_accelerate_may_choose_the_places(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=str(tmp_path / "offloaded")
    )
    assert set(base.hf_device_map.values()) == {"cpu", "disk"}
    there, here = trained(base, "llama"), trained(tiny_llama(), "llama")
    assert places(there) == {"cpu"}
    close(logits(there), logits(here))


@pytest.mark.parametrize("low", [False, True], ids=["", "low-memory"])
def test_an_adapter_is_loaded_onto_a_placed_model(kind: str, placed: Placed, low: bool, tmp_path: Path) -> None:
    model = filled(KINDS[kind][0], tmp_path / "adapter")
    base = placed()
    del base.hf_device_map  # else PEFT would take accelerate's hooks off
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low)
    assert places(loaded) == {"cpu"}
    close(logits(loaded), logits(model))
    with loaded.disable_adapter():
        close(logits(loaded), logits(KINDS[kind][0]()))


def test_a_further_adapter_is_loaded_onto_a_placed_model(kind: str, placed: Placed, tmp_path: Path) -> None:
    model = filled(KINDS[kind][0], tmp_path / "adapter")
    there = get_peft_model(placed(), FPSConfig(per_neuron=1, importance="magnitude"), adapter_name="first")
    there.load_adapter(tmp_path / "adapter", "second")
    there.set_adapter("second")
    assert places(there) == {"cpu"}
    close(logits(there), logits(model))


def test_a_model_whose_hooks_peft_has_taken_off_is_refused_with_the_line_to_add(
    kind: str, placed: Placed, tmp_path: Path
) -> None:
    filled(KINDS[kind][0], tmp_path / "adapter")
    base = placed()
    with pytest.raises(
        ValueError, match=rf"{KINDS[kind][2]}\..*weight is offloaded to disk.*del model\.hf_device_map before"
    ):
        PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "other"))
    assert layers_of(base) == {}


@pytest.mark.parametrize("ran", [True, False], ids=["used before", "not used before"])
def test_a_model_that_is_offloaded_after_its_adapter_is_told_the_order(ran: bool) -> None:
    model, data = get_peft_model(tiny_gpt2(), FPSConfig(per_neuron=2)), batches("gpt2")
    model.calibrate(data, progress=False)
    if ran:
        logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"values on the meta device, .* offloads the model, .* before the adapter"):
        logits(model)
    with pytest.raises(ValueError, match=r"is on the meta device, .* offloads the model, .* before the adapter"):
        model.calibrate(data, progress=False)

    base = tiny_gpt2()
    cpu_offload(base, execution_device=torch.device("cpu"))
    found = trained(base, "gpt2")
    assert base.transformer.h[1].mlp.c_fc.base_layer.weight.device.type == "meta"
    close(logits(found), logits(trained(tiny_gpt2(), "gpt2")))


def test_a_placed_model_merges_and_unmerges(kind: str, placed: Placed) -> None:
    model = trained(placed(), kind)
    expected = logits(model)
    with model.disable_adapter():
        of_base = logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model).values())
    close(logits(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)


def test_gradients_of_offloaded_weights_are_refused_by_name(kind: str, placed: Placed) -> None:
    model = get_peft_model(placed(), FPSConfig(per_neuron=2, importance="gradient"))
    with pytest.raises(ValueError, match=rf"{KINDS[kind][2]}\..*its weight is offloaded.*importance='activation'"):
        model.calibrate(batches(kind), progress=False)


# --- memory ---------------------------------------------------------------------------------------------------------

LOADING = """
import sys
import torch
from peft import PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from peft_fps import FPSConfig

def build(layers):
    config = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,
                         num_attention_heads=8)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model

def measure(folder, budget, low):
    get_peft_model(build(6), FPSConfig(budget=budget, importance="magnitude")).save_pretrained(folder)
    base = build(6)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low)
    now = largest = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            largest = max(largest, now)
    held = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if "fps_" in name)
    print(sum(p.numel() * p.element_size() for p in base.parameters()), held, largest)

for budget, low in zip(sys.argv[2::2], sys.argv[3::2]):
    measure(sys.argv[1] + "/" + low, float(budget), low == "True")
"""


def test_loading_takes_the_memory_of_the_adapter_and_not_of_the_base(tmp_path: Path) -> None:
    """Tensors as they are read and kept, where their entries lie, and room for them in between."""
    cases = [(0.0077, False), (0.1, True)]  # a budget, and whether loading is to take little memory
    arguments = [str(value) for case in cases for value in case]
    printed, _ = run_program(LOADING, str(tmp_path), *arguments)
    for (budget, _), line in zip(cases, printed.splitlines(), strict=True):
        base, held, largest = map(int, line.split())
        assert base > 95e6
        assert held > 8 * 0.8 * budget * base / 4  # a value and a column of four bytes each
        assert held < largest + 1e6, "the profiler missed what was allocated"
        assert largest < 5 * held
