"""Training by two processes on the CPU (gloo): data parallel through accelerate and the Trainer, and sharded."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_fps import Selection
from tests.helpers import bits
from tests.training import ddp_program, together_program


HERE = Path(__file__).parent
PATH = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]))


def run_by_two(program, *arguments, launcher=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs = [
        subprocess.Popen(
            [sys.executable, *launcher, str(program), *map(str, arguments)],
            env=os.environ
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended


@pytest.fixture(scope="module", params=["activation", "gradient"])
def one_and_two(request, tmp_path_factory):
    """The same images and batches of eight, seen by one process and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    ddp_program.train(one, 8, request.param)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    run_by_two(HERE / "ddp_program.py", two, 4, request.param, launcher=launcher)
    return one, two


def test_all_processes_select_what_one_process_selects(one_and_two):
    one, two = one_and_two
    alone = Selection.load(one / "selection0.safetensors")
    assert alone.modules == Selection.load(two / "selection0.safetensors").modules
    assert alone.modules == Selection.load(two / "selection1.safetensors").modules
    assert alone.method["calibration"]["examples"] == 32
    assert Selection.load(two / "selection0.safetensors").method["calibration"]["examples"] == 32


def test_processes_agree_bit_for_bit_and_with_one_process_up_to_rounding(one_and_two):
    one, two = one_and_two
    alone, first, second = torch.load(one / "0.pt"), torch.load(two / "0.pt"), torch.load(two / "1.pt")
    assert any(tensor.is_floating_point() and tensor.any() for name, tensor in alone.items() if "fps_values" in name)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-4)


def test_checkpoints_have_the_form_of_one_process(one_and_two):
    one, two = one_and_two
    files = [folder / "run" / "checkpoint-8" / "adapter_model.safetensors" for folder in (one, two)]
    alone, shared = map(load_file, files)
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert (tensor.dtype, tensor.shape) == (shared[name].dtype, shared[name].shape), name
    configs = [json.loads(file.with_name("adapter_config.json").read_text()) for file in files]
    for config in configs:
        config["record"]["calibration"].pop("batches")  # four of eight images, or eight of four
        config["record"].pop("tensors_sha256")  # values differ by rounding
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How calibrations have ended in the first and in the second process."""
    folder = tmp_path_factory.mktemp("together")
    run_by_two(HERE / "together_program.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


SAYS = {
    "none has data": "in process 0 of 2.*ValueError: The calibration data holds no batch, expected at least one",
    "no data": "in process 1 of 2.*ValueError: importance='[a-z]+' needs data, found None",
    "wrong data": "in process 0 of 2.*TypeError: calibration data is of type int",
    "wrong batch": "in process 1 of 2.*TypeError: a calibration batch is of type str",
    "not a number": "in process 1 of 2.*ValueError: .*(NaN or infinity|is nan)",
    "data ends badly": "in process 0 of 2.*OSError: the disk is gone",
    "model fails": "in process 0 of 2.*RuntimeError: the model has had enough",
    "model fails at once": "in process 1 of 2.*RuntimeError: the model has had enough",
    "trained already": "in process 1 of 2.*ValueError: .*holds trained changes",
    "model fails where one reads for all": "in process 1 of 2.*RuntimeError: the model has had enough",
    "reader fails where it reads for all": "in process 0 of 2.*RuntimeError: the model has had enough",
}


@pytest.mark.parametrize("importance", together_program.IMPORTANCES)
@pytest.mark.parametrize("case", SAYS)
def test_a_process_that_fails_ends_all_with_its_error(case, importance, ended):
    first, second = (found[f"{importance}: {case}"] for found in ended)
    assert first == second
    assert re.search(SAYS[case], first), first


@pytest.mark.parametrize("importance", together_program.IMPORTANCES)
@pytest.mark.parametrize("case", ["one without data", "first without data", "all is well"])
def test_a_process_without_data_takes_part(case, importance, ended):
    first, second = (found[f"{importance}: {case}"] for found in ended)
    assert first == second
    data = together_program.own(0) + (together_program.own(1) if case == "all is well" else [])
    model = together_program.model_for(importance)
    model.calibrate(data, progress=False)
    columns = torch.cat([module.columns.int() for module in Selection.of(model).modules.values()])
    assert first == [len(data), 4 * len(data), bits(columns).hex()]


def test_a_sharded_model_trains_alike_and_refuses_what_needs_whole_weights(tmp_path):
    run_by_two(HERE / "fsdp_program.py", tmp_path)
    refusals = json.loads((tmp_path / "refusals.json").read_text())
    for verb, text in refusals.items():
        assert text is not None, verb
        assert re.search(r"(^|ValueError: )[\w.]+: .*sharded.*DTensor", text)
        assert "Nothing was changed" in text
    assert "Selection.save" in refusals["calibrate"]
    assert "before" in refusals["merge"]
    assert "state_dict" in refusals["save"]
    assert not (tmp_path / "refused" / "adapter_model.safetensors").exists()


def test_partitioned_parameters_are_named(tmp_path):
    from peft import get_peft_model
    from torch import nn

    from peft_fps import FPSConfig

    model = get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), FPSConfig(per_neuron=1))
    model.base_model.model[1].base_layer.weight.ds_id = 0  # as deepspeed marks what it has partitioned
    with pytest.raises(ValueError, match=r"1\.base_layer\.weight: .*ZeRO stage 3.*Nothing was changed"):
        model.calibrate([torch.ones(1, 4)])
