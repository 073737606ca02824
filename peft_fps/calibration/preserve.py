"""Run a model for its activations and leave everything else as it was."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training modes and random states are restored whatever happens.

    Restored: every module's training flag, and the generators of Python, NumPy and torch (CPU and the model's
    accelerators), so that training that follows draws what it would have drawn.
    """
    training = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        try:
            model.eval()
            yield
        finally:
            for module, mode in training:
                module.training = mode
            random.setstate(python_state)
            np.random.set_state(numpy_state)
