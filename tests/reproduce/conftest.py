"""The fixtures of the command's tests: a cache of its own, one thread, a tiny model."""

from tests.cli.conftest import cache, image_folder, one_thread, tiny_model


__all__ = ["cache", "image_folder", "one_thread", "tiny_model"]
