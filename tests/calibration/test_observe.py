"""Two processes that see one half of the data each agree with one process that sees all of it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model

from peft_fps import FPSConfig
from tests.helpers import layers_of, tiny_vit


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
