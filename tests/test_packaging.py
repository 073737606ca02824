"""The source distribution and the wheel hold what they should, and the wheel works where nothing else of ours is."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parent.parent
LARGEST = 5 * 2**20
IF_PRESENT = {"bitsandbytes", "triton"}
"""Imported only where they are installed already; no extra installs them."""


VERSION = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and, built from that, the wheel."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    run = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


def test_the_wheel_is_the_package_without_results_and_tests(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peft_fps").rglob("*") if path.is_file()}
    wanted = {
        name for name in files if "__pycache__" not in name and not name.startswith("peft_fps/benchmarks/results/")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted
    for needed in ("py.typed", "sparse/kernels/sampled_product.cpp", "vision/default_model/model.safetensors"):
        assert f"peft_fps/{needed}" in held


def test_the_source_distribution_holds_sources_and_no_runs(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    folders, alone = {"peft_fps", "tests", "notebooks"}, {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}
    assert {name.partition("/")[0] for name in names} == folders | alone | {"PKG-INFO", ".gitignore"}
    assert "tests/test_packaging.py" in names
    assert not [name for name in names if "__pycache__" in name or "runs" in name.split("/")]


def test_both_are_small(built: Path) -> None:
    assert [path.name for path in built.iterdir() if path.stat().st_size > LARGEST] == []
    assert len(list(built.iterdir())) == 2


def test_the_metadata_are_valid(metadata: Metadata) -> None:
    assert metadata.name == "peft-fps"
    assert str(metadata.version) == VERSION
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description.startswith("# peft_fps")
    assert str(metadata.requires_python) == ">=3.10"


def test_every_import_is_a_declared_requirement(metadata: Metadata) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in metadata.requires_dist}
    distributions = packages_distributions()
    undeclared = {}
    for path in (ROOT / "peft_fps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {name.partition(".")[0] for name in modules}:
                known = module in sys.stdlib_module_names or module in IF_PRESENT or module == "peft_fps"
                names = {canonicalize_name(name) for name in distributions.get(module, [module])}
                if not known and not names & declared:
                    undeclared[module] = str(path.relative_to(ROOT))
    assert undeclared == {}


def test_every_requirement_has_a_lowest_version(metadata: Metadata) -> None:
    unbound = [
        requirement.name
        for requirement in metadata.requires_dist
        if not any(bound.operator in (">=", "==") for bound in requirement.specifier)
    ]
    assert unbound == []


def test_the_extra_for_tests_has_all_that_tests_may_import(metadata: Metadata) -> None:
    def of_extra(extra: str) -> set[str]:
        found: list[Requirement] = metadata.requires_dist
        return {r.name for r in found if r.marker and r.marker.evaluate({"extra": extra})}

    for extra in ("benchmark", "cli", "docs", "plots", "views"):
        assert of_extra(extra) <= of_extra("test")


# --- the versions that the tests are run with ------------------------------------------------------------------------


def requirements(lines: Iterable[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


CONSTRAINTS = requirements((ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines())


def pins_for(**environment: str) -> dict[str, set[str]]:
    """The versions that are pinned in an environment, by package."""
    pins: dict[str, set[str]] = {}
    for pin in CONSTRAINTS:
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), set()).update(bound.version for bound in pin.specifier)
    return pins


def wanted(requirement: Requirement, extra: str, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra, **environment})


def test_constraints_are_exact_versions() -> None:
    bounds = [list(pin.specifier) for pin in CONSTRAINTS]
    assert {bound.operator for given in bounds for bound in given} == {"=="}
    assert all(len(given) == 1 and "*" not in given[0].version for given in bounds)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_once_within_its_bounds(metadata: Metadata, python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    pins = pins_for(**environment)
    extras = ["", *metadata.provides_extra]
    needed = [r for r in metadata.requires_dist for extra in extras if wanted(r, extra, environment)]
    assert len(needed) > 30
    for requirement in needed:
        if canonicalize_name(requirement.name) == "peft-fps":
            continue
        (version,) = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), str(requirement)


def test_what_pinned_packages_need_is_pinned_too(metadata: Metadata) -> None:
    pins, missing = pins_for(), set()
    asked = {(canonicalize_name(r.name), extra) for r in metadata.requires_dist for extra in ["", *r.extras]}
    seen: set[tuple[str, str]] = set()
    while asked:
        name, extra = one = asked.pop()
        seen.add(one)
        if name not in pins:
            missing |= {name} - {"peft-fps"}
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(found.version).public not in pins[name]:  # another release may need other packages
            continue
        for needed in map(Requirement, found.requires or []):
            if wanted(needed, extra, {}):
                asked |= {(canonicalize_name(needed.name), of) for of in ["", *needed.extras]} - seen
    assert missing == set()
    assert len(seen) > 60


# --- the installed wheel ---------------------------------------------------------------------------------------------


EXTRAS = ["datasets", "kornia", "matplotlib", "pandas", "rich", "scipy", "sklearn", "typer"]

IN_FORKS = """
import os, sys, traceback, warnings

for name in {extras}:
    sys.modules[name] = None  # as if it were not installed
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

def without_extras():
    warnings.resetwarnings()
    from importlib.metadata import version
    from importlib.resources import files
    from pathlib import Path
    import peft_fps

    assert Path(peft_fps.__file__).is_relative_to({folder!r}), peft_fps.__file__
    assert peft_fps.__version__ == version("peft-fps")

    def base():
        torch.manual_seed(0)
        return AutoModelForImageClassification.from_pretrained(files("peft_fps") / "vision" / "default_model").eval()

    model, images = get_peft_model(base(), peft_fps.FPSConfig()), torch.rand(4, 3, 32, 32)
    model.calibrate([{{"pixel_values": images}}], progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fps_values" in name:
                parameter += 0.01
        outputs = model.eval()(images).logits
        model.save_pretrained("adapter")
        merged = PeftModel.from_pretrained(base(), "adapter").merge_and_unload()(images).logits
    torch.testing.assert_close(merged, outputs)
    assert not torch.allclose(outputs, base()(images).logits)
    print(peft_fps.__version__)

def command():
    import runpy

    for name in {extras}:
        del sys.modules[name]
    sys.argv = [{folder!r} + "/bin/peft-fps", "finetune", "--help"]
    runpy.run_path(sys.argv[0], run_name="__main__")

def in_fork(program):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number, kind in ((1, "output"), (2, "errors")):
        os.dup2(os.open(program.__name__ + "." + kind, os.O_CREAT | os.O_WRONLY), number)
    try:
        program()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

print(in_fork(without_extras), in_fork(command))
"""


@dataclass
class Ran:
    status: int
    output: str
    errors: str


@pytest.fixture(scope="module")
def ran(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """What programs do where the wheel is installed, by name: forks of a process that imports other libraries once.

    With warnings as errors, those of imports among them, and without the modules that extras bring.
    """
    folder = tmp_path_factory.mktemp("ran")
    program = IN_FORKS.format(extras=EXTRAS, folder=str(installed))
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-W", "error", "-c", program]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = zip(("without_extras", "command"), map(int, run.stdout.split()), strict=True)
    return {
        name: Ran(status, *((folder / f"{name}.{kind}").read_text() for kind in ("output", "errors")))
        for name, status in found
    }


def test_the_wheel_works_without_the_sources_and_without_any_extra(ran: dict[str, Ran]) -> None:
    run = ran["without_extras"]
    assert run.status == 0, run.errors[-3000:]
    assert run.output.split() == [VERSION]  # peft_fps.__version__


def test_the_wheel_brings_the_command(ran: dict[str, Ran]) -> None:
    """With warnings as errors, those of imports among them."""
    run = ran["command"]
    assert run.status == 0, run.errors[-3000:]
    assert "Usage: peft-fps finetune" in run.output
