"""Training by two processes on the CPU (gloo): data parallel through accelerate and the Trainer, and sharded."""

import json
import re

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import default_data_collator

from peft_fps import FPSConfig, Selection
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import bits, images, tiny_vit
from tests.support.processes import run_together, variables_of_a_group
from tests.training import ddp_program, together_program


IMPORTANCES = ("activation", "gradient")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """In the environment that `accelerate launch` prepares."""
    folder = tmp_path_factory.mktemp("two")
    command = ["--cpu", "--num_processes", "2", "program.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    _, launched = prepare_simple_launcher_cmd_env(arguments)
    run_together(ddp_program.main, folder, 4, IMPORTANCES, launched | variables_of_a_group(2))
    return folder


@pytest.fixture(scope="module", params=IMPORTANCES)
def one_and_two(request, by_two, tmp_path_factory):
    """The same images and batches of eight, seen by one process and by two."""
    one = tmp_path_factory.mktemp("one")
    ddp_program.train(one, 8, request.param)
    return one, by_two / request.param


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
def together(tmp_path_factory):
    """Where both processes have written down how calibrations have ended."""
    folder = tmp_path_factory.mktemp("together")
    run_together(together_program.main, folder)
    return folder


@pytest.fixture(scope="module")
def ended(together):
    """How calibrations have ended in the first and in the second process."""
    return together_program.of_both(together, "")


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
    "reader cannot read": "in process 0 of 2.*OSError: the disk is gone",
    "reader cannot read anything": "in process 0 of 2.*OSError: the disk is gone",
    "reader cannot join": "in process 0 of 2.*RuntimeError: You can't use batches of different size",
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


@pytest.fixture(scope="module")
def shares(together):
    return together_program.of_both(together, "shares")


@pytest.mark.parametrize("importance", together_program.SHARED)
def test_two_processes_select_as_one_does(importance, shares):
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance=importance))
    data = {"pixel_values": images(8), "labels": torch.arange(8) % 5}
    report = model.calibrate([data], progress=False)
    expected = {"columns": selection_of(model), "report": str(report)}
    assert shares[0][importance] == shares[1][importance] == expected


@pytest.mark.parametrize("loader", together_program.LOADERS)
def test_loaders_that_share_out_examples_select_as_one_process_does(loader, together):
    count = together_program.EXAMPLES.get(loader, 7)
    examples = [together_program.Breaking(16)[index] for index in range(count)]
    model = together_program.model_for("activation")
    model.calibrate(default_data_collator(examples)["pixel_values"].split(2), progress=False)
    for found in together_program.of_both(together, "loaders"):
        assert found[loader] == {"columns": selection_of(model), "examples": count}


def test_no_process_waits_for_one_that_is_gone(tmp_path):
    run_together(together_program.vanish, tmp_path)
    assert "peer" in (tmp_path / "gone.txt").read_text()


def test_two_processes_cannot_calibrate_in_streams(shares):
    assert shares[0]["refusal"] == shares[1]["refusal"]
    assert "several processes" in shares[0]["refusal"]


def test_partitioned_parameters_are_named(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), FPSConfig(per_neuron=1))
    model.base_model.model[1].base_layer.weight.ds_id = 0  # as deepspeed marks what it has partitioned
    with pytest.raises(ValueError, match=r"1\.base_layer\.weight: .*ZeRO stage 3.*Nothing was changed"):
        model.calibrate([torch.ones(1, 4)])
