"""Base models that were compiled, as a whole or in parts, before an adapter is attached.

`torch.compile(module)` wraps a module in another one, so that everything inside has `_orig_mod.` in its name. Names
are what an adapter is saved, found and configured by. So a wrapper gives way to its module, compiled in place as
`module.compile()` would do it, with the settings that the wrapper had: the names are those of the plain model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


WRAPPED = "_orig_mod"


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without what wrappers of `torch.compile` have added to it."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` has wrapped, or the module itself if it is not wrapped."""
    while WRAPPED in module._modules:
        module = module.get_submodule(WRAPPED)
    return module


@contextmanager
def compiled_in_place(root: nn.Module) -> Iterator[None]:
    """Replace all wrappers inside `root` by their modules, compiled in place, and undo it if the block raises."""
    places = [
        (parent, name, child)
        for parent in root.modules()
        if WRAPPED not in parent._modules
        for name, child in parent._modules.items()
        if child is not None and WRAPPED in child._modules
    ]
    found: Any = {id(wrapper): (wrapper, unwrapped(wrapper)) for _, _, wrapper in places}
    before = [(inner, inner._compiled_call_impl) for _, inner in found.values()]
    for wrapper, inner in found.values():
        if inner._compiled_call_impl is None:
            inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)
    for parent, name, wrapper in places:
        parent._modules[name] = found[id(wrapper)][1]
    try:
        yield
    except BaseException:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper
        for inner, call in before:
            inner._compiled_call_impl = call
        raise


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Let modules that are compiled in place run uncompiled within the context, so that hooks see every batch."""
    modules: list[Any] = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
