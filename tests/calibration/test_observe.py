"""Passes over data: memory does not grow with their number of batches, and two processes agree with one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_fps import FPSConfig
from peft_fps.benchmarks.tensor_memory import peak_bytes
from tests.helpers import layers_of, normal, tiny_mlp, tiny_vit


ROOT = Path(__file__).parents[2]
WORKER = """
import sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft_fps import FPSConfig
from tests.helpers import layers_of, tiny_vit

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
data = torch.load(f"{sys.argv[2]}/data.pt")
model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2))
report = model.calibrate([{"pixel_values": data[rank::2]}], progress=False)
chosen = {path: layer.fps_columns["default"] for path, layer in layers_of(model).items()}
torch.save((chosen, str(report)), f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_select_as_one_does(tmp_path: Path) -> None:
    data = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(data, tmp_path / "data.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT, env=environment) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]

    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2))
    report = model.calibrate([{"pixel_values": data}], progress=False)
    expected = {path: layer.fps_columns["default"] for path, layer in layers_of(model).items()}
    for rank in range(2):
        chosen, printed = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(columns, expected[path]) for path, columns in chosen.items())
        assert printed == str(report)


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
    few, many = peak(20), peak(400)
    assert 1_792 < many < few + 1_024
