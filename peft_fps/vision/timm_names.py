"""timm's models by name on the command line, `timm:NAME` or `timm:NAME@FILE`, and whether timm is there."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any


PREFIX = "timm:"
INSTALL = 'pip install "peft-fps[reproduce]"'


@dataclass(frozen=True)
class TimmName:
    """What `timm:NAME@FILE` says.

    Attributes:
        model: name that timm knows the model by, with or without the tag of its weights.
        file: with the weights; None for those that timm publishes.
    """

    model: str
    file: Path | None

    @property
    def without_folder(self) -> str:
        """The value again, without the folder that the file lies in."""
        return PREFIX + self.model + (f"@{self.file.name}" if self.file is not None else "")


def timm_name(value: str) -> TimmName | None:
    """Return the parts of a value that starts with `timm:`, None for any other."""
    if not value.startswith(PREFIX):
        return None
    model, _, file = value.removeprefix(PREFIX).partition("@")
    return TimmName(model, Path(file).expanduser() if file else None)


def check_timm_name(option: str, value: str) -> None:
    """Look at a value that starts with `timm:` before anything is loaded.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: timm knows no such model or tag, or there is no such file.
    """
    name = timm_name(value)
    if name is None:
        return
    if not name.model:
        raise ValueError(f"{option} is {value!r}, expected timm:NAME or timm:NAME@FILE.")
    if name.file is not None and not name.file.is_file():
        raise ValueError(f"{option} is {value!r}: there is no file {name.file}.")
    check_timm(value)
    models: Any = import_module("timm.models")
    architecture, _, tag = name.model.partition(".")
    if not models.is_model(architecture):
        close = get_close_matches(architecture, models.list_models(), n=5)
        hint = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() lists them."
        raise ValueError(f"{option} is {value!r}, but timm has no model {architecture!r}. {hint}")
    tags = [known.partition(".")[2] for known in models.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f"{option} is {value!r}, but timm has no weights {tag!r} of {architecture}, expected one of "
            f"{', '.join(tags) or 'none: leave the tag out'}."
        )


def check_timm(name: str) -> None:
    """Refuse a timm model where timm cannot be imported.

    Raises:
        ImportError: says how to install it.
    """
    if not is_timm(name):
        return
    try:
        import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision made for another build of torch raises the latter
        raise ImportError(
            f"--model is {name!r}, a timm model, and timm cannot be imported ({error}). Install it with `{INSTALL}` "
            "and see that torchvision is of the same build as torch (both for the CPU or both for one CUDA version); "
            "or give a --model of transformers."
        ) from error


def is_timm(name: str) -> bool:
    """Return whether a model is timm's: by its prefix, by its name on the Hub, or by the config in its folder."""
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        return "pretrained_cfg" in config or config.get("model_type") == "timm_wrapper"
    return name.startswith(("timm/", PREFIX))
