"""Parameters that stack the weights of several layers, such as all experts, each seen as a layer of its own.

A module owns such parameters and multiplies with parts of them. `OpenedModule` takes the module's place. It has the
module inside, and a child for each adapted parameter, so that a path such as `experts.gate_up_proj` names a module.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.substitution import call_with, twin_with
from peft_fps.sparse.stand_ins import StandIn, formed_again


READ_BY_TORCH = ("_qkv_same_embed_dim",)
"""Private names that torch's own modules read off a child."""


class PackedWeight(nn.Module):
    """A parameter of a module, seen as a layer; it registers nothing itself.

    The parameter is `(matrices, out, in)`, or `(matrices, in, out)` if `transposed`.

    Attributes:
        owner: the module that has the parameter.
        name: name of the parameter in it.
        transposed: whether each matrix is stored as `(in, out)`.
        gated: whether a matrix may get inputs that are zero for positions that are not meant for it.
    """

    owner: Any
    name: str
    gated = True

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
    def stand_in_names(self) -> tuple[str, str]:
        """Names of weight and bias in the module of which calls are given stand-ins."""
        return self.name, self.bias_name

    @property
    def stacked(self) -> Any:
        """The weight with a first dimension that counts matrices."""
        return self.weight

    @property
    def matrices(self) -> int:
        """Number of matrices."""
        return int(self.stacked.shape[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of neurons of one matrix, and their fan-in."""
        _, out, inputs = self.stacked.shape
        return (inputs, out) if self.transposed else (out, inputs)

    def copied(self) -> Any:
        """Return a packed weight that holds copies of weight and biases."""
        names = [name for name in (self.name, self.bias_name) if self.owner._parameters.get(name) is not None]
        own = {name: self.owner._parameters[name].detach().clone() for name in names}
        twin = copy.copy(self)
        twin.__dict__["owner"] = twin_with(self.owner, own)
        return twin

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


def _twin(base: nn.Module, stand_ins: dict[str, StandIn]) -> Any:
    """Return a module that shares everything with `base` except for parameters of its own or of its children."""
    twin = twin_with(base, {})
    own = {name: each for name, each in stand_ins.items() if "." not in name}
    twin.__dict__["_parameters"] = _Parameters(twin._parameters | own)
    inner: dict[str, dict[str, StandIn]] = {}
    for name in stand_ins.keys() - own.keys():
        child, _, rest = name.partition(".")
        inner.setdefault(child, {})[rest] = stand_ins[name]
    twins = {child: _twin(base.get_submodule(child), found) for child, found in inner.items()}
    twin.__dict__["_modules"] = twin._modules | twins
    return twin


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
            hidden = name.startswith("_") and name not in READ_BY_TORCH
            if base is None or hidden or not hasattr(base, name):
                raise
        return getattr(base, name)

    @property
    def weights(self) -> dict[str, nn.Module]:
        """The layers that stand for parameters, by the names of these."""
        return {name: layer for name, layer in self._modules.items() if layer is not None and name != "base_layer"}

    def get_base_layer(self) -> nn.Module:
        """Return the module inside."""
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
        with formed_again(found.values()):
            return _twin(self.base_layer, found)(*args, **kwargs)

    def unload_and_optionally_merge_module(self, **_: Any) -> nn.Module:
        """Return the module, for PEFT, which takes adapters out of a model so; all layers are merged before."""
        return self.base_layer


def close_modules(model: nn.Module) -> None:
    """Take packed weights without an adapter out of opened modules. Put a module back that has no other layer."""
    for path, module in list(opened_modules(model)):
        for name, layer in module.weights.items():
            if isinstance(layer, PackedWeight):
                del module._modules[name]
        if not module.weights:
            put_module(model, path, module.base_layer)


def opened_modules(model: nn.Module) -> Iterator[tuple[str, OpenedModule]]:
    """Yield path and module of all opened modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, OpenedModule))


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path.

    Args:
        model: changed in place.
        path: full name of the module that is replaced.
        module: takes its place.
    """
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
