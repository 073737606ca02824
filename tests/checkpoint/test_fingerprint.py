"""Digest and sample that tell one base model from another."""

import base64
import copy
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from peft_fps import FPSConfig
from peft_fps.base.quantisation import BaseWeight
from peft_fps.checkpoint import check_fingerprint, fingerprint
from tests.support.helpers import adapted, layers_of, normal, unchanged
from tests.support.quantised_bases import KINDS, plain_bert, quantised


def base(seed: int = 0) -> dict[str, Tensor]:
    # below, at and above 256 entries, and a convolution
    shapes = {"a.small": (5, 7), "a.even": (16, 16), "b.large": (48, 33), "b.conv": (6, 3, 4, 4)}
    return {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def digest(weights: dict[str, Tensor]) -> str:
    found = fingerprint(weights)
    assert found is not None
    return found["sha256"]


def test_is_a_sha256_and_the_dtypes() -> None:
    found = fingerprint({"a": normal(3, 3), "b": normal(3, 3).half()})
    assert found is not None
    assert set(found) == {"sha256", "dtype", "sample"}
    assert found["dtype"] == "float16+float32"
    assert len(bytes.fromhex(found["sha256"])) == 32


def test_is_the_one_that_files_of_format_version_1_hold() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, -0.25, 3.0]])  # exact in bfloat16: the upper half of a float32
    halves = [struct.unpack("<I", struct.pack("<f", number))[0] >> 16 for number in weight.flatten().tolist()]
    content = b"vit.fc(2, 3)" + struct.pack("<6H", *halves)
    assert digest({"vit.fc": weight}) == hashlib.sha256(content).hexdigest()


def test_depends_on_neither_order_nor_memory_layout() -> None:
    weights = base()
    turned = {name: weights[name] for name in reversed(weights)}
    turned["b.large"] = weights["b.large"].t().contiguous().t()
    assert digest(turned) == digest(weights)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float64], ids=str)
def test_survives_a_change_of_precision(narrow: torch.dtype) -> None:
    """Loaded in bfloat16, or upcast from it, a base keeps its digest."""
    weights = base()
    copies = {name: weight.to(narrow) for name, weight in weights.items()}
    assert digest(copies) == digest(weights)
    assert digest({name: weight.float() for name, weight in copies.items()}) == digest(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_differs_for_another_base(dtype: torch.dtype) -> None:
    ours, theirs = ({name: w.to(dtype) for name, w in base(seed).items()} for seed in (0, 100))
    assert digest(ours) != digest(theirs)


@given(st.sampled_from(["a.small", "a.even"]), st.integers(0, 34))
def test_sees_every_weight_of_a_small_module(name: str, place: int) -> None:
    weights = base()
    before = digest(weights)
    weights[name].view(-1)[place] *= 1.5
    assert digest(weights) != before


@pytest.mark.parametrize("name", ["b.large", "b.conv"])
def test_sees_the_first_weight_of_a_large_module(name: str) -> None:
    weights = base()
    before = digest(weights)
    weights[name].view(-1)[0] += 1
    assert digest(weights) != before


def test_samples_a_large_module_throughout() -> None:
    """Evenly spaced: a change of any eighth of a module shows."""
    for part in range(8):
        weights = base()
        before = digest(weights)
        weights["b.large"].view(-1).chunk(8)[part].neg_()
        assert digest(weights) != before, part


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (1024, 1024), (256, 256), (768, 3, 16, 16)], ids=str)
def test_samples_all_columns(shape: tuple[int, ...]) -> None:
    """With a step that is a multiple of the row, every sample would lie in one column."""
    weight = normal(*shape)
    before = digest({"a": weight})
    weight.flatten(1)[:, 1:].neg_()
    assert digest({"a": weight}) != before


@pytest.mark.parametrize("change", ["swapped", "renamed", "reshaped", "missing"])
def test_names_and_shapes_count(change: str) -> None:
    weights = {"a": normal(6, 6, seed=0), "b": normal(6, 6, seed=1)}
    changed = {
        "swapped": {"a": weights["b"], "b": weights["a"]},
        "renamed": {"a": weights["a"], "c": weights["b"]},
        "reshaped": {"a": weights["a"].view(4, 9), "b": weights["b"]},
        "missing": {"a": weights["a"]},
    }[change]
    assert digest(changed) != digest(weights)


def test_names_and_shapes_cannot_be_mistaken_for_each_other() -> None:
    assert digest({"a": torch.zeros(0), "b": torch.ones(2)}) != digest({"a": torch.ones(2), "b": torch.zeros(0)})


def test_meta_weights_have_none() -> None:
    weights = base()
    assert fingerprint({**weights, "c": torch.empty(3, 3, device="meta")}) is None


def test_writes_nothing() -> None:
    weights = base()
    copies = {name: weight.clone() for name, weight in weights.items()}
    fingerprint(weights)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


# --- comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["error", "warn"])
@pytest.mark.parametrize("missing", ["saved", "found", "neither"])
def test_equal_or_unknown_is_accepted(missing: str, action: str) -> None:
    known = {"sha256": "ab" * 32, "dtype": "float32"}
    saved, found = (None if missing == side else dict(known) for side in ("saved", "found"))
    check_fingerprint(saved, found, action)


OURS, THEIRS = {"sha256": "ab" * 32, "dtype": "float32"}, {"sha256": "cd" * 32, "dtype": "float32"}


def test_another_base_is_an_error_that_tells_what_to_do_and_warns_on_request() -> None:
    with pytest.raises(ValueError, match=r"found fingerprint cdcd.*, expected abab.*Load it onto that\s+model"):
        check_fingerprint(OURS, THEIRS, "error")
    with pytest.warns(UserWarning, match=r"found fingerprint cdcd.*, expected abab"):
        check_fingerprint(OURS, THEIRS, "warn")


def test_another_dtype_leaves_it_undecided_unless_the_digest_agrees() -> None:
    """A base that was quantised or rounded in between may or may not be the same one."""
    with pytest.warns(UserWarning, match="cannot be decided"):
        check_fingerprint(OURS, {**THEIRS, "dtype": "float16"}, "error")
    check_fingerprint(OURS, {**OURS, "dtype": "bfloat16"}, "error")  # a warning would be an error


# --- the sample -----------------------------------------------------------------------------------------------------


def sample(weights: dict[str, Tensor]) -> list[float]:
    """The numbers of the sample: each the upper half of a float32."""
    found = fingerprint(weights)
    assert found is not None
    data = base64.b64decode(found["sample"])
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]


def test_the_sample_holds_entries_of_every_weight_matrix() -> None:
    weights = {name: weight.bfloat16().float() for name, weight in base().items()}
    expected = []
    for name in sorted(weights):
        flat = weights[name].flatten().tolist()
        expected += [flat[i * 1_000_003 % len(flat)] for i in range(min(64, len(flat)))]
    assert sample({**weights, "norm": torch.ones(7)}) == expected


def test_the_sample_of_many_weights_is_spread_over_them() -> None:
    weights = {f"{number:04}": torch.full((2, 2), float(number % 256)) for number in range(700)}
    assert sample(weights) == [float(number % 256) for number in range(0, 700, 3)]


def test_the_sample_of_no_matrix_is_empty() -> None:
    assert sample({"norm": torch.ones(7)}) == sample({}) == []


def test_a_transposed_weight_is_sampled_as_the_layer_that_it_is_quantised_to() -> None:
    weight = normal(40, 24)
    turned = {"a": BaseWeight(lambda: weight.t().contiguous(), weight.device, "float32", transposed=True)}
    assert sample(turned) == sample({"a": weight})  # type: ignore[arg-type]


def test_weights_are_read_one_at_a_time_and_once() -> None:
    events = []

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: events.append(name) or normal(4, 4)  # type: ignore[func-returns-value]

    found = fingerprint({name: BaseWeight(reader(name), torch.device("cpu"), "bnb 4bit") for name in "cab"})
    assert found is not None
    assert found["dtype"] == "bnb 4bit"
    assert events == ["a", "b", "c"]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Every row on an even grid of `2 ** bits - 1` numbers between its extremes, as quantisation has it."""
    scale = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1)) / (2 ** (bits - 1) - 0.5)
    return (weight / scale).round() * scale


def stored_as(weights: dict[str, Tensor], how: str) -> dict[str, str] | None:
    return fingerprint({name: BaseWeight(lambda w=w: w, w.device, how) for name, w in weights.items()})  # type: ignore[misc]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_quantised_copy_passes_both_ways(bits: int) -> None:
    plain, copied = base(), stored_as({name: rounded(w, bits) for name, w in base().items()}, "hqq")
    again = stored_as({name: rounded(w, 8) for name, w in base().items()}, "bnb 8bit")
    for saved, found in ((fingerprint(plain), copied), (copied, fingerprint(plain)), (copied, again)):
        check_fingerprint(saved, found, "error")


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("bits", [8, 2])
def test_other_weights_do_not_pass_for_a_quantised_copy(scale: float, bits: int) -> None:
    theirs = stored_as({name: scale * rounded(w, bits) for name, w in base(100).items()}, "hqq")
    with pytest.raises(ValueError, match=r"found fingerprint .* differ by \d+% \(stored in hqq, then in float32\)"):
        check_fingerprint(fingerprint(base()), theirs, "error")
    with pytest.warns(UserWarning, match="weights that differ by"):
        check_fingerprint(fingerprint(base()), theirs, "warn")


def test_in_float16_a_difference_of_a_few_percent_is_another_base() -> None:
    halves = {name: weight.half() for name, weight in base().items()}
    check_fingerprint(fingerprint(base()), fingerprint(halves), "error")
    tuned = {name: weight + 0.05 * normal(*weight.shape, seed=9).half() for name, weight in halves.items()}
    with pytest.raises(ValueError, match="weights that differ by 5%"):
        check_fingerprint(fingerprint(base()), fingerprint(tuned), "error")


def test_samples_of_other_sizes_are_of_other_bases() -> None:
    fewer = {"a.small": base()["a.small"]}
    with pytest.raises(ValueError, match="differ by inf%"):
        check_fingerprint(fingerprint(base()), stored_as(fewer, "hqq"), "error")


@pytest.mark.parametrize("damage", ["AAA", "A===", "?", 7])
def test_a_damaged_sample_is_an_error(damage: Any) -> None:
    saved = {**OURS, "sample": damage}
    with pytest.raises(ValueError, match="base_fingerprint has a sample that cannot be read.*fetch or save it again"):
        check_fingerprint(saved, stored_as(base(), "hqq"), "error")


# --- adapters on other copies of their base -------------------------------------------------------------------------


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": copy.deepcopy,
    "bfloat16": lambda model: copy.deepcopy(model).bfloat16(),
    "float16": lambda model: copy.deepcopy(model).half(),
}


def stored(how: str, model: nn.Module, skip: tuple[str, ...] = ("classifier",)) -> Any:
    """A copy of the model, in another dtype or quantised but for the modules to skip."""
    return COPIES[how](model) if how in COPIES else quantised(how, model, skip)


def load(base: nn.Module, folder: Path, check_base: str = "error") -> PeftModel:
    config = FPSConfig.from_pretrained(str(folder), check_base=check_base)
    return PeftModel.from_pretrained(base, str(folder), config=config)


@pytest.mark.parametrize("now", [*COPIES, *KINDS])
@pytest.mark.parametrize("then", ["float32", "float16", "4bit"])
def test_an_adapter_meets_its_base_in_any_storage_and_no_other_base(then: str, now: str, tmp_path: Path) -> None:
    source = adapted(stored(then, plain_bert()))
    source.save_pretrained(str(tmp_path))
    found = load(stored(now, plain_bert()), tmp_path)
    assert all(layer.fps_values["default"].numel() for layer in layers_of(found).values())
    other = stored(now, plain_bert(seed=1))
    with pytest.raises(ValueError, match="The adapter was made from another base model"):
        load(other, tmp_path)
    assert not layers_of(other)
    with pytest.warns(UserWarning, match="The adapter was made from another base model"):
        load(other, tmp_path, check_base="warn")


@pytest.mark.parametrize("now", ["float32", "8bit"])
def test_another_architecture_with_the_same_shapes_is_refused(now: str, tmp_path: Path) -> None:
    """Its modules have other names, or, as with Llama and Mistral, other weights."""
    adapted(plain_bert()).save_pretrained(str(tmp_path / "bert"))
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    electra = ElectraConfig(**sizes, embedding_size=64, intermediate_size=128, max_position_embeddings=16)
    base = stored(now, ElectraForSequenceClassification(electra).eval())
    with unchanged(base), pytest.raises(ValueError, match="the model has no such target.*made for another model"):
        load(base, tmp_path / "bert", check_base="warn")
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    torch.manual_seed(0)
    adapted(LlamaForCausalLM(LlamaConfig(**sizes))).save_pretrained(str(tmp_path / "llama"))
    base = stored(now, MistralForCausalLM(MistralConfig(**sizes)), ("lm_head",))
    with unchanged(base), pytest.raises(ValueError, match="The adapter was made from another base model"):
        load(base, tmp_path / "llama")


def test_an_adapter_without_a_sample_warns_in_another_storage(tmp_path: Path) -> None:
    """As adapters are that earlier versions saved."""
    model = adapted(plain_bert())
    for layer in layers_of(model).values():
        fingerprint: Any = layer.fps_state["default"].base_fingerprint
        fingerprint.pop("sample", None)
    model.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="in float32 when the adapter was made and is in float16 now, so its"):
        load(plain_bert().half(), tmp_path)
