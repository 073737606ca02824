"""Run a model for its activations or gradients and leave everything else as it was."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, *, gradients: bool = False, training: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, unless asked otherwise; all that changes is restored whatever happens.

    Restored: every module's training flag and buffers (running statistics), and the generators of Python, NumPy and
    torch (CPU and the model's accelerators), so that training that follows draws what it would have drawn. Autocast,
    where it is on, caches no narrow copies of weights within the block: they would live on behind it, and be out of
    date as soon as a weight changes.

    Args:
        model: to be run within the block.
        gradients: record operations for backward.
        training: training mode instead of evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    # evaluation mode writes to no buffer
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
    """Every buffer with the module and the name that hold it, and a copy."""
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
