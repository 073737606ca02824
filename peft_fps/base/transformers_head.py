"""What of a transformers model comes from its checkpoint, and what its class adds to the backbone for a task."""

import copy
import re
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.base.module_names import bare, size


def has_task(model: PreTrainedModel) -> bool:
    """Return whether the class is one for a task.

    `CLIPModel` and the like are backbones themselves, projections included.
    """
    return not _of_transformers(model) or re.search(r"For[A-Z]", type(model).__name__) is not None


def is_pretrained(model: PreTrainedModel) -> bool:
    """Return whether all parts of a model come from its checkpoint.

    They do if the model puts out the tokens that it takes in, or if its class is one for pre-training. A model with
    CTC over audio takes no tokens in.
    """
    name = type(model).__name__
    inputs = _embeddings(model, "get_input_embeddings")
    parts = list(inputs.modules()) if inputs is not None else []
    rows = _rows(_embeddings(model, "get_output_embeddings"))
    generates = type(model).can_generate() and any(isinstance(part, nn.Embedding) for part in parts)
    named = name.endswith(("ForPreTraining", "ForConditionalGeneration", "ForCausalLM"))
    return generates or named or (rows is not None and any(_rows(part) == rows for part in parts))


def output_embeddings(model: PreTrainedModel) -> list[str]:
    """Return the names of a language model's output embeddings and, beside the backbone, of other layers of that size.

    Such layers are tied to input embeddings, or read without being called (MobileBERT's second half).
    """
    outputs = _embeddings(model, "get_output_embeddings")
    rows = _rows(outputs)
    uses = Counter(id(parameter) for part in model.modules() for parameter in part.parameters(recurse=False))
    backbones = tuple(f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel))
    found = []
    for name, module in model.named_modules():
        weight = getattr(bare(module), "weight", None)
        if module is outputs:
            found.append(name)
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2 and not f"{name}.".startswith(backbones):
            found += [name] if rows in weight.shape or uses[id(weight)] > 1 else []
    return [name for name in found if not isinstance(bare(model.get_submodule(name)), nn.Embedding)]


def beside_backbone(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the names of the children and parameters that stand beside the backbone."""
    children = {name: child for name, child in model.named_children() if size(child)}
    own = [name for name, _ in model.named_parameters(recurse=False)]
    for backbone in (model.base_model_prefix, "backbone"):
        if backbone in children:
            return [name for name in children if name != backbone], own
    models = [name for name, child in children.items() if isinstance(child, PreTrainedModel)]
    inside = sum(size(children[name]) for name in models)
    if 2 * inside < sum(size(child) for child in children.values()):
        return [], []
    last = [*children].index(models[-1]) if models else 0
    return [*children][last + 1 :], []  # embeddings and projections come before the model that they feed


def sized_by_labels(model: PreTrainedModel, known: list[str], raw: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of the layers and parameters outside the known head whose size depends on the number of labels.

    A twin with one label more, made without memory for its weights, tells.

    Args:
        model: a transformers model.
        known: names of the modules of its head that are known already.
        raw: names of the parameters of its head that are known already.

    Returns:
        Names of layers, and names of parameters that the model holds itself.
    """
    labels = getattr(model.config, "num_labels", None)
    if not _of_transformers(model) or not has_task(model) or not isinstance(labels, int):
        return [], []
    inside = tuple(f"{name}." for name in known)
    others = (p for name, p in model.named_parameters() if not name.startswith(inside) and name not in raw)
    if is_pretrained(model) or not any(p.dim() and p.shape[0] in (labels, labels + 1) for p in others):
        return [], []
    config = copy.deepcopy(model.config)
    config.num_labels = labels + 1
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            twin: nn.Module = type(model)(config)
    except Exception:  # not to be built from its config alone: what stands beside the backbone must do
        return [], []
    layers, own = [], []
    for name, module in twin.named_modules():
        ours = bare(model.get_submodule(name))
        for key, parameter in module.named_parameters(recurse=False):
            if getattr(ours, key).shape != parameter.shape and not f"{name}.".startswith(inside):
                layers += [name] if name else []
                own += [] if name or key in raw else [key]
    return layers, own


def _of_transformers(model: nn.Module) -> bool:
    """Return whether the class of a model is defined in transformers."""
    return type(model).__module__.startswith("transformers.")


def _embeddings(model: PreTrainedModel, getter: str) -> nn.Module | None:
    """Return what a getter of the model returns, None if the model has no such embeddings."""
    try:
        found = getattr(model, getter)()
    except (NotImplementedError, AttributeError):  # transformers' way to say that there are none
        return None
    return found if isinstance(found, nn.Module) else None


def _rows(module: Any) -> int | None:
    """Return the number of rows of a module's weight, None if it has no weight."""
    weight: Any = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() else None
