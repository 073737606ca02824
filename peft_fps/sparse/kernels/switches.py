"""Environment variables that turn a kernel off."""

import os


OFF = ("0", "false", "no", "off")


def is_switched_on(name: str) -> bool:
    """Whether an environment variable leaves its kernel on, as all values but those of `OFF` do, in any case."""
    return os.environ.get(name, "").strip().lower() not in OFF
