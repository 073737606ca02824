"""A plugin of pytest: the first case of each parametrised test alone; versions do not tell the others apart."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: dict[str, pytest.Item] = {}
    for item in items:
        kept.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if kept[item.nodeid.partition("[")[0]] is not item])
    items[:] = kept.values()
