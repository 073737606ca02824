"""The README's programs run as printed, its commands are those that CI runs, its tables are taken from the results."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import get_peft_model

import peft_fps
from peft_fps import FPSConfig
from peft_fps.benchmarks.tables import TextTable, markdown_table
from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.benchmarks.transfer.store import read
from peft_fps.benchmarks.transfer.transfer_tables import Results, accuracy_table, difference_table
from peft_fps.cli.app import app
from peft_fps.reproduce.recipes import recipe_table
from tests.support.documents import DOCUMENTS, RESULTS, blocks, broken_links, commands, rows
from tests.support.forked import run_program
from tests.support.helpers import ROOT, tiny_vit
from tests.support.preset_table import preset_table


README = DOCUMENTS["README.md"].read_text(encoding="utf-8")
PROGRAM = next(block for block in blocks(README, "python") if "base_model()" in block)
LONGEST = 250


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


# --- programs and commands -------------------------------------------------------------------------------------------


def test_quickstart_runs_as_printed(tmp_path: Path) -> None:
    printed, _ = run_program(PROGRAM, folder=tmp_path)
    accuracy = float(re.search(r"test accuracy ([0-9.]+)", printed)[1])
    assert accuracy > 0.9
    assert "budget 0.770%" in printed
    assert (tmp_path / "runs/quickstart/adapter/adapter_model.safetensors").exists()


FRAGMENTS = {
    f"{name} {number}": block
    for name, path in DOCUMENTS.items()
    for number, block in enumerate(blocks(path.read_text(encoding="utf-8"), "python"))
    if block != PROGRAM and name != "peft_fps/training/README.md"  # whose program test_sharded.py launches
}


class NoTrainer:
    """Stands for a trainer that has written no checkpoint yet."""

    def train(self, resume_from_checkpoint: str | None) -> None:
        assert resume_from_checkpoint is None


@pytest.mark.parametrize("block", FRAGMENTS.values(), ids=FRAGMENTS)
def test_fragments_run_as_printed(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_vit(num_labels=10).save_pretrained("base/model")
    get_peft_model(tiny_vit(num_labels=10), FPSConfig(per_neuron=2)).save_pretrained("me/vit-fps")
    # what the text around a fragment speaks of
    names = {"peft_fps": peft_fps, "trainer": NoTrainer(), "output_dir": str(tmp_path)}
    exec(compile(block, "a document", "exec"), names)
    if "model" in names:
        assert isinstance(names["model"], torch.nn.Module)


COMMANDS = [command for path in DOCUMENTS.values() for command in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("command", COMMANDS)
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
    assert command in [line for block in blocks(README, "bash") for line in block.splitlines()]
    ci = ROOT / ".ci" / "run"
    if not ci.exists():
        pytest.skip("the CI script is not part of a source distribution")
    assert command in ci.read_text().splitlines()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_table_of_results_is_taken_from_the_kept_cells() -> None:
    command = next(command for command in commands(README) if "benchmark transfer" in command)
    words = shlex.split(command)
    methods, default = (words[words.index(option) + 1] for option in ("--methods", "--baseline"))
    header, records = read(RESULTS / "transfer" / "cells.jsonl")
    setting = Setting(tasks="", **header["setting"])
    results = Results(records, setting)
    shown = [row for name in methods.split(",") for row in results.rows if row in ((name, None), (name, 0.0077))]
    assert len(shown) == len(methods.split(",")) <= 10
    accuracies = accuracy_table(results, shown, "")
    columns = [accuracies.header.index(name) for name in ("method", "trained, %", "seeds", "mean")]
    differences = difference_table(results, [row for row in shown if row[0] != default], (default, 0.0077))
    compared = {line[0]: (line[1], line[5]) for line in differences.lines}
    lines = tuple(
        (*(line[column] for column in columns), *compared.get(line[0], ("", ""))) for line in accuracies.lines
    )
    names = ("method", "trained, %", "seeds", "accuracy, %", "difference to the last row", "")
    assert markdown_table(TextTable("", names, lines)) in README


def test_the_table_of_costs_is_the_measured_one() -> None:
    measured = (RESULTS / "cost.md").read_text(encoding="utf-8")
    step = measured[measured.index("**One training step") : measured.index("**Measured and target**")]
    header, _, *lines = rows(step)
    columns = [header.index(name) for name in ("method", "step, s", "÷ full", "peak, MiB")]
    columns.append(len(header) - 1 - header[::-1].index("÷ LoRA"))  # the second of that name, of the peak
    printed = README[README.index("## Costs") : README.index("## Commands")]
    head, _, *shown = rows(printed)
    assert head == ["method", "step, s", "÷ full fine-tuning", "peak memory, MiB", "÷ LoRA"]
    assert 5 < len(shown) <= 10
    expected = [[line[column] for column in columns] for line in lines]
    assert shown == [line for line in expected if line[0] in {cells[0] for cells in shown}]
    found = rows(measured[measured.index("**Measured") :])[2:]
    figures = {tuple(line[:2]): float(line[2].split()[0]) for line in found}
    for text, row, what in (
        ("Selecting takes {:.2f} times", "selection", "FPS ÷ bare forward passes, time"),
        ("as GPS does takes {:.0f} times", "selection", "GPS as its code does ÷ FPS, time"),
        ("Merging takes {:.2f} of LoRA's time", "merge", "FPS ÷ LoRA r=16, merge"),
    ):
        assert text.format(figures[row, what]) in " ".join(printed.split())
    raw = json.loads((RESULTS / "tokens.json").read_text(encoding="utf-8"))["rows"]["tokens"]["raw"]
    step, inference = (
        f"{raw[row]['keep-0.7']['median'] / raw[row][other]['median']:.2f}"
        for row, other in (("step", "lora"), ("inference", "keep-1"))
    )
    peak = f"{raw['bytes']['keep-0.7']['peak'] / raw['bytes']['lora']['peak']:.2f}"
    sentence = f"a step takes {step} of LoRA's time and {peak} of its memory, and inference {inference} of the base's"
    assert sentence in " ".join(printed.split())
    assert json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))["date"] in printed


def test_the_tables_of_presets_and_recipes_are_the_packages() -> None:
    text = DOCUMENTS["peft_fps/reproduce/README.md"].read_text(encoding="utf-8")
    assert preset_table().strip() in text
    assert recipe_table().strip() in text


def test_the_budgets_of_the_notebook_are_the_arithmetic_of_vit_b_16() -> None:
    cells = json.loads((ROOT / "notebooks" / "choosing_a_budget.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    neurons, parameters = 768 + 12 * (4 * 768 + 3072 + 768), 85_798_656
    found = re.findall(r"^\| (\d+)[^|]* \| ([0-9,]+) \| ([0-9.]+) % \| ([0-9.]+) % \|$", text, re.MULTILINE)
    assert [int(k) for k, *_ in found][:5] == [0, 1, 2, 5, 6]
    for k, trained, share, with_head in found[:5]:
        expected = neurons * int(k) + neurons - 12 * 768  # without biases of keys
        assert int(trained.replace(",", "")) == expected
        assert share == f"{100 * expected / parameters:.3f}"
        assert with_head == f"{100 * (expected + 769 * 100) / parameters:.3f}"


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    broken = broken_links(DOCUMENTS[name], text)
    if not (ROOT / ".github").is_dir():  # in a source distribution
        broken = [link for link in broken if ".github/" not in link]
    assert broken == []


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_link_of_a_notebook_leads_somewhere_and_the_readme_names_it(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    broken = broken_links(path, text)
    if not (ROOT / ".github").is_dir():
        broken = [link for link in broken if ".github/" not in link]
    assert broken == []
    assert f"notebooks/{path.name}" in README


def test_a_broken_link_is_found() -> None:
    text = "[a](#here) [b](#there) [c](README.md#install) [d](README.md#missing) [e](nothing.md) ![f](x.png)\n# Here\n"
    path = ROOT / "a.md"
    broken = broken_links(path, text.replace("(#here)", "(README.md)").replace("(#there)", "(LICENSE)"))
    assert broken == ["README.md#missing", "nothing.md", "x.png"]
