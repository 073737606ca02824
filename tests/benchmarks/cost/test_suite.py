"""The command as a user runs it, on a tiny model."""

import json
import statistics

import pytest
from typer.testing import CliRunner

from peft_fps.benchmarks.cost import selection_costs, sizes, suite
from peft_fps.benchmarks.cost.methods import METHODS
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.cli import benchmark_cost
from peft_fps.cli.app import app
from peft_fps.importance import IMPORTANCES


def run(*arguments):
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["benchmark", "cost", *map(str, arguments)], env=environment)


def test_the_command_knows_the_rows_that_there_are():
    assert tuple(suite.ROWS) == benchmark_cost.ROWS


@pytest.fixture(scope="module")
def tiny_run(tiny_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cost") / "new"
    rows = "step,merge,switch,inference,file,attach"
    return run("--model", tiny_folder, "--rows", rows, "--quick", "--threads", 1, "--output", output), output


def test_a_run_ends_with_the_tables_and_writes_them(tiny_run):
    result, output = tiny_run
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == ["cost.json", "cost.md"]
    found = json.loads((output / "cost.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["step", "merge", "switch", "inference", "file", "attach"]
    assert found["evidence"] is False
    assert "no evidence" in result.output
    for row in found["rows"].values():
        for figure in row["figures"]:
            assert figure["what"] in result.output
            assert figure["value"] > 0
    assert {"processor", "torch", "peft", "peft-fps"} <= set(found["machine"])


def test_steps_are_ratios_of_medians(tiny_run):
    row = json.loads((tiny_run[1] / "cost.json").read_text(encoding="utf-8"))["rows"]["step"]
    seconds = row["raw"]["seconds"]
    assert list(seconds) == list(METHODS)
    figures = {figure["what"]: figure for figure in row["figures"]}
    assert figures["FPS as installed ÷ LoRA r=16"]["value"] == pytest.approx(
        sum(seconds["fps"]["all"]) / sum(seconds["lora"]["all"])  # two rounds
    )
    assert figures["FPS as installed ÷ full fine-tuning"]["at_most"] == 0.74
    assert figures["FPS, PyTorch alone ÷ LoRA r=16"]["at_most"] == 1.0
    assert set(row["raw"]["columns_used"]) == {"projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


def test_files_hold_six_entries_per_neuron_and_no_head(tiny_run):
    raw = json.loads((tiny_run[1] / "cost.json").read_text(encoding="utf-8"))["rows"]["file"]["raw"]
    neurons, keys = 32 + 2 * (4 * 32 + 48 + 32), 2 * 32  # of which no bias is trained
    assert raw["FPS, float32"]["trained"] == raw["FPS, bfloat16"]["trained"] == 7 * neurons - keys
    assert raw["FPS, bfloat16"]["bytes"] < raw["FPS, float32"]["bytes"] - 2 * 6 * neurons
    assert raw["LoRA r=16"]["trained"] == 2 * 16 * (4 * 64 + 2 * 80)


def test_bytes_of_a_step(workload):
    found = {name: sizes.bytes_of(name, workload) for name in ("full", "floor", "lora", "shira", "fps-columns")}
    # gradients of all weights live at the end of the backward pass of full fine-tuning alone
    assert found["full"]["peak"] > found["full"]["parameters"]
    assert found["floor"]["saved"] <= min(method["saved"] for method in found.values())
    assert found["fps-columns"]["saved"] < found["full"]["saved"]
    # weights and Adam's two moments of each
    assert found["full"]["rest"] >= 3 * found["full"]["parameters"]


def test_memory_and_selection_measure_in_processes_of_their_own(workload, monkeypatch):
    monkeypatch.setattr(sizes, "METHODS", {name: METHODS[name] for name in ("lora", "fps")})
    row = sizes.measure_memory(workload)
    assert [figure.at_most for figure in row.figures] == [0.68]
    held = row.raw["bytes"]
    assert row.figures[0].value == held["fps"]["peak"] / held["lora"]["peak"]


def test_selection_is_compared_with_forward_passes_and_gradients(workload, monkeypatch):
    monkeypatch.setattr(selection_costs, "in_own_processes", lambda jobs, at_once: [job() for job in jobs])
    row = selection_costs.measure_selection(workload)
    peaks, figures = row.raw["peak_bytes"], {figure.what: figure for figure in row.figures}
    assert peaks["forward"] < peaks["fps"] < peaks["gps"]
    assert row.raw["largest_weight_bytes"] == 32 * 3 * 8 * 8 * 4
    extra = figures["FPS beyond bare forward passes, peak"]
    assert extra.value == (peaks["fps"] - peaks["forward"]) / row.raw["largest_weight_bytes"]
    weights = row.raw["parameter_bytes"]
    with_weights = figures["GPS as its code does ÷ FPS, peak with the weights"]
    assert with_weights.value == (weights + peaks["gps"]) / (weights + peaks["fps"])
    assert (with_weights.at_least, figures["GPS as its code does ÷ FPS, time"].at_least) == (9.0, 2.5)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--rows", "step,lunch"], 2, "lunch"),
        (["--rows", ","], 2, "no list of rows"),
        (["--model", "no/such/model"], 1, "could not be loaded"),
        (["--batch-size", "0"], 2, "batch-size"),
    ],
)
def test_mistakes_are_one_clear_sentence(tmp_path, arguments, code, text):
    result = run(*arguments, "--output", tmp_path / "new")
    assert result.exit_code == code
    assert text in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


def test_every_importance_is_compared_with_forward_passes(workload, monkeypatch):
    monkeypatch.setattr(selection_costs, "in_own_processes", lambda jobs, at_once: [job() for job in jobs])
    row = selection_costs.measure_importances(workload)
    named = {kind.config["importance"] for kind in selection_costs.KINDS.values()}
    assert named == {name for name in IMPORTANCES if name != "random"}
    seconds, peaks = row.raw["seconds"], row.raw["peak_bytes"]
    figures = {figure.what: figure.value for figure in row.figures}
    for name in selection_costs.KINDS:
        expected = statistics.median(seconds[name]["all"]) / statistics.median(seconds["forward"]["all"])
        assert figures[f"{name} ÷ bare forward passes, time"] == pytest.approx(expected)
        assert figures[f"{name}, peak beyond the model"] == peaks[name] / row.raw["parameter_bytes"]
    assert peaks["gradient, contrastive"] > peaks["gradient"] > peaks["activation"]
    assert peaks["l0"] > peaks["movement"]
    assert row.skipped == {}


def test_a_language_model_has_no_contrastive_loss(monkeypatch):
    monkeypatch.setattr(selection_costs, "reads_images", lambda model: False)
    monkeypatch.setattr(selection_costs, "in_own_processes", lambda jobs, at_once: [1 for _ in jobs])
    monkeypatch.setattr(selection_costs, "selecting", lambda name, workload, size, count: lambda: None)
    row = selection_costs.measure_importances(Workload(quick=True))
    assert list(row.skipped) == ["gradient, contrastive"]
    assert not [figure for figure in row.figures if "contrastive" in figure.what]
