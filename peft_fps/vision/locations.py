"""What the values of `--model`, `--data` and `--base` stand for: local paths, names on the Hub, or names of timm."""

from pathlib import Path

from peft_fps.vision.output_folders import check_free
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


def check_locations(model: str | None, data: str | None, output: Path, overwrite: bool) -> None:
    """Check what a fine-tuning reads and where it writes before anything is loaded, and make the output folder.

    Args:
        model: value of `--model`, None for the embedded model.
        data: value of `--data`, None for the embedded digits.
        output: where results go.
        overwrite: whether earlier results there are replaced.

    Raises:
        ValueError: the model or the data cannot be there, or would be overwritten, or the output folder is not free.
        ImportError: the model is timm's by name, and timm cannot be imported.
    """
    for option, value in (("--model", model), ("--data", data)):
        if value is not None:
            check_path(option, value)
            if overwrite and output.resolve() in local_path(value).resolve().parents:
                raise ValueError(f"{option} is {value!r}, which lies in the folder to be overwritten.")
    check_free(output, overwrite)
    output.mkdir(parents=True, exist_ok=True)
