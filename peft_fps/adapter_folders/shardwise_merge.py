"""The merge of an adapter into a base model whose weights stay in their files, one layer in memory at a time.

The model is on the meta device, where loading makes all its checks but that of the fingerprint, which is made here. A
layer's weight and bias are read when its file is written, and the layer merges into them as in a model that is loaded.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.adapter_folders.adapter_contents import Inspection
from peft_fps.adapter_folders.shardwise_checks import (
    check_apart,
    check_embeddings,
    check_kept_names,
    check_known,
    check_plain,
    tied,
)
from peft_fps.adapter_folders.stored_weights import StoredWeights, WholeModelNeededError, stored_weights
from peft_fps.base.opening import weight_at
from peft_fps.base.quantisation import base_weight
from peft_fps.base.renamed_modules import current_names
from peft_fps.base.substitution import overrides_forward
from peft_fps.checkpoint import check_fingerprint, fingerprint
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import adapter_layers
from peft_fps.layers.merge_record import MergeRecord
from peft_fps.lifecycle.merge_whole import check_before_merge, kind_of_weight, loss_message
from peft_fps.vision.upstream_noise import upstream_deprecations


ADAPTER = "default"
"""Name that the adapter gets in the model."""


@dataclass
class ShardwiseMerge:
    """A merge that is made tensor by tensor.

    Attributes:
        model: the plain model, on the meta device but for the tensors that the adapter holds whole.
        weights: of the base model.
        layers: the layers that are still to be merged, by path.
        device: where they are merged.
        pending: tensors of merged layers that were not asked for yet.
        records: of the merges, without what they overwrote.
        kinds: of the merged weights.
    """

    model: PreTrainedModel
    weights: StoredWeights
    layers: dict[str, FPSLayer]
    device: str
    pending: dict[str, Tensor] = field(default_factory=dict)
    records: list[MergeRecord] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the merged model on the CPU; to be called once for each.

        Args:
            name: in the model's state dict.

        Raises:
            ValueError: the merged tensor would not be finite.
        """
        owner, _, own = name.rpartition(".")
        if owner in self.layers:
            self.pending |= self._merged(owner, self.layers.pop(owner))
        if name in self.pending:
            return self.pending.pop(name)
        held: Tensor = getattr(self.model.get_submodule(owner), own)
        return self.weights.plain[name].read() if held.device.type == "meta" else held.detach().cpu()

    def finish(self) -> None:
        """Warn if rounding lost many of the changes.

        Raises:
            ValueError: a layer was not merged.
        """
        if left := [*self.layers, *self.pending]:
            raise ValueError(f"{left[0]}: transformers does not save it, expected it among the weights to merge into.")
        if message := loss_message(self.records, self.kinds):
            warnings.warn(message, stacklevel=2)

    def _merged(self, path: str, layer: FPSLayer) -> dict[str, Tensor]:
        """Merge the adapter into one layer, and return its tensors by their names in the model."""
        held = layer.base_layer._parameters
        absent = {own: parameter for own, parameter in held.items() if parameter is not None}
        try:
            for own in absent:
                read = self.weights.plain[f"{path}.{own}"].read().to(self.device)
                held[own] = nn.Parameter(read, requires_grad=False)
            self.kinds.add(kind_of_weight(layer))
            layer.merge(safe_merge=True)
            nothing = torch.empty(0)
            self.records += [
                replace(record, positions=nothing, weight=nothing, bias=None)
                for record in layer.merge_records.values()
            ]
            return {f"{path}.{own}": held[own].detach().cpu() for own in absent}
        finally:
            held.update(absent)


def prepare_shardwise(model: PreTrainedModel, adapter: Inspection, folder: Path, device: str) -> ShardwiseMerge:
    """Load an adapter onto a base model without weights, and make the checks of loading and merging.

    Args:
        model: from `load_base` with `weights=False`; changed in place.
        adapter: what the adapter's folder holds.
        folder: local, with the files of the base model.
        device: where layers are to be merged.

    Raises:
        WholeModelNeededError: the merge needs the whole model at hand.
        ValueError: the adapter does not fit the model.
    """
    assert adapter.config is not None
    assert adapter.record is not None
    if adapter.config.token_keep_rate is not None:
        raise WholeModelNeededError("the adapter selects tokens, as the merged model then does")
    weights = stored_weights(model, folder)
    ties = tied(model)
    saved_names = current_names(model, {path: path for path in adapter.record.allocation})
    targets = {path: module for path, module in model.named_modules() if path in saved_names}
    if owned := next((path for path in saved_names if weight_at(model, path) is not None), None):
        raise WholeModelNeededError(f"{owned} is no layer of its own, but a tensor of the module around it")
    for first, second in ties:  # such a layer follows the other, which loading refuses for weights that are away
        if {first.rpartition(".")[0], second.rpartition(".")[0]} & saved_names.keys():
            raise WholeModelNeededError(f"{first} and {second} are one tensor")
    check_plain(weights, [f"{path}.{own}" for path, module in targets.items() for own in module._parameters])
    check_plain(weights, adapter.heads)
    for path, target in targets.items():
        if overrides_forward(target):
            raise WholeModelNeededError(f"{path} has a forward of its own, which is tried with its weight")
        # the adapter's tensors are made on the device that accelerate's hooks name for a weight that is away
        target._hf_hook = SimpleNamespace(offload=True, execution_device=device)
    _make_room(model, adapter.heads)
    with upstream_deprecations(), warnings.catch_warnings():
        # BatchNorm looks for a count in every state dict, and makes one if there is none, as in that of an adapter
        warnings.filterwarnings("ignore", r"for .*num_batches_tracked: copying from a non-meta parameter", UserWarning)
        adapted: Any = PeftModel.from_pretrained(model, str(adapter.folder))
    for target in targets.values():
        del target._hf_hook
    layers = adapter_layers(adapted, ADAPTER)
    plain = adapted.unload()
    check_apart(plain, layers, ties)
    check_embeddings(plain)
    check_known(plain, weights, saved_names)
    check_kept_names(plain, weights)
    read = {
        saved: replace(
            base_weight(plain.get_submodule(path)),
            read=partial(weights.plain[f"{path}.weight"].read, mapped=True),
            device=torch.device("cpu"),
        )
        for path, saved in saved_names.items()
    }
    check_fingerprint(adapter.record.base_fingerprint, fingerprint(read), adapter.config.check_base)
    check_before_merge(plain, list(layers.values()), None, safe_merge=True)
    for layer in layers.values():
        layer.forget(ADAPTER)  # what was derived of all layers, and comes back one layer at a time
    return ShardwiseMerge(plain, weights, layers, device)


def _make_room(model: nn.Module, names: Iterable[str]) -> None:
    """Put tensors of a model that are to be loaded from the adapter onto the CPU, without values."""
    state = model.state_dict(keep_vars=True)
    for name in state.keys() & set(names):  # loading says which the model does not have
        owner, _, own = name.rpartition(".")
        room, parameter = torch.empty_like(state[name], device="cpu"), isinstance(state[name], nn.Parameter)
        setattr(model.get_submodule(owner), own, nn.Parameter(room, state[name].requires_grad) if parameter else room)
