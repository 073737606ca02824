"""One batch, several adapters: every sample is computed under the adapter that its name says.

Samples of one adapter go through a layer together, so a layer computes as many products as there are adapters in the
batch, each on its part, and every one as it would without the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.sample_names import BASE, Names, begin, check_unmerged, eager, end, names_for
from peft_fps.layers.tied_uses import is_tied_use


WHOLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules trained whole (`modules_to_save`) that PEFT runs sample by sample."""


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Let all layers of a model compute each sample under the adapter of its name, within the context.

    The names belong to the call: they hold in this thread (or task) alone, and nothing is written to the model.

    Args:
        model: with FPS adapters.
        adapter_names: one name per sample; `"__base__"` means the base model.
        options: of the forward or generate call. Generation repeats every sample `num_beams` times, or
            `num_return_sequences` times.

    Raises:
        TypeError, ValueError: the names are no list of known adapters, or the model is training or merged.
    """
    token = _begin(model, adapter_names, options)
    try:
        yield
    finally:
        end(token)


def pass_names(model: nn.Module) -> None:
    """Let PEFT's wrappers of modules that are trained whole get the names that a call comes with."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and _hand_over not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)


@eager
def _begin(model: nn.Module, adapter_names: Any, options: Mapping[str, Any]) -> Names:
    """Check a call, and set the names of its samples for every module that needs them. Return what `end` needs."""
    _check(model, adapter_names)
    pass_names(model)
    copies = _copies(options)
    repeated = [name for name in adapter_names for _ in range(copies)]
    unrepeated = _encoder_modules(model) if copies > 1 else set()
    names = {
        id(module): list(adapter_names) if id(module) in unrepeated else repeated
        for module in model.modules()
        if isinstance(module, (FPSLayer, AuxiliaryTrainingWrapper)) or is_tied_use(module)
    }
    return begin(names)


def _hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of PEFT's wrappers: add the samples' names to the call. None where there is nothing to add."""
    names = names_for(module)
    if names is None or "adapter_names" in kwargs:
        return None
    if isinstance(module, ModulesToSaveWrapper):  # fails on adapters that do not train this module
        names = [name if name in module.modules_to_save else BASE for name in names]
    return args, kwargs | {"adapter_names": names}


def _check(model: nn.Module, adapter_names: Any) -> None:
    """Check that a model can compute each sample under the adapter of its name.

    Raises:
        TypeError: the names are no list of strings, or there are none.
        ValueError: a name is unknown; the model is in training mode or merged; or a module is trained whole that PEFT
            does not run sample by sample.
    """
    strings = isinstance(adapter_names, (list, tuple)) and all(isinstance(name, str) for name in adapter_names)
    if not strings or not adapter_names:
        raise TypeError(f"adapter_names is {_short(adapter_names)}, expected a list with one name per sample.")
    if model.training:
        raise ValueError(
            f"adapter_names={_short(adapter_names)} was passed to a model in training mode, expected inference. Call "
            "model.eval(), or choose one adapter for the whole batch with model.set_adapter(name)."
        )
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    known = {name for layer in layers for name in layer.fps_state}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(
            f"adapter_names holds {_short(unknown)}, expected names among {sorted(known)} and {BASE!r} for the base "
            "model. Load the adapter first."
        )
    for layer in layers:
        check_unmerged(layer)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, WHOLE):
            raise ValueError(
                f"{name.removeprefix('model.')} is trained whole (modules_to_save) and a "
                f"{type(module.original_module).__name__}, expected one of "
                f"{', '.join(kind.__name__ for kind in WHOLE)}, which PEFT runs sample by sample. Run the "
                "samples of each adapter as a batch of their own."
            )


def _copies(options: Mapping[str, Any]) -> int:
    """Return how often generation repeats every sample: the larger of `num_beams` and `num_return_sequences`."""
    found = [1]
    for name in ("num_beams", "num_return_sequences"):
        value = options.get(name)
        value = getattr(options.get("generation_config"), name, None) if value is None else value
        found.append(value if isinstance(value, int) else 1)
    return max(found)


def _encoder_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules of an encoder, which runs before generation repeats the samples."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    found: Any = model
    return {id(module) for module in found.get_encoder().modules()}


def _short(names: Any) -> str:
    """Return a value as text for an error, of 80 characters at most."""
    text = repr(names)
    return text if len(text) < 80 else f"{text[:77]}..."
