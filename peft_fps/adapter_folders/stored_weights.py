"""The weights of a base model in its safetensors files, read one by one while the model is on the meta device."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from peft_fps.base.checkpoint_keys import checkpoint_keys
from peft_fps.checkpoint import open_safetensors


class WholeModelNeededError(Exception):
    """The base model is to be loaded whole, for the reason that the message gives."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        key: in the file.
        file: path of the file.
        dtype: that it gets when it is read.
    """

    key: str
    file: Path
    dtype: torch.dtype

    def read(self, *, mapped: bool = False) -> Tensor:
        """Return the tensor on the CPU.

        Args:
            mapped: read those pages of the file alone that are used; the tensor must not be written to.
        """
        with open_safetensors(self.file, mapped=mapped) as file:
            stored: Tensor = file.get_tensor(self.key)
        return stored.to(self.dtype)

    def blank(self) -> Tensor:
        """Return a tensor of its shape and dtype on the meta device."""
        with open_safetensors(self.file) as file:
            return torch.empty(file.get_slice(self.key).get_shape(), dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a model in its files.

    Attributes:
        plain: tensors that the model has as they are stored, by their names in its state dict. All names of a tied
            tensor have the same entry.
        converted: tensors from which transformers makes the model's, by key.
        made: by name in the state dict, the key of a tensor of `converted` from which transformers makes this one.
    """

    plain: Mapping[str, StoredTensor]
    converted: Mapping[str, StoredTensor]
    made: Mapping[str, str]


def stored_weights(model: PreTrainedModel, folder: Path) -> StoredWeights:
    """Find the tensors of a model in the folder from which it was loaded.

    Tensors that the files hold twice, and that transformers ties if they are equal, are compared and tied.

    Args:
        model: on the meta device, loaded by `from_pretrained`.
        folder: local.

    Raises:
        WholeModelNeededError: the folder holds them otherwise than in safetensors files.
    """
    config: Any = model.config
    if getattr(model, "_hf_peft_config_loaded", False):
        raise WholeModelNeededError("its folder holds an adapter besides")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        raise WholeModelNeededError("its config names the files of its weights")
    files = weight_files(folder)
    if not files:
        raise WholeModelNeededError(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} in {folder}")
    try:
        keys = checkpoint_keys(model, files)
    except ValueError as error:
        raise WholeModelNeededError(str(error)) from error
    state = model.state_dict()
    plain = {name: StoredTensor(key, files[key], state[name].dtype) for name, key in keys.plain.items()}
    made = {name: key for key, names in keys.converted.items() for name in names if name in state}
    if twice := next((name for name in made if name in plain), None):
        raise WholeModelNeededError(f"{plain[twice].key} is {twice}, which {made[twice]} gives too")
    dtypes = {key: {state[name].dtype for name in names if name in state} for key, names in keys.converted.items()}
    if mixed := next((key for key, found in dtypes.items() if len(found) > 1), None):
        raise WholeModelNeededError(f"{mixed} becomes tensors of several dtypes")
    converted = {key: StoredTensor(key, files[key], found.pop()) for key, found in dtypes.items()}
    _tie_equal(model, plain)
    tensors = model.state_dict(keep_vars=True)
    known = {id(tensors[name]): stored for name, stored in plain.items()}
    aliases = {name: known[id(tensor)] for name, tensor in tensors.items() if id(tensor) in known}
    return StoredWeights(aliases | plain, converted, made)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each key of a checkpoint, in the order of files and keys; nothing without safetensors files.

    One file goes before an index of several, as in transformers.

    Raises:
        ValueError, OSError: a file is damaged or missing.
    """
    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            return {}
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files: dict[str, Path] = {}
    for name in names:
        with open_safetensors(folder / name) as file:
            files |= dict.fromkeys(file.keys(), folder / name)
    return files


def _tie_equal(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Tie the tensors that the config ties if the files hold both; on the meta device transformers does not."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    twice = [pair for pair in pairs.items() if all(name in stored for name in pair)]
    for first, second in twice:
        if not torch.equal(stored[first].read(mapped=True), stored[second].read(mapped=True)):
            raise WholeModelNeededError(f"{first} and {second} differ, although its config ties them")
    if twice:
        model.tie_weights()
