"""Base models that were compiled, as a whole or in parts, before an adapter is attached.

`torch.compile(module)` wraps a module in another one, so that everything inside has `_orig_mod.` in its name. Names
are what an adapter is saved, found and configured by. So a wrapper gives way to its module, compiled in place as
`module.compile()` would do it, with the settings that the wrapper had: the names are those of the plain model.
"""

from typing import Any

from torch import nn


WRAPPED = "_orig_mod"


def plain_name(name: str) -> str:
    """Return a module's name, or a key, without what wrappers of `torch.compile` have added to it."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a compiled wrapper's module, which is compiled in place from now on; another module itself."""
    inner: Any = module
    while WRAPPED in inner._modules:
        wrapper, inner = inner, inner._modules[WRAPPED]
        if inner._compiled_call_impl is None:
            inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)
    return inner


class Unwrapping:
    """Puts the modules of compiled wrappers inside a model in the wrappers' places.

    Attributes:
        replaced: for each wrapper its parent, its name there, and itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for parent in list(model.modules()):
            for name, child in parent._modules.items() if WRAPPED not in parent._modules else ():
                if child is not None and WRAPPED in child._modules:
                    self.replaced.append((parent, name, child))
        for parent, name, wrapper in self.replaced:
            parent._modules[name] = unwrapped(wrapper)

    def undo(self) -> None:
        """Put the wrappers back."""
        for parent, name, wrapper in self.replaced:
            parent._modules[name] = wrapper
