"""The reference that pdoc makes of the docstrings: complete, without warnings, every link leading somewhere."""

import inspect
import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from peft import PeftConfig

import peft_fps
from peft_fps import plots
from tests.support.forked import run_program


ROOT = Path(__file__).parent.parent
COMMAND = "python -m pdoc peft_fps peft_fps.plots --docformat google --output-directory runs/docs"
PUBLIC = {"peft_fps.html": peft_fps, "peft_fps/plots.html": plots}
PROGRAM = """
import runpy, warnings
warnings.simplefilter("error")
# PEFT's configs have annotations in strings that pdoc reads in our module; ours has no Optional
warnings.filterwarnings("ignore", "Error parsing type annotation Optional")
runpy.run_module("pdoc", run_name="__main__")
"""


@dataclass
class Page(HTMLParser):
    """The anchors and links of a page, and the text of its docstrings outside of code."""

    anchors: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    prose: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._docstring = self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found["id"]} if found.get("id") else set()
        self.links |= {found["href"]} if tag == "a" and found.get("href") else set()
        if tag == "div" and (self._docstring or found.get("class") == "docstring"):
            self._docstring += 1
        if self._docstring:
            self.tags.add(tag)
        self._code += tag in ("pre", "code")

    def handle_endtag(self, tag: str) -> None:
        self._docstring -= tag == "div" and self._docstring > 0
        self._code -= tag in ("pre", "code")

    def handle_data(self, data: str) -> None:
        if self._docstring and not self._code:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages by name, built by the documented command with warnings as errors."""
    folder = tmp_path_factory.mktemp("docs")
    _, errors = run_program(PROGRAM, *COMMAND.split()[3:-1], str(folder), folder=ROOT)
    assert "warn" not in errors.lower()
    pages = {}
    for path in folder.rglob("*.html"):
        page = pages[path.relative_to(folder).as_posix()] = Page()
        page.feed(path.read_text(encoding="utf-8"))
    return pages


def public(module: ModuleType) -> list[str]:
    """The names of a module's functions and classes, and those of the classes' own public methods."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        found.append(name)
        if inspect.isclass(value):
            found += [f"{name}.{own}" for own, v in vars(value).items() if own[0] != "_" and inspect.isroutine(v)]
    return found


def test_the_workflow_builds_the_reference_with_this_command() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("the workflows are not part of a source distribution")
    assert f"- run: {COMMAND}\n" in workflow.read_text(encoding="utf-8")


def test_every_public_name_has_its_place(site: dict[str, Page]) -> None:
    assert set(PUBLIC) <= set(site)
    for name, module in PUBLIC.items():
        assert [own for own in public(module) if own not in site[name].anchors] == []


def test_no_link_is_broken(site: dict[str, Page]) -> None:
    broken, followed = [], 0
    for name, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            whole = target in site and (not parts.fragment or parts.fragment in site[target].anchors)
            broken += [] if whole else [(name, link)]
            followed += 1
    assert broken == []
    assert followed > 20


def test_no_markup_is_left_as_text_or_made_of_a_sentence(site: dict[str, Page]) -> None:
    for name in PUBLIC:
        text = "".join(site[name].prose)
        assert "Arguments:" in text
        for remnant in ("`", "**", "](", "Args:", "\nReturns:\n    "):
            assert remnant not in text, text[text.index(remnant) - 200 :][:300]
        assert "ol" not in site[name].tags  # a line of a docstring that begins with a number and a dot


@pytest.mark.parametrize("module", PUBLIC.values(), ids=lambda module: module.__name__)
def test_every_parameter_is_documented(module: ModuleType) -> None:
    inherited = set(inspect.signature(PeftConfig).parameters)
    missing = []
    for name in public(module):
        value = module
        for part in name.split("."):
            value = getattr(value, part)
        if not callable(value) or "Args:" not in (inspect.getdoc(value) or ""):
            continue
        args = re.search(r"Args:\n(.*?)(\n\w|\Z)", inspect.getdoc(value), re.DOTALL)[1]
        own = set(inspect.signature(value).parameters) - {"self", "cls"} - inherited
        missing += [f"{name}: {own_name}" for own_name in own if not re.search(rf"^ +{own_name}:", args, re.MULTILINE)]
    assert missing == []
