"""What a head is: the part of a model that turns its backbone's features into outputs, most often new and random."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
TORCHVISION = ("fc", "classifier", "heads", "head", "aux_classifier", "AuxLogits", "aux1", "aux2")


@dataclass(frozen=True)
class Head:
    """Full names of a model's head; a module that has several names is there under each.

    Attributes:
        modules: what is to be trained whole; lists of modules are there as their members.
        output_embeddings: a language model's, and what else of it is as large as its vocabulary: pre-trained, frozen.
        parameters: of the head, but held by the model itself or by a list, where no module can be trained whole.
    """

    modules: list[str] = field(default_factory=list)
    output_embeddings: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def find_head(model: nn.Module) -> Head:
    """Return what of a model is its head.

    - transformers: everything beside the backbone, and every layer whose size depends on the number of labels. The
      backbone is the child that the class names (`base_model_prefix`), else the child `backbone`, else the child
      models where they are the greater part. Language models and `...ForPreTraining` have output embeddings at most:
      all their parts come from the checkpoint.
    - timm: what `get_classifier()` returns and `pretrained_cfg` names.
    - torchvision: `fc`, `head`, `heads`, and the last layer of `classifier`, which is the one to replace for a new
      task; beside a `backbone` all of `classifier` or `head`, and the predictors of `roi_heads`.
    - anything else is one whole, without a head.
    """
    names: list[str] = []
    output: list[str] = []
    raw: list[str] = []
    pretrained: list[str] = []
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or f"{path}.".startswith(tuple(f"{name}." for name in names)):
            continue
        where = f"{path}." if path else ""
        if _is_pretrained(part):
            pretrained.append(where)
            output += [where + name for name in _output_embeddings(part)]
        elif _has_task(part) and not where.startswith(tuple(pretrained)):
            beside, own = _beside_backbone(part)
            names += [where + name for name in beside]
            raw += [where + name for name in own]
    for path, module in model.named_modules():
        if callable(getattr(module, "get_classifier", None)) and (path == "" or _is_backbone(model, path)):
            names += [f"{path}.{name}" if path else name for name in _classifier(module)]
    if _is_torchvision(model):
        names += _torchvision_head(model)
    if isinstance(model, PreTrainedModel):
        labelled, own = _sized_by_labels(model, [*names, *output], raw)
        names, raw = names + labelled, raw + own
    modules, held = _members(model, names)
    return Head(all_names(model, modules), all_names(model, output, shared=False), sorted({*raw, *held}))


def output_head(model: nn.Module) -> list[str]:
    """Return the names of the modules that are left out of the targets: the head, new or a language model's."""
    head = find_head(model)
    return head.modules + head.output_embeddings


# --- transformers ---------------------------------------------------------------------------------------------------


def _has_task(model: PreTrainedModel) -> bool:
    """Whether the class is one for a task; `CLIPModel` and the like are backbones themselves, projections included."""
    return not _of_transformers(model) or re.search(r"For[A-Z]", type(model).__name__) is not None


def _of_transformers(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.")


def _is_pretrained(model: PreTrainedModel) -> bool:
    """Whether all parts come from the checkpoint: the model puts out tokens as it takes them in, or pre-trains.

    CTC over audio takes no tokens in.
    """
    name = type(model).__name__
    inputs = _embeddings(model, "get_input_embeddings")
    parts = list(inputs.modules()) if inputs is not None else []
    rows = _rows(_embeddings(model, "get_output_embeddings"))
    generates = type(model).can_generate() and any(isinstance(part, nn.Embedding) for part in parts)
    named = name.endswith(("ForPreTraining", "ForConditionalGeneration", "ForCausalLM"))
    return generates or named or (rows is not None and any(_rows(part) == rows for part in parts))


def _embeddings(model: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (NotImplementedError, AttributeError):  # transformers' way to say that there are none
        return None
    return found if isinstance(found, nn.Module) else None


def _rows(module: Any) -> int | None:
    weight: Any = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() else None


def _output_embeddings(model: PreTrainedModel) -> list[str]:
    """Names of a language model's output embeddings and, beside the backbone, of other layers of that size.

    Such layers are tied to input embeddings, or read without being called (MobileBERT's second half).
    """
    outputs = _embeddings(model, "get_output_embeddings")
    rows = _rows(outputs)
    uses = Counter(id(parameter) for part in model.modules() for parameter in part.parameters(recurse=False))
    backbones = tuple(f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel))
    found = []
    for name, module in model.named_modules():
        weight = getattr(_bare(module), "weight", None)
        if module is outputs:
            found.append(name)
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2 and not f"{name}.".startswith(backbones):
            found += [name] if rows in weight.shape or uses[id(weight)] > 1 else []
    return [name for name in found if not isinstance(_bare(model.get_submodule(name)), nn.Embedding)]


def _beside_backbone(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Children and parameters that stand beside the backbone."""
    children = {name: child for name, child in model.named_children() if _size(child)}
    own = [name for name, _ in model.named_parameters(recurse=False)]
    for backbone in (model.base_model_prefix, "backbone"):
        if backbone in children:
            return [name for name in children if name != backbone], own
    models = [name for name, child in children.items() if isinstance(child, PreTrainedModel)]
    inside = sum(_size(children[name]) for name in models)
    if 2 * inside < sum(_size(child) for child in children.values()):
        return [], []
    last = [*children].index(models[-1]) if models else 0
    return [*children][last + 1 :], []  # embeddings and projections come before the model that they feed


def _sized_by_labels(model: PreTrainedModel, known: list[str], raw: list[str]) -> tuple[list[str], list[str]]:
    """Layers and parameters outside the known head whose size depends on the number of labels.

    A twin with one label more, made without memory for its weights, tells.
    """
    labels = getattr(model.config, "num_labels", None)
    if not _of_transformers(model) or not _has_task(model) or not isinstance(labels, int):
        return [], []
    inside = tuple(f"{name}." for name in known)
    others = (p for name, p in model.named_parameters() if not name.startswith(inside) and name not in raw)
    if _is_pretrained(model) or not any(p.dim() and p.shape[0] in (labels, labels + 1) for p in others):
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
        ours = _bare(model.get_submodule(name))
        for key, parameter in module.named_parameters(recurse=False):
            if getattr(ours, key).shape != parameter.shape and not f"{name}.".startswith(inside):
                layers += [name] if name else []
                own += [] if name or key in raw else [key]
    return layers, own


# --- timm and torchvision -------------------------------------------------------------------------------------------


def _is_backbone(model: nn.Module, path: str) -> bool:
    return isinstance(model, PreTrainedModel) and path == model.base_model_prefix


def _classifier(model: Any) -> list[str]:
    """Names of a timm model's classifiers; one or several, and none where there are no classes."""
    held = model.get_classifier()
    wanted = {id(part) for part in (held if isinstance(held, (tuple, list)) else [held])}
    listed = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    listed = (listed,) if isinstance(listed, str) else listed
    return [
        name
        for name, module in model.named_modules()
        if name and _size(module) and (id(module) in wanted or name in listed)
    ]


def _is_torchvision(model: nn.Module) -> bool:
    return any(base.__module__.startswith("torchvision.models.") for base in type(model).__mro__)


def _torchvision_head(model: nn.Module) -> list[str]:
    children = dict(model.named_children())
    found = [name for name in TORCHVISION if name in children]
    if "backbone" in children:
        inside = children["roi_heads"].named_children() if "roi_heads" in children else ()
        return found + [f"roi_heads.{name}" for name, _ in inside if name.endswith("_predictor")]
    return [name if name in ("fc", "head", "heads") else f"{name}{_last(children[name])}" for name in found]


def _last(module: nn.Module) -> str:
    """Where the last layer with parameters stands, from a dot on; nothing if that is the module itself."""
    names = [
        name for name, part in named_outside(module) if next(_bare(part).parameters(recurse=False), None) is not None
    ]
    return f".{names[-1]}" if names and names[-1] else ""


# --- names ----------------------------------------------------------------------------------------------------------


def _members(model: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Modules and parameters, lists of them replaced by their members, modules without parameters left out."""
    modules: list[str] = []
    parameters: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LISTS):
            parameters += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            inner = _members(model, [f"{name}.{key}" for key, _ in module.named_children()])
            modules, parameters = modules + inner[0], parameters + inner[1]
        elif _size(module):
            modules.append(name)
    return modules, parameters


def all_names(model: nn.Module, names: Iterable[str], shared: bool = True) -> list[str]:
    """Return all names of the modules that have one of these, in the model's order, the outermost alone.

    Args:
        model: with or without adapters.
        names: full names of modules.
        shared: add layers that share a weight with these, as detectors' decoders do, embeddings left out.
    """
    modules = [_bare(model.get_submodule(name)) for name in names]
    inner = [part for module in modules for part in module.modules() if shared and not isinstance(part, nn.Embedding)]
    tensors = {id(parameter) for part in inner for parameter in part.parameters(recurse=False)}
    wanted = {id(module) for module in modules}
    kept: list[str] = []
    for name, module in named_outside(model):
        own = [] if isinstance(module, nn.Embedding) else _bare(module).parameters(recurse=False)
        within = name.startswith(tuple(f"{outer}." for outer in kept))
        if not within and (id(_bare(module)) in wanted or any(id(parameter) in tensors for parameter in own)):
            kept.append(name)
    return kept


def named_outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every name of every module but those that adapters have added, or hold a copy or the original of."""
    within: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(within)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            within.append(f"{name}.")
        yield name, module


def _bare(module: Any) -> Any:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _size(module: nn.Module) -> int:
    """Number of parameters, without copies that adapters train."""
    return sum(p.numel() for name, p in module.named_parameters() if "modules_to_save" not in name.split("."))
