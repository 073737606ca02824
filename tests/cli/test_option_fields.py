"""Commands made from dataclasses."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from peft_fps.cli.option_fields import options_of


@dataclass(frozen=True)
class Shape:
    side: Annotated[int, typer.Option(min=1, help="How long.")]
    colour: Annotated[str, typer.Option(help="Any name.")] = "red"
    hidden: int = 3


@pytest.fixture
def command():
    """Runs a command with the fields of `Shape`, and appends what it was called with to `seen`."""
    app, seen = typer.Typer(add_completion=False), []

    @app.command()
    @options_of(Shape, without=("hidden",), colour=Annotated[Literal["red", "blue"], typer.Option(help="One of two.")])
    def draw(name: Annotated[str, typer.Argument()], loud: bool = False, **options: Any) -> None:
        """Draw it."""
        seen.append((name, loud, Shape(**options)))

    def run(*arguments):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

    run.seen = seen
    return run


def test_fields_are_options_beside_the_commands_own(command):
    assert command("x", "--side", "2", "--colour", "blue", "--loud").exit_code == 0
    assert command("y", "--side", "5").exit_code == 0
    assert command.seen == [("x", True, Shape(2, "blue")), ("y", False, Shape(5, "red"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "Missing option '--side'"),
        (["x", "--side", "0"], "--side"),
        (["x", "--side", "1", "--colour", "green"], "'green' is not one of 'red', 'blue'"),
        (["x", "--side", "1", "--hidden", "1"], "No such option: --hidden"),
    ],
)
def test_limits_and_omissions_hold(command, arguments, message):
    ended = command(*arguments)
    assert ended.exit_code == 2
    assert message in " ".join(ended.output.replace("│", " ").split())
    assert command.seen == []


def test_help_has_each_option_once_in_the_order_of_the_fields(command):
    text = command("--help").output
    places = [text.index(option) for option in ("--side", "--colour", "--loud")]
    assert places == sorted(places)
    assert text.count("--colour") == 1
    assert "One of two." in text
    assert "Any name." not in text
    assert "hidden" not in text
