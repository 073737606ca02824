"""All of a model that a calibration could leave changed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.helpers import bits, layers_of, snapshot


def held(tensor: Tensor | None) -> Any:
    """Which tensor it is, where it lies, and its bytes."""
    return None if tensor is None else (id(tensor), tensor.data_ptr(), bits(tensor))


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model, and of the random states and modes, that calibration could leave changed."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    layers = layers_of(model)
    return snapshot(model) | {
        "parameters": {name: held(parameter) for name, parameter in parameters.items()},
        "versions": {name: parameter._version for name, parameter in parameters.items()},  # in-place writes count up
        "gradients": {name: held(parameter.grad) for name, parameter in parameters.items()},
        "hooks on parameters": {n: list(p._post_accumulate_grad_hooks or ()) for n, p in parameters.items()},
        "buffers": {name: held(buffer) for name, buffer in model.named_buffers()},
        "forward": [name for name, module in modules.items() if "forward" in vars(module)],
        "checkpointing": {name: getattr(module, "gradient_checkpointing", None) for name, module in modules.items()},
        "active adapters": {name: layer.active_adapters for name, layer in layers.items()},
        "selected": {name: [state.selected for state in layer.fps_state.values()] for name, layer in layers.items()},
        "generators": (random.getstate(), str(np.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()),
    }


OF_TENSORS = ("tensors", "parameters", "versions", "gradients", "buffers")


@contextmanager
def left_as_it_was(model: nn.Module, but_for_selection: bool = False) -> Iterator[None]:
    """Nothing has changed after the block, the selection of adapter 'default' and its values aside if so wished."""
    before = everything(model)
    yield
    after = everything(model)
    if but_for_selection:
        for found in (before, after):
            del found["selected"]
            for part in OF_TENSORS:
                found[part] = {n: v for n, v in found[part].items() if not ("fps_" in n and n.endswith(".default"))}
    for part, expected in before.items():
        assert after[part] == expected, part
