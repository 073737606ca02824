"""The command as a whole."""

from itertools import pairwise

import pytest
from typer.testing import CliRunner

import peft_fps
from peft_fps.cli.app import app, flowing


def test_the_version_is_the_packages():
    ended = CliRunner().invoke(app, ["--version"])
    assert ended.exit_code == 0
    assert ended.output.strip() == peft_fps.__version__


def test_help_names_every_command():
    ended = CliRunner().invoke(app, ["--help"])
    assert ended.exit_code == 0
    for command in ("finetune", "select", "inspect", "compare", "merge", "benchmark", "reproduce"):
        assert command in ended.output


COMMANDS = (
    *("finetune", "select", "inspect", "compare", "merge", "reproduce vtab-1k", "reproduce fgvc"),
    *("benchmark transfer", "benchmark overlap", "benchmark derive", "benchmark cost"),
)
PLAIN = {"NO_COLOR": "1", "TERM": "dumb"}


@pytest.mark.parametrize("command", COMMANDS)
def test_paragraphs_of_help_fill_a_narrow_terminal(command):
    """Only the width ends a line, not the place where the source has a line break."""
    width = 80
    ended = CliRunner().invoke(app, [*command.split(), "--help"], env=PLAIN | {"COLUMNS": str(width)})
    prose = "\n".join(line.rstrip() for line in ended.output.partition("╭")[0].splitlines())
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
    text = CliRunner().invoke(app, [*command.split(), "--help"], env=PLAIN | {"COLUMNS": "100"}).output
    panels = [panel for panel in text.split("╭") if "--verbose" in panel]
    assert len(panels) == 1
    assert "--help" in panels[0] or "--output" in panels[0]
