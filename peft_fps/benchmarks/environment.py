"""Environment variables for a while."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Keeps PyTorch's libraries from writing to stderr; they read it when they are loaded."""


@contextmanager
def switched(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
