"""Pytest plugin that adds the FPS cases to PEFT's test modules, selects them and reports counts per file."""

import functools
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from . import cases, hub_aliases


hub_aliases.install()

_EXTENDED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that keeps PEFT's own cases."""
    parser.addoption("--every-method", action="store_true", help="also run the cases that do not involve FPS")


def _test_functions(module: ModuleType) -> Iterator[Any]:
    """Yield the test functions of a module and of its classes."""
    for namespace in [module, *(cls for _, cls in inspect.getmembers(module, inspect.isclass))]:
        for name, function in vars(namespace).items():
            if name.startswith("test") and hasattr(function, "pytestmark"):
                yield function


def _append(function: Any, entries: list[Any], names: str | None = None, values: Any = None) -> int:
    """Append entries to the parametrize marks of a test with these names or values; return how many were found."""
    found = 0
    for index, mark in enumerate(function.pytestmark):
        if mark.name == "parametrize" and (mark.args[0] == names or mark.args[1] is values):
            found += 1
            mark_names, mark_values, *rest = mark.args
            kwargs = dict(mark.kwargs)
            if "ids" in kwargs:
                kwargs["ids"] = [*kwargs["ids"], *(f"FPS{number or ''}" for number in range(len(entries)))]
            decorator = pytest.mark.parametrize(mark_names, [*mark_values, *entries], *rest, **kwargs)
            function.pytestmark[index] = decorator.mark
    return found


def _extend(module: Any) -> None:
    """Add the FPS cases to an imported test module, before its tests are collected.

    Decorators keep a reference to the list (or the view of the dict) they were given, so appending in place reaches
    them; tuples and lists without a name are replaced in the decorators.
    """
    name = module.__name__.rpartition(".")[2]
    for attribute, entries in cases.LISTS.get(name, {}).items():
        getattr(module, attribute).extend(entries)
    for attribute, named_entries in cases.DICTS.get(name, {}).items():
        getattr(module, attribute).update(named_entries)
    for attribute, entries in cases.TUPLES.get(name, {}).items():
        values = getattr(module, attribute)
        found = sum(_append(test, entries, values=values) for test in _test_functions(module))
        assert found, f"{name}.{attribute} no longer parametrises a test"
    for test_name, (parameter, entries) in cases.DECORATORS.get(name, {}).items():
        tests = [test for test in _test_functions(module) if test.__name__ == test_name]
        found = sum(_append(test, entries, names=parameter) for test in tests)
        assert found == 1, f"{name}.{test_name} is no longer parametrised with {parameter!r}"


def _unless_fps(check: Callable[..., None]) -> Callable[..., None]:
    """Wrap a check of a test module so that it is not applied to FPS."""
    signature = inspect.signature(check)

    @functools.wraps(check)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if signature.bind(*args, **kwargs).arguments["config_cls"] is not cases.FPSConfig:
            check(*args, **kwargs)

    return wrapper


def _seeded(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the constructor of a model so that it always draws the same weights."""

    def wrapper(*args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            init(*args, **kwargs)

    return wrapper


def _lift_restrictions(module: Any) -> None:
    """Undo skips that name methods one by one and therefore hit FPS by default."""
    name = module.__name__.rpartition(".")[2]
    if name.startswith("test_") and hasattr(module, "PeftCommonTester"):
        common: Any = inspect.getmodule(module.PeftCommonTester)
        # Conv1D (GPT-2) is skipped for all methods but an allow list; FPS supports it
        if not hasattr(common._skip_if_conv1d_not_supported, "__wrapped__"):
            common._skip_if_conv1d_not_supported = _unless_fps(common._skip_if_conv1d_not_supported)
    if name == "test_decoder_models":
        # meant for BEFT, but its isinstance test on a class never holds, so the merge tests of Llama and Gemma are
        # skipped and those of GPT-J retargeted for every method
        module.check_beft_config = _unless_fps(module.check_beft_config)
    if name == "test_custom_models":
        # its tests load adapters onto a model of other random weights, which FPS takes for a wrong base model
        module.DeepMLP.__init__ = _seeded(module.DeepMLP.__init__)
    if hasattr(module, "hub_online_once"):
        hub_aliases.never_go_online(inspect.getmodule(inspect.unwrap(module.hub_online_once)))


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> None:
    """Extend a test module once, when its first member is collected."""
    if isinstance(collector, pytest.Module) and _EXTENDED not in collector.stash:
        collector.stash[_EXTENDED] = True
        _extend(collector.obj)
        _lift_restrictions(collector.obj)


def _involves_fps(value: Any) -> bool:
    """Whether the value of a test parameter is FPSConfig, a partial or instance of it, or a tuple with one."""
    if isinstance(value, tuple):
        return any(map(_involves_fps, value))
    value = getattr(value, "func", value)
    return value is cases.FPSConfig or isinstance(value, cases.FPSConfig)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the cases that involve FPS, and mark those that FPS fails on purpose."""
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        with_fps = any(map(_involves_fps, parameters)) or item.name in cases.UNPARAMETRISED
        for test_name, part, reason in cases.EXPECTED_FAILURES:
            if with_fps and getattr(item, "originalname", None) == test_name and part in item.name:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        (kept if with_fps or config.getoption("--every-method") else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests passed, failed and were skipped in each file."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[report.nodeid.split("::")[0]][outcome] += 1
    terminalreporter.section("outcomes per file")
    for file, outcomes in sorted(counts.items()):
        terminalreporter.line(f"{file}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
