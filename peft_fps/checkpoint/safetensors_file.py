"""The one place where this package opens a safetensors file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


FILE_REMEDY = "The file is damaged or belongs to another model; fetch or save it again."
"""What to do about a file that fails a check."""


@contextmanager
def open_safetensors(path: Path, *, mapped: bool = True) -> Iterator[Any]:
    """Open a safetensors file for reading.

    safetensors checks the header and the length of the file when it opens it. It reads a tensor when it is asked for.

    Args:
        path: of the file.
        mapped: map the file into memory, so that of a tensor only the pages that are used are read. Otherwise each
            tensor is read into memory of its own, which may be written to.

    Yields:
        The reader of safetensors, with `keys()`, `metadata()`, `get_tensor(key)` and `get_slice(key)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: safetensors cannot read the file, at its opening or within the block.
    """
    try:
        with safe_open(path, framework="pt", backend="mmap" if mapped else "pread") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: found {str(error) or type(error).__name__}, expected an "
            f"intact one. {FILE_REMEDY}"
        ) from error
