"""How commands end when something cannot be used."""

import pytest
import typer

from peft_fps.cli.terminal import errors_told


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_an_error_is_one_line_and_exit_code_1(error, capsys):
    with pytest.raises(typer.Exit) as ended, errors_told(False):
        raise error("two\n  lines")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "Error: two lines\n"


def test_a_very_long_message_is_cut(capsys):
    with pytest.raises(typer.Exit), errors_told(False):
        raise ValueError("x" * 10_000)
    shown = capsys.readouterr().err
    assert len(shown) < 700
    assert shown.endswith("x...\n")


def test_an_error_without_a_message_is_named(capsys):
    with pytest.raises(typer.Exit), errors_told(False):
        raise OSError
    assert capsys.readouterr().err == "Error: OSError\n"


def test_other_errors_are_let_through_unless_named(capsys):
    with pytest.raises(RuntimeError, match="a bug"), errors_told(False):
        raise RuntimeError("a bug")
    with pytest.raises(typer.Exit), errors_told(False, RuntimeError):
        raise RuntimeError("no memory")
    assert capsys.readouterr().err == "Error: no memory\n"


def test_where_it_arose_is_logged_if_asked_for(caplog):
    with pytest.raises(typer.Exit), errors_told(True):
        raise ValueError("found")
    assert caplog.records[0].exc_info is not None
    caplog.clear()
    with pytest.raises(typer.Exit), errors_told(False):
        raise ValueError("found")
    assert not caplog.records
