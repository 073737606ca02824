"""Parameters that stack the weights of several layers, such as all experts, each seen as a layer of its own.

A module owns such parameters and multiplies with parts of them. `OpenedModule` takes the module's place. It has the
module inside, and a child for each adapted parameter, so that a path such as `experts.gate_up_proj` names a module.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.substitution import call_with, twin_with
from peft_fps.sparse.stand_ins import StandIn, formed_again


class PackedWeight(nn.Module):
    """A parameter of a module, seen as a layer; it registers nothing itself.

    The parameter is `(matrices, out, in)`, or `(matrices, in, out)` if `transposed`.

    Attributes:
        owner: the module that has the parameter.
        name: name of the parameter in it.
        transposed: whether each matrix is stored as `(in, out)`.
    """

    owner: Any
    name: str

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # registered, its parameters would have two names each
        self.name = name
        self.transposed = _is_transposed(owner, name)

    @property
    def weight(self) -> Any:
        """The parameter."""
        return self.owner._parameters[self.name]

    @property
    def bias(self) -> Any:
        """The biases of the matrices `(matrices, out)`, None if the module has none."""
        return self.owner._parameters.get(self.bias_name)

    @property
    def bias_name(self) -> str:
        """Name of the biases in the module, as gpt-oss has it."""
        return f"{self.name}_bias"

    @property
    def matrices(self) -> int:
        """Number of matrices."""
        return int(self.weight.shape[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of neurons of one matrix, and their fan-in."""
        _, out, inputs = self.weight.shape
        return (inputs, out) if self.transposed else (out, inputs)

    def copied(self) -> "PackedWeight":
        """Return one with copies of its tensors, of a module that shares everything else."""
        names = [name for name in (self.name, self.bias_name) if self.owner._parameters.get(name) is not None]
        own = {name: self.owner._parameters[name].detach().clone() for name in names}
        return PackedWeight(twin_with(self.owner, own), self.name)

    def forward(self, x: Tensor) -> dict[str, StandIn]:
        """Return what stands in for parameters of the module in a call with input `x`, by their names: nothing."""
        return {}


class _Parameters(dict[str, Any]):
    """Parameters of a module, of which some have stand-ins. These are made where the module reads them.

    So backward is done with one of them before it comes to those that were read before it.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.tensor() if isinstance(value, StandIn) else value


class OpenedModule(nn.Module):
    """A module in whose calls other tensors may stand in for parameters.

    Args:
        base_layer: the module.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        """Return a child, or what the module has under a public name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
        return getattr(base, name)

    @property
    def weights(self) -> dict[str, nn.Module]:
        """The layers that stand for parameters, by the names of these."""
        return {name: layer for name, layer in self._modules.items() if layer is not None and name != "base_layer"}

    def get_base_layer(self) -> nn.Module:
        """Return the module."""
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the tensors that the layers give for its parameters."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        found: dict[str, StandIn] = {}
        for layer in self.weights.values():
            found |= layer(x)
        if not found:
            return self.base_layer(*args, **kwargs)
        if torch.compiler.is_compiling():
            return call_with(self.base_layer, {name: each.tensor() for name, each in found.items()}, *args, **kwargs)
        twin = twin_with(self.base_layer, {})
        twin.__dict__["_parameters"] = _Parameters(twin._parameters | found)
        with formed_again(found.values()):
            return twin(*args, **kwargs)

    def unload_and_optionally_merge_module(self, **_: Any) -> nn.Module:
        """Return the module, for PEFT, which takes adapters out of a model so; all layers are merged before."""
        return self.base_layer


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """Return the parameter of the base model at a path, None if there is no such parameter."""
    owner, _, name = path.rpartition(".")
    module = _module_at(model, owner)
    return None if module is None else module._parameters.get(name)


def module_at(model: nn.Module, path: str) -> Any:
    """Return the module at a path, or the `PackedWeight` of the parameter there.

    Args:
        model: with or without adapters.
        path: as in the base model. That of a parameter which has a layer already means the layer.
    """
    owner, _, name = path.rpartition(".")
    module = _module_at(model, owner)
    if module is not None and name in module._parameters and name not in model.get_submodule(owner)._modules:
        return PackedWeight(module, name)
    return model.get_submodule(path)


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module.base_layer if isinstance(module, OpenedModule) else module


def open_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Put a `PackedWeight` at the paths of parameters, unless there is a layer already."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, OpenedModule):
            module = OpenedModule(module)
            _put(model, owner, module)
        if name not in module._modules:
            module._modules[name] = PackedWeight(module.base_layer, name)


def close_modules(model: nn.Module) -> None:
    """Put modules back of which no parameter has more than a `PackedWeight`, and take these out of others."""
    for path, module in list(opened_modules(model)):
        for name, layer in module.weights.items():
            if isinstance(layer, PackedWeight):
                del module._modules[name]
        if not module.weights:
            _put(model, path, module.base_layer)


def opened_modules(model: nn.Module) -> Iterator[tuple[str, OpenedModule]]:
    """Yield path and module of all opened modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, OpenedModule))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _is_transposed(owner: Any, name: str) -> bool:
    """Whether the matrices of a parameter are stored as `(in, out)`.

    transformers marks its modules of experts. Of others the parameters tell, if what one puts out goes into the other.
    """
    marked = getattr(owner, "is_transposed", None)
    if marked is not None:
        return bool(marked)
    first, last = (owner._parameters.get(pair) for pair in ("gate_up_proj", "down_proj"))
    if first is None or last is None or not first.dim() == last.dim() == 3:
        return False
    return first.shape[1] == last.shape[2] and first.shape[2] == 2 * last.shape[1]
