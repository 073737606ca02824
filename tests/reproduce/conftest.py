"""The fixtures of the tests of `vision`: a cache of its own, one thread, a tiny model."""

from tests.vision.conftest import cache, image_folder, one_thread, tiny_model


__all__ = ["cache", "image_folder", "one_thread", "tiny_model"]
