"""FSDP2 with two processes on the CPU (gloo): a sharded model does what a whole one does, or says why it does not."""

import json
import re
import shlex

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from peft_fps import Selection
from tests.support.documents import blocks
from tests.support.helpers import ROOT, tiny_vit
from tests.support.processes import run_together, variables_of_a_group
from tests.training import sharded_kinds_program, sharded_program
from tests.training.sharded_program import IMPORTANCES, adapted, outputs, shares
from tests.training.together_program import Breaking, of_both
from tests.training.trainers import assert_equal_tensors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Where both processes have written down what came of it."""
    folder = tmp_path_factory.mktemp("sharded")
    run_together(sharded_program.main, folder)
    return folder


def calibrated_alone(**options):
    """A model that one process has calibrated with the data of both, and the report."""
    model = adapted(**options)
    return model, model.calibrate([batch for share in shares() for batch in share], progress=False)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_sharded_model_selects_what_one_process_selects(importance, two):
    model, report = calibrated_alone(importance=importance)
    alone = Selection.of(model)
    for rank in range(2):
        selected = Selection.load(two / f"{importance}{rank}.safetensors")
        assert selected.modules == alone.modules
        assert selected.method == alone.method
        assert (two / f"{importance}{rank}.txt").read_text() == str(report)


def test_a_score_of_ones_own_reads_the_sharded_weights(two):
    model = adapted()
    alone = Selection.from_scores(model, lambda path, weight: weight.abs())
    for rank in range(2):
        assert Selection.load(two / f"own{rank}.safetensors").modules == alone.modules


def test_a_sharded_model_selects_from_what_one_process_reads_for_all(two):
    model = adapted(importance="activation")
    data = default_data_collator([Breaking(16)[index] for index in range(7)])
    model.calibrate([data], progress=False)
    for rank in range(2):
        assert Selection.load(two / f"dispatched{rank}.safetensors").modules == Selection.of(model).modules


def test_a_sharded_adapter_is_saved_as_a_whole_one(two):
    folders = ("adapter", "gathered0", "gathered1", "again")
    files = [two / name / "adapter_model.safetensors" for name in folders]
    assert len({file.read_bytes() for file in files}) == 1
    alone, _ = calibrated_alone()
    alone.save_pretrained(two / "alone")
    expected, found = load_file(two / "alone" / "adapter_model.safetensors"), load_file(files[0])
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    for name, tensor in expected.items():
        chosen = "fps_columns" in name or "fps_row_counts" in name or "k_proj.fps_bias" in name or not tensor.numel()
        assert torch.equal(found[name], tensor) == chosen, name
    configs = [json.loads((two / name / "adapter_config.json").read_text()) for name in ("adapter", "alone")]
    for config in configs:
        config["record"].pop("tensors_sha256")  # values differ by the training
    assert configs[0] == configs[1]


def test_training_sharded_gives_the_values_of_one_process(two):
    model, _ = calibrated_alone()
    sharded_program.train(model, slice(None))
    model.save_pretrained(two / "trained")
    trained = load_file(two / "trained" / "adapter_model.safetensors")
    for name, tensor in load_file(two / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-6)


def test_a_sharded_adapter_loads_and_merges_in_one_process_and_in_two(two):
    found = torch.load(two / "live.pt")
    model = PeftModel.from_pretrained(tiny_vit(), two / "adapter")
    torch.testing.assert_close(outputs(model), found["outputs"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), found["merged"])
    assert_equal_tensors(merged.state_dict(), found["state"])


BEFORE = "before the model is sharded"
REFUSED = {
    "attach": r"^ValueError: [\w.]+: the parameter is sharded .* get_peft_model .* first, then fully_shard",
    "gradient": rf"importance='gradient'.*{BEFORE}.*Selection\.save",
    "model": rf"ValueError: [\w.]+: the selection gives it \d+ entries, expected \d+, .*granularity.*{BEFORE}",
    "load": r"ValueError: [\w.]+: fps_columns has \d+ elements, expected \d+",
    "apply": rf"the selection gives it .*{BEFORE}",
    "hotswap": r"sharded.*get_peft_model .* first",
    "second": r"sharded.*get_peft_model .* first",
    "combine": rf"sharded.*to combine adapters.*{BEFORE}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_sharded_models_cannot_do_is_refused_with_what_to_do(case, two):
    first, second = (found[case] for found in of_both(two, "refused"))
    assert first == second
    assert re.search(REFUSED[case], first, re.DOTALL), first


ENDED = {
    "all is well": None,
    "one without data": None,
    "none has data": "in process 0 of 2.*ValueError: The calibration data holds no batch",
    "model fails": "in process 0 of 2.*RuntimeError: the model has had enough",
    "model fails where it runs for the other": "in process 1 of 2.*RuntimeError: the model has had enough",
    "wrong batch": "in process 1 of 2.*TypeError: a calibration batch is of type str",
    "not a number": "in process 1 of 2.*ValueError: .*NaN or infinity in calibration batch 0",
    "reader cannot read": "in process 0 of 2.*OSError: the disk is gone",
    "model fails where one reads for all": "in process 1 of 2.*RuntimeError: the model has had enough",
    "cannot be sent": "in process 0 of 2.*pickle",
    "other modules": f"run different modules.*{BEFORE}",
}


@pytest.mark.parametrize("case", ENDED)
def test_a_process_that_fails_ends_all_of_a_sharded_calibration(case, two):
    first, second = (found[case] for found in of_both(two, "ended"))
    assert first == second
    assert first is None if ENDED[case] is None else re.search(ENDED[case], first), first


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    run_together(sharded_kinds_program.main, folder)
    return folder


@pytest.mark.parametrize("case", sharded_kinds_program.CASES)
def test_embeddings_experts_and_attention_live_sharded_as_in_one_process(case, kinds):
    program, folder = sharded_kinds_program, kinds / case
    tied, _ = program.CASES[case]
    model = program.adapted(tied)
    model.calibrate(program.batches(), progress=False)
    for rank in range(2):
        assert Selection.load(folder / f"selection{rank}.safetensors").modules == Selection.of(model).modules
    program.train(model, slice(None))
    found = torch.load(folder / "live.pt")
    torch.testing.assert_close(program.outputs(model), found["outputs"], rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(program.base(tied), folder / "adapter")
    torch.testing.assert_close(program.outputs(loaded), found["outputs"])
    assert_equal_tensors(loaded.merge_and_unload().state_dict(), found["state"])


# --- the guide ------------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "peft_fps" / "training" / "README.md").read_text("utf-8")


TELLING = """
callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, FPSCallback)]
open("centring.txt", "w").write(callbacks[0].centring)
"""


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """Where the program of the guide ran twice: to its end, and resumed from its first checkpoint."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("guide")
    section = GUIDE.split("\n## FSDP2\n")[1].split("\n## ")[0]
    (settings,), (program,), (command,) = (blocks(section, language) for language in ("yaml", "python", "bash"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = shlex.split(command)
        assert words[:2] == ["accelerate", "launch"]
        (folder / words[words.index("--config_file") + 1]).write_text(settings)
        (folder / words[-1]).write_text(program + TELLING)
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        launched = prepare_multi_gpu_env(arguments)
    for name in ("adapter", "resumed"):
        run_together(sharded_program.launched, folder, words[-1], launched | variables_of_a_group(2))
        (folder / "runs" / "fsdp2" / "adapter").rename(folder / name)
        (folder / "runs" / "fsdp2" / "checkpoint-6" / "trainer_state.json").unlink(missing_ok=True)
    return folder, program


def test_the_guides_program_selects_what_one_process_selects(guided):
    folder, program = guided
    names = {}
    exec(program.partition("arguments = ")[0], names)
    report = names["model"].calibrate(
        DataLoader(names["examples"][:200], batch_size=32, collate_fn=default_data_collator), progress=False
    )
    selected = Selection.from_adapter(folder / "adapter")
    assert selected.modules == Selection.of(names["model"]).modules
    assert selected.method["calibration"]["examples"] == 200
    assert "200 examples" in str(report)
    names["model"].unload()
    base = names["model"].get_base_model()
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert isinstance(loaded.merge_and_unload(), nn.Module)


def test_the_guides_program_is_told_that_sharded_entries_are_trained_as_they_are(guided):
    told = (guided[0] / "centring.txt").read_text()
    assert told.startswith("nothing is trained with centred inputs: ")
    assert "sharded" in told


def test_the_guides_program_resumes_where_it_was(guided):
    folder, _ = guided
    assert_equal_tensors(*(load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "resumed")))
