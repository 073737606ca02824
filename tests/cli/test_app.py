"""The command as a whole."""

from typer.testing import CliRunner

import peft_fps
from peft_fps.cli.app import app


def test_the_version_is_the_packages():
    ended = CliRunner().invoke(app, ["--version"])
    assert ended.exit_code == 0
    assert ended.output.strip() == peft_fps.__version__


def test_help_names_every_command():
    ended = CliRunner().invoke(app, ["--help"])
    assert ended.exit_code == 0
    for command in ("finetune", "select", "inspect", "compare", "merge", "benchmark", "reproduce"):
        assert command in ended.output
