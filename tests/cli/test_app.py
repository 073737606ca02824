"""The command as a whole."""

import re
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import peft_fps
from peft_fps.cli.app import app, flowing


COMMANDS = (
    *("finetune", "select", "inspect", "compare", "merge", "reproduce vtab-1k", "reproduce fgvc"),
    *("benchmark transfer", "benchmark overlap", "benchmark derive", "benchmark cost"),
)
REPRODUCE = (
    *("--task", "--data", "--image-column", "--label-column", "--model", "--method", "--train-on-all"),
    *("--precision", "--per-neuron", "--epochs", "--learning-rate", "--batch-size", "--warm-up", "--drop-path"),
    *("--ema", "--augmentation", "--image-size", "--seed", "--limit", "--output", "--overwrite", "--verbose"),
)
OPTIONS = {
    "finetune": (
        *("--model", "--data", "--image-column", "--label-column", "--image-size"),
        *("--preset", "--budget", "--per-neuron", "--importance", "--order", "--loss", "--granularity", "--bias"),
        *("--calibration-batches", "--epochs", "--learning-rate", "--bias-learning-rate", "--head-learning-rate"),
        *("--centred", "--not-centred", "--batch-size", "--precision", "--seed", "--output"),
        *("--overwrite", "--verbose"),
    ),
    "reproduce vtab-1k": REPRODUCE,
    "reproduce fgvc": REPRODUCE,
    "benchmark cost": (
        *("--model", "--rows", "--batch-size", "--selection-batch-size", "--precision", "--rounds", "--quick"),
        *("--threads", "--device", "--output", "--verbose"),
    ),
}


def help_of(command: str, columns: int = 200) -> str:
    environment = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": str(columns)}
    ended = CliRunner().invoke(app, [*command.split(), "--help"], env=environment)
    assert ended.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", ended.output)


def test_the_version_is_the_packages():
    ended = CliRunner().invoke(app, ["--version"])
    assert ended.exit_code == 0
    assert ended.output.strip() == peft_fps.__version__


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ("", ["finetune", "select", "inspect", "compare", "merge", "benchmark", "reproduce"]),
        ("reproduce", ["vtab-1k", "fgvc"]),
    ],
)
def test_help_names_every_command(group, commands):
    text = help_of(group)
    for command in commands:
        assert command in text


@pytest.mark.parametrize(
    ("command", "examples", "says"),
    [
        ("finetune", 7, ["0.0077"]),
        ("select", 3, ["--granularity"]),
        ("inspect", 3, []),
        ("compare", 3, []),
        ("merge", 2, ["memory for the largest of them"]),
        ("reproduce vtab-1k", 3, ['pip install "peft-fps[reproduce]"', "smallnorb_azi", "train800val200.txt"]),
        ("reproduce fgvc", 3, ['pip install "peft-fps[reproduce]"', "nabirds", "val.json"]),
        ("benchmark cost", 4, []),
    ],
)
def test_help_is_a_page_to_work_from(command, examples, says):
    text = help_of(command)
    assert text.count(f"$ peft-fps {command}") == examples
    for part in says:
        assert part in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_its_examples_no_other(command):
    text = help_of(command)
    for option in OPTIONS[command]:
        assert re.search(rf"{option}\b", text), option
    for line in re.findall(rf"\$ peft-fps {command}(.*)", text):
        assert set(re.findall(r"--[a-z-]+", line)) <= set(OPTIONS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_paragraphs_of_help_fill_a_narrow_terminal(command):
    """Only the width ends a line, not the place where the source has a line break."""
    width = 80
    prose = "\n".join(line.rstrip() for line in help_of(command, width).partition("╭")[0].splitlines())
    paragraphs = [part.strip("\n").splitlines() for part in prose.split("\n\n") if "    $ " not in part]
    assert max(map(len, paragraphs)) > 1
    for paragraph in paragraphs:
        for line, after in pairwise(paragraph):
            assert len(f"{line} {after.split()[0]}") >= width, line


def test_lists_and_programs_keep_their_lines():
    text = "Some\nwords.\n\n- one\n- two\n\n    $ first\n    $ second\n\nMore\nwords."
    assert flowing(text) == text.replace("\nwords", " words")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_panel_of_help_holds_verbose_alone(command):
    panels = [panel for panel in help_of(command, columns=100).split("╭") if "--verbose" in panel]
    assert len(panels) == 1
    assert "--help" in panels[0] or "--output" in panels[0]
