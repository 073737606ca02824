"""The digest that tells one base model from another."""

import hashlib
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.checkpoint import check_fingerprint, fingerprint
from tests.helpers import normal


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
    assert set(found) == {"sha256", "dtype"}
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


def test_another_base_is_an_error_that_tells_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"found fingerprint cdcd.*, expected abab.*Load it onto that\s+model"):
        check_fingerprint(OURS, THEIRS, "error")


def test_another_base_warns_on_request() -> None:
    with pytest.warns(UserWarning, match=r"found fingerprint cdcd.*, expected abab"):
        check_fingerprint(OURS, THEIRS, "warn")


def test_another_dtype_leaves_it_undecided() -> None:
    """A base that was quantised or rounded in between may or may not be the same one."""
    with pytest.warns(UserWarning, match="cannot be decided"):
        check_fingerprint(OURS, {**THEIRS, "dtype": "float16"}, "error")


def test_a_digest_in_another_dtype_that_agrees_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fingerprint(OURS, {**OURS, "dtype": "bfloat16"}, "error")
