"""Imports run one way: a module may be read with what lies below it alone."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


LAYERS = (
    "registration",
    "sparse",
    "selection",
    "base",
    "layers",
    "calibration",
    "gradients",
    "importance",
    "checkpoint",
    "card",
    "presets",
    "config",
    "targets",
    "tokens",
    "lifecycle",
    "saved_selection",
    "model",
    "mixed_model",
    "training",
    "plots",
    "hub",
    "vision",
    "adapter_folders",
    "benchmarks",
    "reproduce",
    "cli",
)
"""The folders and modules of the package, lowest first."""

TOP = "hub"
"""The last that `peft_fps/__init__.py` imports from; what comes later may import from the package itself."""

ROOT = Path(__file__).parents[1]
REQUIRED = {"torch", "peft", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy", "yaml", "tqdm"}


class Import(NamedTuple):
    """An import in a module of the package: of what, on which line, whether it waits for a call of a function."""

    target: str
    line: int
    deferred: bool


def modules() -> dict[str, Path]:
    """The package's modules by dotted name."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "peft_fps").rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}


MODULES = modules()


def imports(name: str) -> Iterator[Import]:
    """The imports in a module; of the package's own modules the module, of others the top-level package."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    holders = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    inside = {id(node) for holder in holders for node in ast.walk(holder)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in MODULES else str(node.module) for each in full]
        else:
            continue
        for target in dict.fromkeys(found):
            own = target.split(".")[0] == "peft_fps"
            yield Import(target if own else target.split(".")[0], node.lineno, id(node) in inside)


IMPORTS = {name: list(imports(name)) for name in MODULES}


def own(name: str) -> list[Import]:
    """The imports in a module of modules of the package."""
    return [each for each in IMPORTS[name] if each.target.startswith("peft_fps") and each.target != name]


def layer(name: str) -> str:
    """The folder or module directly in the package that a module belongs to; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def reached_from(name: str) -> set[str]:
    """All that is imported when a module is, by its dotted name or top-level package."""
    reached, waiting = set(), [name]
    while waiting:
        for each in IMPORTS.get(waiting.pop(), ()):
            if not each.deferred and each.target not in reached:
                reached.add(each.target)
                waiting.append(each.target)
    return reached


def test_the_layers_are_the_packages_folders_and_modules():
    assert sorted(LAYERS) == sorted({layer(name) for name in MODULES} - {""})


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name)])
def test_imports_go_down(name):
    place = LAYERS.index(layer(name))
    below = {*LAYERS[: place + 1], *([""] if place > LAYERS.index(TOP) else [])}
    wrong = [f"line {line}: {target}" for target, line, _ in own(name) if layer(target) not in below]
    assert wrong == []


def test_no_circle():
    waiting, free = {name: {each.target for each in own(name)} for name in MODULES}, set()
    while ready := [name for name, targets in waiting.items() if targets <= free]:
        free.update(ready)
        for name in ready:
            del waiting[name]
    assert sorted(waiting) == []


@pytest.mark.parametrize("name", MODULES)
def test_only_what_needs_an_optional_library_is_imported_within_a_function(name):
    library = REQUIRED | sys.stdlib_module_names
    needless = [
        f"line {line}: {target}"
        for target, line, deferred in own(name)
        if deferred and all(each.startswith("peft_fps") or each in library for each in reached_from(target))
    ]
    assert needless == []


def test_importing_the_package_needs_its_required_libraries_alone():
    outside = {each for each in reached_from("peft_fps") if not each.startswith("peft_fps")}
    assert outside - sys.stdlib_module_names <= REQUIRED


def test_few_modules_lie_beside_the_folders():
    assert len(list((ROOT / "peft_fps").glob("*.py"))) <= 10


def test_a_name_of_a_file_tells_it_from_all_others():
    names = Counter(path.name for path in MODULES.values() if path.name != "__init__.py")
    assert len([name for name, times in names.items() if times > 1]) <= 4


def named_in(text: str, head: str) -> list[str]:
    """The names in backticks in the first column of the tables whose first line begins so."""
    found, within = [], False
    for line in text.splitlines():
        within = line.startswith((head, "|" if within else head))
        found += re.findall(r"`([^`]+)`", line.split("|")[1]) if within else []
    return found


def test_the_table_for_contributors_is_in_the_order_of_imports():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert named_in(text, "| folder or module |") == list(LAYERS)


FOLDERS = {name: path.parent for name, path in MODULES.items() if path.name == "__init__.py" and layer(name)}
MODULE_TABLE = "| module | subject |"


@pytest.mark.parametrize("name", FOLDERS)
def test_the_table_of_a_folder_names_its_modules(name):
    """Each once, in a folder of more than six modules, and in a smaller one that has a table."""
    text = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
    own = {path.stem for path in FOLDERS[name].glob("*.py")} - {"__init__"}
    if len(own) <= 6 and MODULE_TABLE not in text:
        return
    named = named_in(text, MODULE_TABLE)
    beside = {path.parent.name for path in FOLDERS[name].glob("*/__init__.py")}  # a folder in it may have a row
    assert sorted(own - {*named}) == [], "not in the table"
    assert sorted({*named} - own - beside) == [], "in the table, and not there"
    assert len(named) == len({*named})
