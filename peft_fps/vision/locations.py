"""What the values of `--model`, `--data` and `--base` stand for: local paths, names on the Hub, or names of timm."""

from pathlib import Path

from peft_fps.vision.timm_names import PREFIX, check_timm_name, timm_name


def local_path(value: str) -> Path:
    """Return the path that a value stands for: the file of `timm:NAME@FILE`, or else the value itself."""
    name = timm_name(value)
    return name.file if name is not None and name.file is not None else Path(value).expanduser()


def check_path(option: str, value: str) -> None:
    """Check a value that can only be meant as a local path, or as the name of one of timm's models.

    Anything else that does not exist may be the name of something on the Hub, `name` or `owner/name`.

    Args:
        option: that has the value, for messages; `timm:NAME` is allowed for `--model` alone.
        value: as the user gave it.

    Raises:
        ValueError: there is no such file or folder, or timm knows no such model.
        ImportError: the model is timm's by name, and timm cannot be imported.
    """
    if value.startswith(PREFIX):
        if option != "--model":
            raise ValueError(
                f"{option} is {value!r}, a timm model by its name, which does not tell its weights and the size of "
                "its images. Give a folder: `peft-fps finetune` writes one to OUTPUT/base."
            )
        check_timm_name(option, value)
        return
    written_as_path = value.startswith(("/", ".", "~", "\\")) or value.count("/") > 1
    if written_as_path and not Path(value).expanduser().exists():
        raise ValueError(f"{option} is {value!r}: there is no such file or folder.")
