"""Models and adapters on disk, and the command as a user runs it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from peft_fps.cli.app import app
from tests.support.helpers import adapted, with_fields


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(
        app, [command, *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


def check_user_error(result: Result, code: int = 1) -> str:
    """Assert that the command ended with a message and no traceback; returns what it wrote to stderr."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@dataclass(frozen=True)
class Finished:
    """A command that has succeeded: what it wrote to stdout, and the folder that it wrote."""

    printed: str
    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter" / CONFIG).read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "adapter" / WEIGHTS)


def finish(folder: Path, command: str, *arguments: object) -> Finished:
    """Run a command that writes to a folder; asserts that it succeeds."""
    result = run(command, *arguments, "--output", folder)
    assert result.exit_code == 0, result.output
    return Finished(result.stdout, folder)


def save_base(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_adapted(base: nn.Module, folder: Path, base_folder: Path | None = None, **options: Any) -> nn.Module:
    """Save an adapter with large changes; returns the adapted model."""
    model = adapted(base, **options)
    model.save_pretrained(folder)
    edit_config(folder, base_model_name_or_path=None if base_folder is None else str(base_folder))
    return model


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(with_fields(json.loads(path.read_text()), **changes)))


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add (or, with None, remove) tensors; the config's digest is taken away."""
    tensors = load_file(folder / WEIGHTS) | {PREFIX + key: tensor for key, tensor in changes.items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    edit_config(folder, tensors_sha256=None)
