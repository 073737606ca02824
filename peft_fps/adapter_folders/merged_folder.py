"""An adapter and its base model as one plain model folder."""

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel

from peft_fps.adapter_folders.adapter_contents import Inspection
from peft_fps.adapter_folders.recorded_base import load_base
from peft_fps.adapter_folders.shard_writing import write_shards
from peft_fps.adapter_folders.shardwise_merge import prepare_shardwise
from peft_fps.adapter_folders.soundness import inspect_adapter
from peft_fps.adapter_folders.stored_weights import WholeModelNeededError
from peft_fps.vision.locations import check_path
from peft_fps.vision.output_folders import check_output, folder_bytes, written_whole
from peft_fps.vision.upstream_noise import upstream_deprecations


logger = logging.getLogger(__name__)

WHOLE_SHARD_SIZE = "5GB"
"""Largest file of weights of a model that was loaded whole, and has no division into files any more."""

BESIDE_WEIGHTS = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja"),
)
"""Files of processors and tokenizers, which are copied."""


@dataclass(frozen=True)
class MergeOptions:
    """The local folder of an adapter, and the options of `peft-fps merge`."""

    adapter: Path
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Gets the model: config, weights, and processor and tokenizer files, the adapter's before the base "
            "model's. Written whole or not at all.",
        ),
    ]
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="The base model. Default: the one that the adapter records."),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Number format to load, merge and save in. Default: the base model's own. In half precision "
            "changes that are too small for it vanish, with a warning."
        ),
    ] = None
    device: Annotated[str, typer.Option(metavar="NAME", help="Where weights are merged: cpu, cuda, cuda:1.")] = "cpu"
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest file of weights (5GB); a larger model is split into several. Default: files as the base "
            "model has them, and 5GB for a model that is loaded whole.",
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False


def merge(options: MergeOptions) -> dict[str, Any]:
    """Merge an adapter into its base model and save a plain model; returns what was written, as plain data.

    Everything that loading checks is checked; the output folder is written whole or not at all.

    Raises:
        ValueError, OSError: the adapter, the base model or the output folder cannot be used.
    """
    found = inspect_adapter(options.adapter)
    if found.problem is not None or found.config is None:
        raise ValueError(f"{options.adapter} is damaged: {found.problem}")
    name = options.base or found.config.base_model_name_or_path
    if not name or not isinstance(name, str):
        raise ValueError(f"{options.adapter} does not record its base model. Give it with --base.")
    revision = None if options.base else found.config.revision
    check_path("--base" if options.base else "the base model that the adapter records, which --base replaces,", name)
    check_output(options.output, options.overwrite, (options.adapter, Path(name).expanduser()))
    reason = None
    try:
        merged, write = _merge_shardwise(options, found, name, revision)
    except WholeModelNeededError as error:
        reason = str(error)
        logger.warning("%s is loaded whole, which takes the memory of one copy of it: %s.", name, reason)
        merged, write = _merge_whole(options, found, name, revision)
    with written_whole(options.output) as folder:
        write(folder)
        copied = copy_beside(folder, [options.adapter, base_folder(name, revision)])
    return {
        "output": str(options.output),
        "adapter": str(options.adapter),
        "base_model": name,
        "class": type(merged).__name__,
        "dtype": str(merged.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in merged.parameters()),
        "merged_entries": sum(layer.entries for layer in found.layers),
        "merged_biases": sum(layer.biases for layer in found.layers),
        "replaced_whole": sorted(found.heads),
        "copied": copied,
        "loaded_whole": reason,
        "bytes": folder_bytes(options.output),
    }


def _merge_shardwise(
    options: MergeOptions, adapter: Inspection, name: str, revision: str | None
) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    """Prepare a merge that reads the base model file by file; returns the model, without weights, and how to write it.

    Raises:
        WholeModelNeededError: the model is to be loaded whole.
        ValueError: adapter or base model cannot be used.
    """
    try:
        model = load_base(name, revision, adapter, options.dtype, weights=False)
        merging = prepare_shardwise(model, adapter, base_folder(name, revision), options.device)
    except RuntimeError as error:  # a class that computes with its weights while it is loaded
        raise WholeModelNeededError(f"it does not load without weights: {error}") from error

    def write(folder: Path) -> None:
        write_shards(folder, merging.model, merging.weights, merging.tensor, options.shard_size)
        merging.finish()

    return merging.model, write


def _merge_whole(
    options: MergeOptions, adapter: Inspection, name: str, revision: str | None
) -> tuple[PreTrainedModel, Callable[[Path], None]]:
    """Load the base model whole and merge the adapter; returns the model, and how to write it.

    Raises:
        ValueError: adapter or base model cannot be used.
    """
    model: Any = load_base(name, revision, adapter, options.dtype)
    with upstream_deprecations():
        adapted: Any = PeftModel.from_pretrained(model.to(options.device), str(options.adapter))
    merged = adapted.merge_and_unload(safe_merge=True)
    return merged, partial(merged.save_pretrained, max_shard_size=options.shard_size or WHOLE_SHARD_SIZE)


def copy_beside(folder: Path, sources: Iterable[Path]) -> list[str]:
    """Copy the files of processor and tokenizer; of several with one name the first, none that is there already.

    Args:
        folder: where to.
        sources: folders to look in.

    Returns:
        Names of the copied files.
    """
    copied = []
    for source in sources:
        for file in sorted({file for pattern in BESIDE_WEIGHTS for file in source.glob(pattern) if file.is_file()}):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return copied


def base_folder(name: str, revision: str | None) -> Path:
    """Return the local folder of a base model, with processor and tokenizer, and with weights that were loaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(BESIDE_WEIGHTS)))
