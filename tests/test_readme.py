"""The README's programs run as printed, and its commands are those that CI runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import get_peft_model
from typer.testing import CliRunner

import peft_fps
from peft_fps import FPSConfig, Selection
from peft_fps.benchmarks.transfer.campaign import table_rows
from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.benchmarks.transfer.plan import pending, trials
from peft_fps.benchmarks.transfer.store import read
from peft_fps.cli.app import app
from peft_fps.presets import preset_table
from peft_fps.reproduce.recipes import recipe_table
from tests.helpers import tiny_vit


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


PROGRAM = next(block for block in blocks("python") if "base_model()" in block)


def test_quickstart_runs_as_printed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    accuracy = float(re.search(r"test accuracy ([0-9.]+)", run.stdout)[1])
    assert accuracy > 0.9
    assert "budget 0.770%" in run.stdout
    assert (tmp_path / "runs/quickstart/adapter/adapter_model.safetensors").exists()


FRAGMENTS = [block for block in blocks("python") if block != PROGRAM]


def adapted(*names: str) -> Any:
    """A small ViT with ten classes and adapters that are not trained."""
    base = tiny_vit(num_labels=10)
    model = get_peft_model(base, FPSConfig(per_neuron=2), names[0])
    for name in names[1:]:
        model.add_adapter(name, FPSConfig(per_neuron=1, importance="random"))
    return model


@pytest.mark.parametrize("block", FRAGMENTS, ids=range(len(FRAGMENTS)))
def test_fragments_run_as_printed(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_vit(num_labels=10).save_pretrained("base/model")
    adapted("default").save_pretrained("me/vit-fps")
    adapted("default").save_pretrained("path/to/adapter")
    names = {  # what the text around a fragment speaks of
        "peft_fps": peft_fps,
        "model": adapted("cats", "dogs") if "cats" in block else adapted("default"),
        "other_model": adapted("default"),
        "second": Selection.of(adapted("default")),
        "x": torch.zeros(3, 3, 16, 16),
    }
    exec(compile(block, "README.md", "exec"), names)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    functions = [re.fullmatch(r'(\w+)\(\) \{ (.*) "\$@"; \}', line) for line in lines]
    meanings = {found[1]: found[2] for found in functions if found}
    called = [line.split(maxsplit=1) for line in lines if " " in line]
    lines = [" ".join((meanings.get(name, name), rest)) for name, rest in called]
    return [line for line in lines if line.startswith("peft-fps ")]


@pytest.mark.parametrize("command", commands())
def test_commands_have_the_options_that_are_printed(command: str) -> None:
    found: Any = typer.main.get_command(app)
    _, *words = shlex.split(command, comments=True)
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    found.make_context(found.name, words)


@pytest.mark.parametrize(
    "command",
    [
        'pip install ".[cli]" && peft-fps finetune',
        'pip install -c tests/constraints.txt ".[test]" && python -m pytest',
    ],
)
def test_ci_runs_the_printed_commands(command: str) -> None:
    assert command in [line for block in blocks("bash") for line in block.splitlines()]
    ci = ROOT / ".ci" / "run"
    if not ci.exists():
        pytest.skip("the CI script is not part of a source distribution")
    assert command in ci.read_text().splitlines()


def test_budget_table_is_the_arithmetic_of_vit_b_16() -> None:
    neurons, parameters = 768 + 12 * (4 * 768 + 3072 + 768), 85_798_656
    rows = re.findall(r"^\| (\d+)[^|]* \| ([0-9,]+) \| ([0-9.]+) % \| ([0-9.]+) % \|$", README, re.MULTILINE)
    assert [int(k) for k, *_ in rows][:5] == [0, 1, 2, 5, 6]
    for k, trained, share, with_head in rows[:5]:
        expected = neurons * int(k) + neurons
        assert int(trained.replace(",", "")) == expected
        assert share == f"{100 * expected / parameters:.3f}"
        assert with_head == f"{100 * (expected + 769 * 100) / parameters:.3f}"


def test_the_cost_table_is_the_measured_one() -> None:
    folder = ROOT / "peft_fps" / "benchmarks" / "results"
    assert (folder / "cost.md").read_text(encoding="utf-8").strip() in README
    assert (folder / "cost.png").stat().st_size > 0
    measured = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    assert measured["evidence"]
    assert measured["date"] in README


def test_the_ratios_with_the_systems_malloc_are_measured() -> None:
    path = ROOT / "peft_fps" / "benchmarks" / "results" / "step_system_malloc.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    seconds = {name: raw["median"] for name, raw in measured["rows"]["step"]["raw"]["seconds"].items()}
    installed, alone = (seconds[name] / seconds["lora"] for name in ("fps", "fps-pytorch"))
    assert measured["evidence"]
    assert measured["workload"]["system_malloc"]
    assert f"{installed:.2f} of LoRA's as installed and {alone:.2f} with PyTorch alone" in README


def test_the_language_models_table_is_the_measured_one() -> None:
    path = ROOT / "peft_fps" / "benchmarks" / "results" / "decoder.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    methods = ("full", "supertuning", "lora", "fps", "floor")
    seconds = [f"{rows['step']['raw']['seconds'][name]['median']:.3f}" for name in methods]
    mebibytes = [f"{rows['memory']['raw']['bytes'][name]['peak'] / 2**20:,.0f}" for name in methods]
    assert f"| step, s | {' | '.join(seconds)} |" in README
    assert f"MiB | {' | '.join(mebibytes)} |" in README


def test_the_presets_table_is_the_packages() -> None:
    assert preset_table().strip() in README


def test_the_table_of_recipes_is_the_packages() -> None:
    assert recipe_table().strip() in README


def test_the_tables_of_accuracies_are_those_of_the_kept_cells(tmp_path: Path) -> None:
    kept = ROOT / "peft_fps" / "benchmarks" / "results" / "transfer"
    shutil.copy(kept / "cells.jsonl", tmp_path)
    command = next(command for command in commands() if "benchmark transfer" in command)
    options = re.search(r"benchmark transfer (.*)", command)[1].split()
    model = json.loads((kept / "cells.jsonl").read_text().split("\n")[0])["setting"]["model"]
    given = dict(zip(options[::2], options[1::2], strict=True)) | {"--model": model, "--output": str(tmp_path)}
    arguments = [part for option in given.items() for part in option]
    ended = CliRunner().invoke(app, ["benchmark", "transfer", "--report", *arguments])
    assert ended.exit_code == 0, ended.output
    tables = (tmp_path / "transfer.md").read_text()
    assert tables == (kept / "transfer.md").read_text()
    section = README[README.index("## Which selection is better") : README.index("### How firm a selection is")]
    printed = re.findall(r"^\*\*[^\n]+\*\*\n\n\|.*?(?=\n\n)", section, re.DOTALL | re.MULTILINE)
    assert len(printed) > 5
    for table in printed:
        assert table in tables


def test_the_printed_commands_run_the_kept_cells_and_no_others() -> None:
    header, records = read(ROOT / "peft_fps" / "benchmarks" / "results" / "transfer" / "cells.jsonl")
    setting = Setting(tasks="", **header["setting"])
    kept, asked = {record.cell for record in records}, set()
    for command in re.findall(r"benchmark transfer (--.*)", "\n".join(commands())):
        words = shlex.split(command)
        options = dict(zip(words[::2], words[1::2], strict=True))
        tasks, seeds = options["--only"].split(","), int(options["--seeds"])
        rows = table_rows(options["--methods"].split(","), options["--budgets"].split(","))
        assert pending(tasks, rows, seeds, setting, records) == []
        asked |= {cell for row, task in product(rows, tasks) for cell in trials(row[0], task, setting)}
        asked |= {cell for cell in kept if cell.row in rows and cell.task in tasks and cell.seed < seeds}
    assert kept == asked


def test_the_table_of_overlaps_is_the_measured_one() -> None:
    folder = ROOT / "peft_fps" / "benchmarks" / "results" / "overlap"
    assert (folder / "overlap.md").read_text(encoding="utf-8").strip() in README
    measured = json.loads((folder / "overlap.json").read_text(encoding="utf-8"))
    command = next(block for block in blocks("bash") if "benchmark overlap" in block)
    assert f"--only {','.join(measured['tasks'])} " in command
    assert f"--seeds {measured['seeds']} " in command
    found = [agreement["method"] for agreement in measured["agreements"]]
    methods = re.search(r"--methods (\S+)", command)[1].split(",")
    reference = re.search(r"--reference (\S+)", command)[1]
    assert found[0] == reference
    assert sorted(found) == sorted([reference, *methods])


def test_the_importances_table_is_the_measured_one() -> None:
    path = ROOT / "peft_fps" / "benchmarks" / "results" / "importance.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    raw = measured["rows"]["importance"]["raw"]
    assert measured["evidence"]
    forward = raw["seconds"]["forward"]["median"]
    for name, peak in raw["peak_bytes"].items():
        time = raw["seconds"][name]["median"] / forward
        assert f"| {name} | {time:.1f} | {peak / 2**20:,.0f} |" in README
