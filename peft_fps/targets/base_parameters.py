"""The parameters and modules of the base model, adapters left out, and how many parameters a budget is a share of."""

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.head import Head, find_head
from peft_fps.base.packed_weight import OpenedModule
from peft_fps.base.quantisation import quantisation, quantised_elements, stored_weight


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of the base model. Adapters are left out; a shared parameter comes once."""
    seen: set[int] = set()
    for name, parameter in _all_names_of_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _all_names_of_parameters(module: Any, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of the base model. A shared parameter comes once under each of its names."""
    if isinstance(module, (BaseTunerLayer, OpenedModule)):
        yield from _all_names_of_parameters(module.get_base_layer(), path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _all_names_of_parameters(module.original_module, path)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}{name}", parameter
        for name, child in module.named_children():
            yield from _all_names_of_parameters(child, f"{path}{name}.")


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module as in the model before any adapter. A tuner layer is replaced by its base layer."""
    within: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in within):
            continue
        if isinstance(module, BaseTunerLayer):
            within.append(f"{name}.")
            yield name, module.get_base_layer()
        elif isinstance(module, OpenedModule):
            within.append(f"{name}.")
            inner = module.base_layer.named_modules()
            yield from ((f"{name}.{own}" if own else name, part) for own, part in inner)
        else:
            yield name, module


def count_base_parameters(model: nn.Module, head: Head | None = None) -> int:
    """Return the number of parameters of which a budget is a share: those of the base model without its output head.

    What the head shares with the rest of the model counts, such as output embeddings that are tied to the input
    embeddings. A packed weight counts as many parameters as it stands for, so that a quantised model has as many as
    before.

    Args:
        model: base model, with or without adapters.
        head: of the model. Default: it is looked for.
    """
    head = head or find_head(model)
    left_out = tuple(f"{name}." for name in head.left_out)
    counted = {
        id(parameter): parameter
        for name, parameter in _all_names_of_parameters(model)
        if not name.startswith(left_out) and name not in head.parameters
    }
    packed = {id(stored_weight(m)): quantised_elements(m) for m in model.modules() if quantisation(m) is not None}
    return sum(packed.get(key) or _elements(parameter) for key, parameter in counted.items())


def _elements(parameter: nn.Parameter) -> int:
    """Return the number of elements that a parameter stands for. A 4-bit parameter packs several into one number."""
    state = getattr(parameter, "quant_state", None)  # 4-bit embeddings and experts
    return parameter.numel() if state is None else int(state.shape.numel())
