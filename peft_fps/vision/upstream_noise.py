"""Warnings and reports of PEFT and transformers that users can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def upstream_deprecations() -> Iterator[None]:
    """Drop the warnings that PEFT causes because it uses what transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


@contextmanager
def no_head_report() -> Iterator[None]:
    """Drop transformers' table of weights that do not fit: the head never does, and callers check the rest."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
