"""A release: a section of the changelog on the version, and a workflow that publishes what was checked."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from tests.support.helpers import ROOT


PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "([^"]+)"$', PROJECT, re.MULTILINE)[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
on_github = pytest.mark.skipif(not WORKFLOW.exists(), reason="the workflows are not part of a source distribution")


def section(version: str) -> str:
    """The changelog's text on a version, without its heading."""
    lines = CHANGELOG.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(f"## [{version}]")]
    rest = lines[start + 1 :]
    end = next((number for number, line in enumerate(rest) if line.startswith("## [")), len(rest))
    return "\n".join(rest[:end]).strip()


def test_the_version_has_its_section_below_an_unreleased_one() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[([0-9][^\]]*)\] - (\d{4}-\d{2}-\d{2})", heading) for heading in headings[1:]]
    assert all(released)
    versions = [Version(found[1]) for found in released]
    assert Version(VERSION) in versions
    assert versions == sorted(set(versions), reverse=True)
    dates = [found[2] for found in released]
    assert dates == sorted(dates, reverse=True)
    assert "### Added" in section(VERSION)


def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def command(job: str, name: str) -> str:
    (step,) = [step for step in jobs()[job]["steps"] if step.get("name") == name]
    return step["run"]


def run(line: str, folder: Path, tag: str) -> int:
    environment = {"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag}
    return subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, capture_output=True).returncode


@on_github
def test_the_release_has_the_text_of_the_changelog(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    line = command("github", "The changelog's section")
    assert run(line, tmp_path, f"v{VERSION}") == 0
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").strip() == section(VERSION)
    assert run(line, tmp_path, "v99.0.0") != 0
    older = CHANGELOG + "\n## [0.0.1] - 2026-01-01\n\n- Older.\n"
    (tmp_path / "CHANGELOG.md").write_text(older, encoding="utf-8")
    assert run(line, tmp_path, f"v{VERSION}") == 0
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").strip() == section(VERSION)
    assert run(line, tmp_path, "v0.0.1") == 0
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").strip() == "- Older."


@on_github
def test_a_tag_that_is_not_the_version_stops_the_release(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    (tmp_path / "dist").mkdir()
    for name in (f"peft_fps-{VERSION}.tar.gz", f"peft_fps-{VERSION}-py3-none-any.whl"):
        (tmp_path / "dist" / name).touch()
    for name in ("The tag is the version", "The changelog has a section on it"):
        assert run(command("build", name), tmp_path, f"v{VERSION}") == 0
        assert run(command("build", name), tmp_path, "v99.0.0") != 0


@on_github
def test_what_is_unreleased_stops_the_release(tmp_path: Path) -> None:
    line = command("build", "Nothing in the changelog is left unreleased")
    released = f"# Changelog\n\n## [Unreleased]\n\n## [{VERSION}] - 2026-01-01\n\n- A thing.\n"
    (tmp_path / "CHANGELOG.md").write_text(released, encoding="utf-8")
    assert run(line, tmp_path, f"v{VERSION}") == 0
    left = released.replace("## [Unreleased]\n", "## [Unreleased]\n\n### Added\n\n- More.\n")
    (tmp_path / "CHANGELOG.md").write_text(left, encoding="utf-8")
    assert run(line, tmp_path, f"v{VERSION}") != 0


@on_github
def test_what_is_published_is_what_was_checked() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as a truth value
    build, pypi, github = (workflow["jobs"][name] for name in ("build", "pypi", "github"))
    done = [step.get("run") or step["uses"].partition("@")[0] for step in build["steps"]]
    checks = ["twine check --strict dist/*", next(line for line in done if "pytest" in line)]
    built = next(number for number, line in enumerate(done) if "python -m build" in line)
    assert built < min(map(done.index, checks))
    assert done[-1] == "actions/upload-artifact"
    assert (pypi["needs"], github["needs"]) == ("build", "pypi")
    assert pypi["environment"]["name"] == "pypi"
    # whoever may ask for PyPI's trust runs no code but these two
    used = [step["uses"].partition("@")[0] for step in pypi["steps"]]
    assert used == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    assert not [step for step in pypi["steps"] if "password" in step.get("with", {})]
    tested = re.findall(r"tests/\S+\.py", checks[1])
    assert all((ROOT / path).exists() for path in tested)
    assert "tests/test_packaging.py" in tested
