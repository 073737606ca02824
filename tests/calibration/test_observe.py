"""Passes over data: memory does not grow with their number of batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_fps import FPSConfig
from peft_fps.benchmarks.tensor_memory import peak_bytes
from tests.support.helpers import normal, tiny_mlp


@pytest.mark.parametrize("importance", ["activation", "gradient", "fisher"])
def test_memory_does_not_grow_with_the_number_of_batches(importance: str) -> None:
    """A batch is 1,792 bytes, so that holding on to every one, or to its activations, would show."""

    def stream(count: int) -> Iterator[dict[str, Any]]:
        for seed in range(count):
            yield {"x": normal(32, 10, seed=seed), "labels": torch.arange(32) % 4}

    def peak(count: int) -> int:
        model = get_peft_model(tiny_mlp(), FPSConfig(per_neuron=2, importance=importance, fisher="batch"))
        reports = []
        peak = peak_bytes(lambda: reports.append(model.calibrate(stream(count), progress=False)))
        assert f"over {32 * count:,} examples" in str(reports[0])
        return peak

    peak(1)  # what is allocated once
    few, many = peak(20), peak(100)
    assert 1_792 < many < few + 1_024
