"""Everything that is checked about an adapter's tensors, on dictionaries that no model is needed for."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.checkpoint import Expected, check_adapter_tensors, check_whole_modules, encode
from tests.support.helpers import csr, selections


Modules = dict[str, dict[str, Tensor]]

EXPECTED = {"first": Expected(3, 10, 4, bias=True), "last": Expected(2, 3, 3, bias=False)}


def valid() -> Modules:
    return {
        "first": {
            "fps_values": torch.tensor([0.5, -1.0, 2.0, 1e-30]),
            "fps_columns": torch.tensor([3, 9, 0, 7], dtype=torch.int32),
            "fps_row_counts": torch.tensor([2, 0, 2], dtype=torch.uint8),
            "fps_bias": torch.tensor([0.1, 0.2, 0.3]),
        },
        "last": {
            "fps_values": torch.tensor([1.0, 2.0, 3.0]),
            "fps_columns": torch.tensor([0, 1, 2], dtype=torch.uint16),
            "fps_row_counts": torch.tensor([1, 2], dtype=torch.uint8),
        },
    }


def test_a_valid_adapter_and_an_empty_module_pass() -> None:
    check_adapter_tensors(valid(), EXPECTED)
    empty = {"fps_values": torch.zeros(0), "fps_columns": torch.zeros(0, dtype=torch.uint16)}
    empty["fps_row_counts"] = torch.zeros(2, dtype=torch.uint8)
    check_adapter_tensors({"layer": empty}, {"layer": Expected(2, 5, 0, bias=False)})


@given(selections(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_whatever_is_encoded_passes(selection: tuple[int, list[list[int]]], bias: bool, dtype: torch.dtype) -> None:
    inputs, rows = selection
    columns, row_counts = csr(rows)
    tensors = {
        "fps_values": torch.ones(columns.numel(), dtype=dtype),
        "fps_columns": encode("fps_columns", columns, inputs),
        "fps_row_counts": encode("fps_row_counts", row_counts, inputs),
    }
    if bias:
        tensors["fps_bias"] = torch.zeros(len(rows), dtype=dtype)
    check_adapter_tensors({"layer": tensors}, {"layer": Expected(len(rows), inputs, columns.numel(), bias)})


def _set(name: str, *elements: float, dtype: torch.dtype = torch.int32) -> Callable[[Modules], None]:
    def change(modules: Modules) -> None:
        modules["first"][name] = torch.tensor(elements, dtype=dtype)

    return change


def _cast(name: str, dtype: torch.dtype) -> Callable[[Modules], None]:
    def change(modules: Modules) -> None:
        modules["first"][name] = modules["first"][name].to(dtype)

    return change


def _shape(name: str, *shape: int) -> Callable[[Modules], None]:
    def change(modules: Modules) -> None:
        modules["first"][name] = modules["first"][name].reshape(shape)

    return change


def _drop(name: str) -> Callable[[Modules], None]:
    def change(modules: Modules) -> None:
        del modules["first"][name]

    return change


nan, inf = float("nan"), float("inf")
INVALID: dict[str, tuple[Callable[[Modules], None], str]] = {
    "column is the fan-in": (_set("fps_columns", 3, 10, 0, 7), r"fps_columns.*\[0, 10\], expected \[0, 9\]"),
    "negative column": (_set("fps_columns", -1, 9, 0, 7), r"fps_columns.*\[-1, 9\], expected \[0, 9\]"),
    "duplicate": (_set("fps_columns", 3, 3, 0, 7), "neuron 0.*sorted, unique"),
    "not sorted": (_set("fps_columns", 3, 9, 7, 0), "neuron 2.*sorted, unique"),
    "one column missing": (_set("fps_columns", 3, 9, 0), "fps_columns has 3 elements, expected .* 4"),
    "one count missing": (_set("fps_row_counts", 2, 2), "fps_row_counts has 2 elements, expected .* 3"),
    "counts too large": (_set("fps_row_counts", 2, 1, 2), "fps_columns has 4 elements, expected .* 5"),
    "count above fan-in": (_set("fps_row_counts", 11, -7, 0), r"fps_row_counts ranges over \[-7, 11\]"),
    "negative count": (_set("fps_row_counts", 5, -1, 0), r"fps_row_counts ranges over \[-1, 5\]"),
    "float columns": (_cast("fps_columns", torch.float32), "fps_columns has dtype torch.float32"),
    "int64 columns": (_cast("fps_columns", torch.int64), "fps_columns has dtype torch.int64"),
    "int8 columns": (_cast("fps_columns", torch.int8), "fps_columns has dtype torch.int8"),
    "bool columns": (_cast("fps_columns", torch.bool), "fps_columns has dtype torch.bool"),
    "float64 counts": (_cast("fps_row_counts", torch.float64), "fps_row_counts has dtype torch.float64"),
    "bool counts": (_cast("fps_row_counts", torch.bool), "fps_row_counts has dtype torch.bool"),
    "int64 counts": (_cast("fps_row_counts", torch.int64), "fps_row_counts has dtype torch.int64"),
    "integer values": (_cast("fps_values", torch.int32), "fps_values has dtype torch.int32, expected a floating"),
    "complex values": (_cast("fps_values", torch.complex64), "fps_values has dtype torch.complex64"),
    "8-bit values": (_cast("fps_values", torch.float8_e4m3fn), "fps_values has dtype torch.float8_e4m3fn"),
    "8-bit bias": (_cast("fps_bias", torch.float8_e4m3fn), "fps_bias has dtype torch.float8_e4m3fn"),
    "NaN value": (_set("fps_values", 1, nan, 1, 1, dtype=torch.float32), "fps_values contains NaN or infinity"),
    "infinite value": (_set("fps_values", 1, 1, 1, -inf, dtype=torch.float32), "fps_values contains NaN or inf"),
    "one value missing": (_set("fps_values", 1, 1, 1, dtype=torch.float32), r"fps_values has shape \(3,\), .*\(4,\)"),
    "values as matrix": (_shape("fps_values", 2, 2), r"fps_values has shape \(2, 2\)"),
    "columns as matrix": (_shape("fps_columns", 2, 2), r"fps_columns has shape \(2, 2\)"),
    "counts as matrix": (_shape("fps_row_counts", 3, 1), r"fps_row_counts has shape \(3, 1\)"),
    "NaN bias": (_set("fps_bias", 1, nan, 1, dtype=torch.float32), "fps_bias contains NaN or infinity"),
    "short bias": (_set("fps_bias", 1, 1, dtype=torch.float32), r"fps_bias has shape \(2,\), expected \(3,\)"),
    "integer bias": (_cast("fps_bias", torch.int64), "fps_bias has dtype torch.int64, expected a floating"),
    "no values": (_drop("fps_values"), "holds .*expected .*'fps_values'"),
    "no columns": (_drop("fps_columns"), "holds .*expected .*'fps_columns'"),
    "no counts": (_drop("fps_row_counts"), "holds .*expected .*'fps_row_counts'"),
    "no bias": (_drop("fps_bias"), "holds .*expected .*'fps_bias'"),
    "another tensor": (_set("fps_scale", 1), "holds .*'fps_scale'.*expected"),
    "module missing": (lambda modules: modules.clear(), "holds nothing, expected"),
}


@pytest.mark.parametrize("case", INVALID)
def test_names_module_tensor_found_and_expected(case: str) -> None:
    change, message = INVALID[case]
    modules = valid()
    change(modules)
    with pytest.raises(ValueError, match=rf"^first: .*{message}") as error:
        check_adapter_tensors(modules, EXPECTED)
    assert "fetch or save it again" in str(error.value)


def test_a_bias_that_nobody_asked_for() -> None:
    modules = valid()
    modules["last"]["fps_bias"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^last: .*'fps_bias'.*expected \['fps_columns', 'fps_row_counts', 'fps_val"):
        check_adapter_tensors(modules, EXPECTED)


def test_a_module_that_is_no_target() -> None:
    modules = valid()
    modules["other"] = modules["last"]
    with pytest.raises(ValueError, match=r"^other: .*expected tensors of the modules that this adapter targets"):
        check_adapter_tensors(modules, EXPECTED)


def test_entries_are_as_the_config_says() -> None:
    expected = {**EXPECTED, "last": Expected(2, 3, 2, bias=False)}
    with pytest.raises(ValueError, match=r"^last: fps_columns has 3 elements, expected 2 as the config says"):
        check_adapter_tensors(valid(), expected)


def test_with_granularity_model_only_the_total_counts() -> None:
    moved = {"first": Expected(3, 10, 6, bias=True), "last": Expected(2, 3, 1, bias=False)}
    check_adapter_tensors(valid(), moved, total_only=True)
    more = {**moved, "last": Expected(2, 3, 2, bias=False)}
    with pytest.raises(ValueError, match="7 entries, expected 8 in 2 modules"):
        check_adapter_tensors(valid(), more, total_only=True)


def test_sizes_come_from_the_model_even_if_only_the_total_counts() -> None:
    modules = valid()
    modules["last"]["fps_row_counts"] = torch.tensor([1, 1, 1], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^last: fps_row_counts has 3 elements, expected one per neuron, 2"):
        check_adapter_tensors(modules, EXPECTED, total_only=True)


def test_counts_that_overflow_when_summed_narrowly() -> None:
    """256 as a sum of bytes is 0 to who sums in bytes."""
    modules = {
        "layer": {
            "fps_values": torch.zeros(0),
            "fps_columns": torch.zeros(0, dtype=torch.uint16),
            "fps_row_counts": torch.full((2,), 128, dtype=torch.uint8),
        }
    }
    with pytest.raises(ValueError, match="fps_columns has 0 elements, expected .* 256"):
        check_adapter_tensors(modules, {"layer": Expected(2, 200, 0, bias=False)})


# --- modules saved whole --------------------------------------------------------------------------------------------

HEAD = {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2), "head.steps": torch.tensor(0)}


def test_a_valid_head_passes() -> None:
    check_whole_modules({**HEAD, "head.weight": torch.ones(2, 3, dtype=torch.bfloat16)}, HEAD)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("head.weight", torch.ones(3, 2), r"shape \(3, 2\), expected \(2, 3\)"),
        ("head.weight", torch.ones(2, 3, dtype=torch.int32), "dtype torch.int32, expected a floating"),
        ("head.weight", torch.full((2, 3), nan), "NaN or infinity"),
        ("head.bias", torch.tensor([1.0, inf]), "NaN or infinity"),
        ("head.steps", torch.tensor(0.0), "dtype torch.float32.*expected torch.int64"),
        ("head.steps", torch.tensor([0]), r"shape \(1,\), expected torch.int64 and \(\)"),
        ("body.weight", torch.ones(2, 3), "base weights are never loaded from an adapter"),
    ],
    ids=["shape", "dtype", "NaN", "infinity", "counter dtype", "counter shape", "base weight"],
)
def test_a_wrong_head_is_refused(key: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: .*{message}") as error:
        check_whole_modules({**HEAD, key: tensor}, HEAD)
    assert "fetch or save it again" in str(error.value)


@pytest.mark.parametrize("key", HEAD)
def test_an_incomplete_head_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: not in the adapter file, expected"):
        check_whole_modules({name: tensor for name, tensor in HEAD.items() if name != key}, HEAD)
