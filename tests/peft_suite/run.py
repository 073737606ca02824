"""Run PEFT's own test suite, offline, with FPS added to the lists of methods it tests.

Usage:
    python tests/peft_suite/run.py PATH_TO_PEFT_SDIST [pytest arguments]

PATH_TO_PEFT_SDIST is an unpacked source distribution of the installed PEFT release, e.g. from
`pip download --no-deps --no-binary :all: peft==X.Y.Z`. Only the cases that involve FPS run; `--every-method` keeps
PEFT's own cases as well. Test files can be named (`test_custom_models.py`), by default all of `TEST_FILES` run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


TESTS_FOLDER = Path(__file__).resolve().parent.parent
PACKAGE_ROOT = TESTS_FOLDER.parent

TEST_FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_seq_classifier.py",
    "test_torch_compile.py",
    "test_vision_models.py",
)

# test file -> text in the body of a test, out of the plugin's reach, and what replaces it
SOURCE_EDITS = {
    "test_low_level_api.py": (
        '{LoraConfig: "lora_", LoKrConfig: "lokr_"}[config_cls]',
        '{LoraConfig: "lora_", LoKrConfig: "lokr_"}.get(config_cls, "fps_")',
    ),
}


def copy_suite(sdist: Path, target: Path) -> None:
    """Copy the tests of the source distribution, which lacks the file that makes them an importable package."""
    tests = target / "tests"
    shutil.copytree(sdist / "tests", tests)
    (tests / "__init__.py").touch()
    shutil.copy(sdist / "pyproject.toml", target)
    for name, (old, new) in SOURCE_EDITS.items():
        source = (tests / name).read_text(encoding="utf-8")
        if source.count(old) != 1:
            sys.exit(f"{name}: expected the text {old!r} once, found {source.count(old)}. Adapt SOURCE_EDITS.")
        (tests / name).write_text(source.replace(old, new), encoding="utf-8")


def run(sdist: Path, arguments: list[str]) -> int:
    """Run the suite in a temporary copy and return pytest's exit status."""
    sys.path.insert(0, str(TESTS_FOLDER))
    from peft_suite import hub_aliases

    search_path = [str(PACKAGE_ROOT), str(TESTS_FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **hub_aliases.offline_environment(hub_aliases.build_cache()),
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        # without it, test_torch_compile.py skips itself
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        copy_suite(sdist, Path(folder))
        named = {argument.split("::")[0] for argument in arguments} & set(os.listdir(sdist / "tests"))
        arguments = [f"tests/{arg}" if arg.split("::")[0] in named else arg for arg in arguments]
        files = [] if named else [f"tests/{name}" for name in TEST_FILES]
        # PEFT's addopts need pytest-cov; its filters turn deprecation warnings of transformers into errors, which
        # transformers releases newer than the tests trigger
        overrides = ["-o", "addopts=", "-o", "filterwarnings=", "--disable-warnings"]
        options = ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", *overrides]
        command = [sys.executable, "-m", "pytest", *options, *files, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> int:
    """Command line entry point."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests" / "testing_common.py").is_file():
        sys.exit(__doc__)
    return run(Path(sys.argv[1]).resolve(), sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
