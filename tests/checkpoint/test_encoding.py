"""The dtypes, sizes and bytes of one module's tensors on disk."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_fps.checkpoint import TENSORS, decode, encode, encoded_bytes, is_left_out, left_out_bias
from tests.support.helpers import bits, csr, selections


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [(1, torch.uint16), (65_535, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32), (2**31, torch.int32)],
)
def test_columns_are_uint16_up_to_a_fan_in_of_65536(inputs: int, dtype: torch.dtype) -> None:
    last = torch.tensor([0, inputs - 1], dtype=torch.int64).to(torch.int32)
    encoded = encode("fps_columns", last, inputs)
    assert encoded.dtype == dtype
    assert encoded.to(torch.int64).tolist() == [0, inputs - 1]


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [
        ([], torch.uint8),
        ([0, 0], torch.uint8),
        ([3, 255], torch.uint8),
        ([256, 0], torch.uint16),
        ([65_535], torch.uint16),
        ([1, 65_536], torch.uint32),
    ],
    ids=str,
)
def test_row_counts_take_the_smallest_unsigned_type(counts: list[int], dtype: torch.dtype) -> None:
    encoded = encode("fps_row_counts", torch.tensor(counts, dtype=torch.int32), 10)
    assert encoded.dtype == dtype
    assert encoded.to(torch.int64).tolist() == counts


@pytest.mark.parametrize("name", ["fps_values", "fps_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_biases_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -0.0, 3e-8], dtype=dtype)
    for result in (encode(name, tensor, 3), decode(name, tensor)):
        assert result.dtype == dtype
        assert bits(result) == bits(tensor)


@given(selections(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_decode_undoes_encode(selection: tuple[int, list[list[int]]], dtype: torch.dtype) -> None:
    inputs, rows = selection
    columns, row_counts = csr(rows)
    held = {
        "fps_values": torch.linspace(-1, 1, columns.numel()).to(dtype),
        "fps_columns": columns.to(torch.int32),
        "fps_row_counts": row_counts.to(torch.int32),
        "fps_bias": torch.linspace(-2, 2, len(rows)).to(dtype),
        "fps_threshold": torch.tensor([0.25]),
    }
    assert set(held) == set(TENSORS)
    for name, tensor in held.items():
        again = decode(name, encode(name, tensor, inputs))
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)


@given(st.integers(1, 2**31 - 1), st.data())
def test_large_columns_survive(inputs: int, data: st.DataObject) -> None:
    columns = sorted(data.draw(st.sets(st.integers(0, inputs - 1), min_size=1, max_size=5)))
    encoded = encode("fps_columns", torch.tensor(columns, dtype=torch.int32), inputs)
    assert decode("fps_columns", encoded).tolist() == columns


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
def test_large_row_counts_survive(counts: list[int]) -> None:
    encoded = encode("fps_row_counts", torch.tensor(counts, dtype=torch.int32), 2**31)
    assert decode("fps_row_counts", encoded).tolist() == counts


def _realistic_layer(dtype: torch.dtype) -> dict[str, Tensor]:
    """768 x 768 with six entries per neuron, as a query projection of ViT-B has at K = 6."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.stack([torch.randperm(768, generator=generator)[:6].sort().values for _ in range(768)])
    return {
        "fps_values": torch.randn(768 * 6, generator=generator).to(dtype),
        "fps_columns": columns.reshape(-1).to(torch.int32),
        "fps_row_counts": torch.full((768,), 6, dtype=torch.int32),
    }


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 6), (torch.bfloat16, 4)], ids=["float32", "bfloat16"])
def test_bytes_per_entry_of_a_real_file(dtype: torch.dtype, limit: int, tmp_path: Path) -> None:
    encoded = {name: encode(name, tensor, 768) for name, tensor in _realistic_layer(dtype).items()}
    sizes = {}
    for name in encoded:  # one file per tensor; a file is 8 bytes, the header, the data
        file = tmp_path / f"{name}.safetensors"
        save_file({name: encoded[name]}, file)
        sizes[name] = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        assert torch.equal(load_file(file)[name], encoded[name])
    assert sizes["fps_values"] + sizes["fps_columns"] <= limit * 768 * 6
    assert sizes["fps_row_counts"] == 768, "one byte per neuron"
    row_counts = torch.full((768,), 6)
    assert encoded_bytes(row_counts, 768, dtype.itemsize, biases=0) == sum(sizes.values())
    assert encoded_bytes(row_counts, 768, dtype.itemsize, biases=768) == sum(sizes.values()) + 768 * dtype.itemsize


@given(selections(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_encoded_bytes_are_the_bytes_of_the_tensors(
    selection: tuple[int, list[list[int]]], dtype: torch.dtype, bias: bool
) -> None:
    inputs, rows = selection
    columns, row_counts = csr(rows)
    held = {"fps_values": torch.zeros(columns.numel(), dtype=dtype), "fps_columns": columns}
    held |= {"fps_row_counts": row_counts} | ({"fps_bias": torch.zeros(len(rows), dtype=dtype)} if bias else {})
    expected = sum(len(bits(encode(name, tensor, inputs))) for name, tensor in held.items())
    assert encoded_bytes(row_counts, inputs, dtype.itemsize, len(rows) if bias else 0) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_that_is_left_out_is_told_apart_and_changes_no_bit_when_added(dtype: torch.dtype) -> None:
    biases, written = torch.tensor([0.0, -0.0, 1.5, -2.0], dtype=dtype), left_out_bias(torch.ones(7, dtype=dtype), 4)
    assert bits(biases + written) == bits(biases)
    assert (written.dtype, is_left_out(written)) == (dtype, True)
    for other in (biases, torch.zeros_like(biases), written[:0], torch.cat([written, biases[:1]]), written.int()):
        assert not is_left_out(other)
