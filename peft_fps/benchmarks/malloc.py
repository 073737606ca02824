"""What the C library does with freed memory, which a step's time may depend on more than on the method.

By default glibc returns freed memory to the system or keeps it, depending on where on the heap it lies. A method whose
memory is returned asks the system for all its pages again in every step. On a ViT-B/16 that takes a third more time
for the same work, and it depends on the order in which methods are built.
"""

import ctypes
import gc
from typing import Any


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> bool:
    """Let this process keep all memory that it frees; returns whether the C library can do that, as glibc can."""
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Return freed memory to the system, so that other processes can have it."""
    gc.collect()  # models refer to themselves
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Return a function of the C library, None where there is none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows
        return None
