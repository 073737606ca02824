"""The fixtures of the tests of `vision` for `reproduce`: a cache, one thread, a tiny model and its images."""

from tests.vision.conftest import cache, image_folder, one_thread, tiny_model


__all__ = ["cache", "image_folder", "one_thread", "tiny_model"]
