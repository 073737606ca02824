"""Which tests need timm; a torchvision that is made for another build of torch keeps timm from being imported."""

from importlib import import_module

import pytest


def works(name: str) -> bool:
    try:
        import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


needs_timm = pytest.mark.skipif(not works("timm"), reason="timm cannot be imported")
