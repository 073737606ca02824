"""Writing a model's weights file by file, as `save_pretrained` would write them."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from peft_fps.adapter_folders.stored_weights import StoredWeights
from peft_fps.checkpoint import open_safetensors


PATTERN = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
"""Names of files of weights."""


@dataclass(frozen=True)
class Part:
    """A tensor to be written: its shape and dtype on the meta device, the file it was in, and how to get it."""

    blank: Tensor
    file: Path | None
    get: Callable[[], Tensor]


def write_shards(
    folder: Path,
    model: PreTrainedModel,
    stored: StoredWeights,
    tensor: Callable[[str], Tensor],
    shard_size: str | None = None,
) -> None:
    """Write a model to an empty folder, with the tensors of one file in memory at a time.

    Names, config and generation config are those that `save_pretrained` writes. The config comes last, so that a
    folder that is not complete does not load. Tensors from which transformers makes the model's are copied.

    Args:
        folder: where to.
        model: its tensors may be on the meta device.
        stored: how the base model is stored. Tensors that were in one file stay together, and new ones get a file of
            their own.
        tensor: gives a tensor by its name in the model's state dict; asked once for each that is not made of others.
        shard_size: the largest file (`"5GB"`), in place of this division.
    """
    with TemporaryDirectory(dir=folder) as skeleton:
        state = model.state_dict()
        parts = {key: Part(held.blank(), held.file, held.read) for key, held in stored.converted.items()}
        for saved, name in saved_names(model, Path(skeleton), stored.made).items():
            file = stored.plain[name].file if name in stored.plain else None
            parts[saved] = Part(torch.empty_like(state[name], device="meta"), file, partial(tensor, name))
        if shard_size is None:
            shards = division({name: part.file for name, part in parts.items()})
        else:
            blanks = {name: part.blank for name, part in parts.items()}
            split = split_torch_state_dict_into_shards(blanks, filename_pattern=PATTERN, max_shard_size=shard_size)
            shards = split.filename_to_tensors
        for shard, names in tqdm(shards.items(), desc="Writing model shards"):
            held = {name: parts[name].get().contiguous() for name in names}
            save_file(held, folder / shard, metadata={"format": "pt"})
            del held  # before the next is read
        if len(shards) > 1:
            size = sum(part.blank.nbytes for part in parts.values())
            index = {
                "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
                "weight_map": {name: shard for shard, names in shards.items() for name in names},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        for written in Path(skeleton).iterdir():
            written.rename(folder / written.name)


def saved_names(model: PreTrainedModel, folder: Path, left_out: Collection[str] = ()) -> dict[str, str]:
    """Write what `save_pretrained` writes beside the weights, and return the names under which it saves these.

    It saves numbers in place of the tensors. It leaves out what is tied, and gives old names back to weights that had
    them in the checkpoint from which the model was loaded.

    Args:
        model: its tensors may be on the meta device.
        folder: gets config and generation config.
        left_out: names of tensors that are not to be saved.

    Returns:
        Name in the model's state dict, by name in the file, in the order of the state dict.
    """
    state = {name: held for name, held in model.state_dict(keep_vars=True).items() if name not in left_out}
    numbers: dict[int, Tensor] = {}  # one for all names of a tensor, by which it is known to be tied
    for number, held in enumerate(state.values()):
        numbers.setdefault(id(held), torch.tensor([number]))
    model.save_pretrained(folder, state_dict={name: numbers[id(held)] for name, held in state.items()})
    with open_safetensors(folder / SAFE_WEIGHTS_NAME, mapped=False) as file:
        found = {saved: file.get_tensor(saved) for saved in file.keys()}  # noqa: SIM118 - not a mapping
    (folder / SAFE_WEIGHTS_NAME).unlink()
    names = list(state)
    if any(number.shape != (1,) for number in found.values()):
        raise ValueError(
            f"transformers computes weights of a {type(model).__name__} anew on saving, expected plain names. Merge "
            "in a program: PeftModel.from_pretrained(model, adapter).merge_and_unload()."
        )
    by_number = sorted((int(number), saved) for saved, number in found.items())
    return {saved: names[number] for number, saved in by_number}


def division(files: Mapping[str, Path | None]) -> dict[str, list[str]]:
    """Return the names of the tensors in each new file: those of one old file together, and new ones together.

    Args:
        files: old file of each tensor, None of a new one.
    """
    old = sorted({file for file in files.values() if file is not None})
    groups = [[name for name, file in files.items() if file == wanted] for wanted in (*old, None)]
    groups = [group for group in groups if group]
    if len(groups) == 1:
        return {SAFE_WEIGHTS_NAME: groups[0]}
    suffixes = [f"-{number:05d}-of-{len(groups):05d}" for number in range(1, len(groups) + 1)]
    return {PATTERN.format(suffix=suffix): group for suffix, group in zip(suffixes, groups, strict=True)}
