"""Other uses of an adapted embedding's weight, such as a language model's output embeddings.

They are modules of their own that have the very parameter which the embedding has. The adapter lies in the embedding
alone: its tensors are trained, saved and merged once. A merge changes all uses, since they share the parameter. Until
then a hook on each of the other modules adds the embedding's changes to what the module computes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.substitution import overrides_forward, twin_with
from peft_fps.layers.embedding import Embedding, with_changed_lookups
from peft_fps.layers.merge_record import unmerged_copy
from peft_fps.layers.sample_names import BASE, by_adapter, check_samples, named_calls, names_for
from peft_fps.sparse import add_token_products, changed_lookup, changed_weight


class TiedUse:
    """Forward hook on a linear layer or an embedding that shares the weight of an adapted embedding.

    Args:
        owner: the adapted embedding.
        module: the module that gets the hook.
    """

    def __init__(self, owner: Embedding, module: nn.Module) -> None:
        self.owner = owner
        self._overridden = overrides_forward(module)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return what the module gives with the changes that are active in the embedding."""
        owner = self.owner
        names = names_for(module) if named_calls.running else None
        if names is not None:
            return self._mixed(module, output, names, *args, **kwargs)
        if not owner.disable_adapters and not owner.merged:
            active = [name for name in owner.active_adapters if owner.carries(name)]
            return self._changed(active, module, output, *args, **kwargs)
        if owner.disable_adapters and owner.merged:
            records = [owner.merge_records[name] for name in reversed(owner.merged_adapters)]
            result: Tensor = unmerged_copy(module, records).forward(*args, **kwargs)  # without hooks, this one too
            return result
        return output

    def _mixed(self, module: Any, output: Tensor, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        owner = self.owner
        check_samples(owner, x, names)
        carried = set() if owner.disable_adapters else {name for name in names if owner.carries(name)}

        def changed(name: str, places: Tensor) -> Tensor:
            active = [name] if name in carried else []
            return self._changed(active, module, output[places], x[places], *args, **kwargs)

        names = [name if name in carried else BASE for name in names]
        return by_adapter(changed, torch.arange(len(names), device=x.device), names)

    def _changed(self, names: list[str], module: Any, output: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `output`, what the module gives for its arguments with W, as it is with W + ΔW."""
        if not names:
            return output
        structure, values = self.owner.applied(names)
        if isinstance(module, nn.Linear):
            return add_token_products(output, x, values, structure, module.weight)
        if not self._overridden:
            return changed_lookup(output, x, values, structure, module.padding_idx)
        # forward alone, without hooks, this one included
        result = with_changed_lookups(lambda: module.forward(x, *args, **kwargs), module.weight, values, structure)
        if result is None:
            weight = changed_weight(module.weight, values, structure)
            result = twin_with(module, {"weight": weight}).forward(x, *args, **kwargs)
        return result


def tied_modules(model: nn.Module, embedding: Embedding) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of all others in a model that have the weight of an adapted embedding."""
    weight = embedding.base_layer.weight
    for path, module in model.named_modules():
        if module is not embedding.base_layer and module._parameters.get("weight") is weight:
            yield path, module


def follow_tied_uses(model: nn.Module) -> None:
    """Put a hook on each module that shares the weight of an adapted embedding. Hooks that are there already stay.

    Args:
        model: base model with adapted layers.
    """
    for owner in [module for module in model.modules() if isinstance(module, Embedding)]:
        owner.sharing = dict(tied_modules(model, owner))
        for module in owner.sharing.values():
            if not is_tied_use(module):
                # before other hooks, which see what the module gives
                module.register_forward_hook(TiedUse(owner, module), prepend=True, with_kwargs=True)


def unfollow_tied_uses(model: nn.Module) -> None:
    """Remove what `follow_tied_uses` has added."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, TiedUse):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def is_tied_use(module: nn.Module) -> bool:
    """Whether a module shares the weight of an adapted embedding, and follows its changes."""
    return any(isinstance(hook, TiedUse) for hook in module._forward_hooks.values())
