"""The documents for readers: where they are, their code blocks, commands, tables and links."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support.helpers import ROOT


RESULTS = ROOT / "peft_fps" / "benchmarks" / "results"
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        RESULTS / "README.md",
        ROOT / "peft_fps" / "reproduce" / "README.md",
        ROOT / "peft_fps" / "training" / "README.md",
        *sorted((ROOT / ".github").glob("*.md")),  # not part of a source distribution
    )
}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines that call `peft-fps`, continued lines joined and shell functions replaced by what they stand for."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    functions = [re.fullmatch(r'(\w+)\(\) \{ (.*) "\$@"; \}', line) for line in lines]
    meanings = {found[1]: found[2] for found in functions if found}
    called = [line.split(maxsplit=1) for line in lines if " " in line]
    lines = [" ".join((meanings.get(name, name), rest)) for name, rest in called]
    return [line for line in lines if line.startswith("peft-fps ")]


def rows(text: str) -> list[list[str]]:
    """The cells of all lines of Markdown tables."""
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """The relative links and pictures of a document that lead to no file, or to no heading in it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = path.parent / unquote(parts.path) if parts.path else path
        if not target.exists() or (parts.fragment and parts.fragment not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken
