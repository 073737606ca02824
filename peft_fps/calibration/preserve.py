"""Runs of a model for its activations or gradients that change nothing."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, *, gradients: bool = False, training: bool = False) -> Iterator[None]:
    """Put a model into evaluation mode without gradients for the block, and restore all state afterwards.

    The function restores the training flag and the buffers (running statistics) of every module. It restores the
    generators of Python, NumPy and torch (CPU and the model's accelerators), so that later training draws the same
    numbers as without the block. It does so after an error too. Autocast caches no narrow copies of weights within the
    block, because they would stay in memory behind it and be out of date once a weight changes.

    Args:
        model: model to run within the block.
        gradients: record operations for backward. Default: False.
        training: training mode instead of evaluation mode. Default: False.
    """
    modes = [(module, module.training) for module in model.modules()]
    # only training mode writes to buffers
    buffers = _buffers(model) if training else []
    caching = torch.is_autocast_cache_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        try:
            torch.set_autocast_cache_enabled(False)
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer.copy_(before)
            torch.set_autocast_cache_enabled(caching)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Return every buffer that is not on meta: its module, its name, the buffer, and a copy of it."""
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
