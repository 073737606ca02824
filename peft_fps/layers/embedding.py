"""FPS layers over embeddings: tables of rows that tokens are looked up in."""

import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_fps.base.quantisation import is_of_torchao
from peft_fps.layers.changed_layer import Change
from peft_fps.layers.sample_names import check_unmerged
from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.sparse import Layout, Structure, changed_lookup


class Embedding(ProductLayer):
    """`torch.nn.Embedding` with sparse changes: a linear layer over one-hot tokens.

    A neuron is a dimension of the embedding, its inputs are the tokens. So E|a| of an input is the share of positions
    that hold the token, and the weight is stored as `(inputs, neurons)`. Maps `(...)` integers to `(..., neurons)`.

    The padding token (`padding_idx`) gets no entry, because torch gives its row no gradient.

    Modules that share its weight compute with the same changes; see `tied_uses`.
    """

    base_class = nn.Embedding

    @classmethod
    def layout_of(cls, base_layer: Any) -> Layout:
        """Return that the weight is stored as `(inputs, neurons)`."""
        return Layout(transposed=True)

    @classmethod
    def barred_input(cls, base_layer: Any) -> int | None:
        """Return the padding token, None if there is none."""
        padding: int | None = base_layer.padding_idx
        return padding

    @property
    def adds_its_change(self) -> bool:
        """Whether the change adds to the base layer's output."""
        return False

    def applied(self, names: list[str]) -> tuple[Structure, Tensor]:
        """Return the sum of the named adapters' ΔW; see `ChangedLayer`.

        Raises:
            ValueError: the embedding has been resized since the adapter was added.
        """
        found = self.base_layer.weight.shape
        if found[0] != self.shape.inputs:
            raise ValueError(
                f"{self.module_path} has {found[0]} tokens, expected the {self.shape.inputs} that it had when its "
                "adapter was added. Resize token embeddings before the adapter is added, or merge it first with "
                "model.merge_and_unload()."
            )
        return super().applied(names)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        check_unmerged(self)
        carried = [[] if self.disable_adapters or not self.carries(name) else [name] for name in adapter_names]
        if all(names == carried[0] for names in carried):
            return self._forward_with(carried[0], x, *args, **kwargs)
        if x.dim() < 2 or looks_up_distances(self.module_path):
            self._refuse_to_share(adapter_names)
        if len(x) == 1:  # positions that all samples share
            x = x.expand(len(adapter_names), *x.shape[1:])
        result = super()._mixed_forward(x, adapter_names, *args, **kwargs)
        if result.dim() != x.dim() + 1 or len(result) != len(x):
            self._refuse_to_share(adapter_names)
        return result

    def _refuse_to_share(self, adapter_names: list[str]) -> None:
        raise ValueError(
            f"{self.module_path} looks up positions or distances, which all samples share, and adapter_names holds "
            f"adapters that change it and others ({sorted(set(adapter_names))}), expected one adapter for all "
            "samples. Run the samples of each adapter as a batch of their own."
        )

    # --- forward ----------------------------------------------------------------------------------------------------

    def _own_product(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._beside_base(change, self.base_layer(x), x)

    def _beside_base(self, change: Change, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return changed_lookup(result, x, change.values, change.structure, self.base_layer.padding_idx)

    def _changed_base(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer's own forward with W + ΔW in place of its weight.

        Where the forward does nothing with the weight but look tokens up, no dense W + ΔW is formed.
        """
        base = self.base_layer
        result = with_changed_lookups(lambda: base(x, *args, **kwargs), base.weight, change.values, change.structure)
        if result is not None:
            return result
        return super()._changed_base(change, x, *args, **kwargs)


def looks_up_distances(path: str) -> bool:
    """Whether an embedding looks up distances between positions, which samples share, as far as its name tells."""
    return re.search(r"relative|(^|_)rel_|distance", path.rpartition(".")[2]) is not None


def with_changed_lookups(
    run: Callable[[], Tensor], weight: Tensor, values: Tensor, structure: Structure
) -> Tensor | None:
    """Run a forward whose lookups in a weight W are lookups in W + ΔW.

    Args:
        run: the forward.
        weight: W, the very tensor that the forward reads.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.

    Returns:
        The result. None if the forward reads the weight in another way, or does not look up in it.
    """
    uses: list[bool] = []
    with _ChangedLookups(weight, values, structure, uses):
        result = run()
    return result if uses and all(uses) else None


class _ChangedLookups(TorchFunctionMode):
    """Context of `with_changed_lookups`; every use of the weight adds to `uses` whether it is a lookup."""

    def __init__(self, weight: Tensor, values: Tensor, structure: Structure, uses: list[bool]) -> None:
        super().__init__()
        self._change = weight, values, structure
        self._uses = uses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        weight, values, structure = self._change
        result = func(*args, **kwargs)
        if not any(given is weight for given in (*args, *kwargs.values())):
            return result
        if func is not F.embedding:
            if func.__name__ != "__get__":  # dtype, device and shape
                self._uses.append(False)
            return result
        self._uses.append(True)
        named = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
        return changed_lookup(result, named["input"], values, structure, named.get("padding_idx"))


def lookup_obstacle(module: Any) -> str | None:
    """Return what keeps an embedding from a sparse change, for a message. None if nothing does."""
    if is_of_torchao(module.weight):
        return (
            "its weight is quantised by torchao, expected a dense one; of quantised layers, linear ones are supported"
        )
    if module.max_norm is not None:
        return (
            f"its max_norm={module.max_norm} makes every lookup write to the weight, expected None: an adapter "
            "leaves the base weight as it is"
        )
    if module.scale_grad_by_freq:
        return "it has scale_grad_by_freq=True, which gradients of single entries do not follow, expected False"
    if module.weight.shape[0] == 1 and module.padding_idx is not None:
        return "its only row is that of the padding token, which gets no entry, expected rows of other tokens"
    return None
