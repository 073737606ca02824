"""The fixtures of the tests of `vision` for `reproduce`: one thread, a tiny model and its images."""

from tests.vision.conftest import image_folder, one_thread, tiny_model


__all__ = ["image_folder", "one_thread", "tiny_model"]
