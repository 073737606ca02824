"""Linter, formatter and type checker find nothing; test modules stand alone; what runs on GitHub may do little."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
on_github = pytest.mark.skipif(not GITHUB.is_dir(), reason="the workflows are not part of a source distribution")


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_clean(command: list[str]) -> None:
    if shutil.which(command[0], path=Path(sys.executable).parent) is None:
        pytest.skip(f"{command[0]} is not installed beside this Python")
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_no_test_module_imports_another() -> None:
    """What several share lies in modules that hold no tests, so that a module can be read and run alone."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [n for n in names if n.startswith("test_")], f"{path.relative_to(ROOT)}, line {node.lineno}"


def workflows() -> dict[str, dict[str, Any]]:
    paths = (GITHUB / "workflows").glob("*.yml")
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@on_github
def test_actions_are_pinned_by_their_commits_and_leave_no_credentials() -> None:
    used = [step for workflow in workflows().values() for step in steps(workflow) if "uses" in step]
    assert used
    for step in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    lines = [line for path in (GITHUB / "workflows").glob("*.yml") for line in path.read_text().splitlines()]
    versions = {line.partition("uses: ")[2] for line in lines if "uses:" in line}
    assert all(re.search(r"  # v\d+\.\d+\.\d+$", version) for version in versions), versions
    assert len(versions) == len({version.partition("@")[0] for version in versions})  # one version of each action


PERMISSIONS = {"release.yml pypi": {"id-token": "write"}, "release.yml github": {"contents": "write"}}
"""Of the jobs that may do more than read, and then no more than this."""


@on_github
def test_workflows_may_only_read_but_for_a_release() -> None:
    for file, workflow in workflows().items():
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            assert job["permissions"] == PERMISSIONS.get(f"{file} {name}", {"contents": "read"})
            assert job["timeout-minutes"] <= 90
        # what others write, a branch's name say, never becomes part of a command
        assert not [step for step in steps(workflow) if "${{" in step.get("run", "")]


@on_github
def test_the_workflow_runs_the_commands_of_the_readme() -> None:
    commands = [step.get("run", "") for step in steps(workflows()["ci.yml"])]
    tested = 'pip install -c tests/constraints.txt ".[test]" && python -m pytest'
    for command in ('pip install ".[cli]" && peft-fps finetune', tested):
        assert any(run == command or run.startswith(f"{command} ") for run in commands)


@on_github
def test_what_the_printed_command_leaves_out_is_run_beside_it() -> None:
    command = "python -m pytest -n 0 tests/minimum_versions"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert command in [step.get("run") for step in steps(workflows()["ci.yml"])]


@on_github
def test_the_newest_versions_are_tested_weekly_apart_from_the_verdict() -> None:
    newest = workflows()["newest.yml"]
    assert set(newest[True]) == {"schedule", "workflow_dispatch"}  # YAML reads "on" as a truth value
    commands = [step.get("run", "") for step in steps(newest)]
    assert not any("constraints" in command for command in commands)
    assert commands.index("pip freeze") < commands.index("python -m pytest")


@on_github
def test_issue_forms_ask_questions() -> None:
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug.yml", "feature.yml"}
    for form in forms.values():
        assert form["name"]
        assert form["description"]
        ids = [question["id"] for question in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(question["attributes"]["label"] for question in form["body"])
        assert {question["type"] for question in form["body"]} <= {"textarea", "input", "dropdown"}
