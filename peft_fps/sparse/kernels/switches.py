"""Environment variables that turn a kernel off."""

import os


OFF = ("0", "false", "no", "off")


def is_switched_on(name: str) -> bool:
    """Whether the environment variable `name` leaves its kernel on.

    Every value leaves it on, the empty one too, except those of `OFF` in lower or upper case.
    """
    return os.environ.get(name, "").strip().lower() not in OFF
