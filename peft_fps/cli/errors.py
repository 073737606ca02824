"""How a command ends when something was wrong with what it was given."""

import logging
from typing import NoReturn

import typer


logger = logging.getLogger(__name__)

LONGEST_ERROR = 600


def fail(error: Exception, verbose: bool) -> NoReturn:
    """Say what was wrong and end with exit code 1.

    Args:
        error: what was wrong.
        verbose: show where in the code as well.
    """
    if verbose:
        logger.error("the error in full", exc_info=error)
    typer.echo(f"Error: {one_line(error)}", err=True)
    raise typer.Exit(1) from error


def one_line(error: Exception) -> str:
    """Return an error's message on one line; of a very long one, the beginning."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 3]}..."
