"""What the C library does with freed memory, which a step's time may depend on more than on the method.

By default glibc returns freed memory to the system, or keeps it, depending on where on the heap it happens to lie.
Whoever loses that lottery gets all its pages anew in every step: on a ViT-B/16 a third more time for the same work,
for whichever method is built in an unlucky order.
"""

import ctypes
import gc
from typing import Any


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> bool:
    """Let this process keep all memory that it frees, for its next step; returns whether the C library can (glibc)."""
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Return what is free to the system, before other processes need it."""
    gc.collect()  # models refer to themselves
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows
        return None
