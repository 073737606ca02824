"""Buffers of the base model that training would change, although no adapter file holds them.

Running statistics of normalisations stay as they are while an adapter trains. What other buffers become is noticed
when the adapter is saved.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from peft_fps.base.sharded import is_sharded


LARGEST = 1 << 22
"""Elements up to which a buffer is looked at; larger ones are tables that no training changes."""


def freeze_statistics(model: nn.Module) -> None:
    """Freeze the running statistics of normalisations, and let these compute with them in training too.

    Normalisations that are trained whole (`modules_to_save`) go on tracking, since they are saved with their
    statistics.

    Args:
        model: with adapted layers.
    """
    whole = _trained_whole(model)
    for module in model.modules():
        if id(module) in whole:
            _thaw(module)
        elif _tracks(module) and _evaluate not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_evaluate)


def thaw_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`. The training flag of the normalisations is back with the next `model.train()`."""
    for module in model.modules():
        _thaw(module)


def evaluate_frozen(model: nn.Module) -> None:
    """Put frozen normalisations in evaluation mode at once, so that their first forward need not."""
    for module in model.modules():
        if _evaluate in module._forward_pre_hooks.values():
            module.training = False


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each persistent buffer of the base model, by its name there.

    Buffers of adapters, of adapted layers and of modules that are trained whole are left out.
    """
    found: dict[str, str] = {}
    left_out = _trained_whole(model)
    left_out |= {id(part) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for part in _parts(layer)}
    for path, module in model.named_modules():
        if id(module) in left_out:
            continue
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set and _is_at_hand(buffer):
                key = f"{path}.{name}".lstrip(".").replace("original_module.", "")
                found[key] = _digest(buffer)
    return found


def _trained_whole(model: nn.Module) -> set[int]:
    """Return the ids of all modules within the copies that adapters train whole."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {id(part) for wrapper in wrappers for part in wrapper.modules_to_save.modules()}


def _parts(module: Any) -> Iterator[nn.Module]:
    """Yield a module and all modules within it."""
    yield from module.modules()


def _tracks(module: nn.Module) -> bool:
    """Return whether a module is a normalisation with running statistics."""
    return isinstance(module, (_BatchNorm, _InstanceNorm)) and module.running_mean is not None


def _evaluate(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: put a normalisation in evaluation mode, which `model.train()` may have ended."""
    if module.training:
        module.training = False


def _thaw(module: nn.Module) -> None:
    """Remove the hook of `freeze_statistics` from a module."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _evaluate]:
        del module._forward_pre_hooks[key]


def _is_at_hand(buffer: Tensor | None) -> bool:
    """Return whether a buffer can be digested: dense, whole, not on meta, not empty, at most `LARGEST` elements."""
    if buffer is None or buffer.device.type == "meta" or is_sharded(buffer):
        return False
    return buffer.layout == torch.strided and 0 < buffer.numel() <= LARGEST


def _digest(buffer: Tensor) -> str:
    """Return the SHA-256 of a buffer's bytes in hexadecimal."""
    data = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()
