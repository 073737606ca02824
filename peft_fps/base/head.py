"""What a head is: the part of a model that turns its backbone's features into outputs, most often new and random."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_fps.base.module_names import all_names, bare, members, named_outside, size
from peft_fps.base.transformers_head import (
    beside_backbone,
    has_task,
    is_pretrained,
    output_embeddings,
    sized_by_labels,
)


TORCHVISION = ("fc", "classifier", "heads", "head", "aux_classifier", "AuxLogits", "aux1", "aux2")


@dataclass(frozen=True)
class Head:
    """The names of a model's head. A module that has several names is listed under each of them.

    Attributes:
        modules: full names of the modules that are to be trained whole. A list of modules is given by its members.
        output_embeddings: full names of a language model's output embeddings and of other layers as large as its
            vocabulary. They are pre-trained and stay frozen.
        parameters: full names of parameters of the head that the model or a list holds itself. No module can be
            trained whole for them.
    """

    modules: list[str] = field(default_factory=list)
    output_embeddings: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """Full names of the modules that are no targets: a new head, and output embeddings."""
        return self.modules + self.output_embeddings


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
        if is_pretrained(part):
            pretrained.append(where)
            output += [where + name for name in output_embeddings(part)]
        elif has_task(part) and not where.startswith(tuple(pretrained)):
            beside, own = beside_backbone(part)
            names += [where + name for name in beside]
            raw += [where + name for name in own]
    for path, module in model.named_modules():
        if callable(getattr(module, "get_classifier", None)) and (path == "" or _is_backbone(model, path)):
            names += [f"{path}.{name}" if path else name for name in _classifier(module)]
    if _is_torchvision(model):
        names += _torchvision_head(model)
    if isinstance(model, PreTrainedModel):
        labelled, own = sized_by_labels(model, [*names, *output], raw)
        names, raw = names + labelled, raw + own
    modules, held = members(model, names)
    return Head(all_names(model, modules), all_names(model, output, shared=False), sorted({*raw, *held}))


def output_head(model: nn.Module) -> list[str]:
    """Return the full names of the modules that are left out of the targets: a new head, or output embeddings."""
    return find_head(model).left_out


# --- timm and torchvision -------------------------------------------------------------------------------------------


def _is_backbone(model: nn.Module, path: str) -> bool:
    """Return whether the module at a path is the backbone of a transformers model."""
    return isinstance(model, PreTrainedModel) and path == model.base_model_prefix


def _classifier(model: Any) -> list[str]:
    """Return the names of a timm model's classifiers: one, several, or none if it has no classes."""
    held = model.get_classifier()
    wanted = {id(part) for part in (held if isinstance(held, (tuple, list)) else [held])}
    listed = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    listed = (listed,) if isinstance(listed, str) else listed
    return [
        name
        for name, module in model.named_modules()
        if name and size(module) and (id(module) in wanted or name in listed)
    ]


def _is_torchvision(model: nn.Module) -> bool:
    """Return whether the class of a model, or one that it derives from, is one of torchvision's."""
    return any(base.__module__.startswith("torchvision.models.") for base in type(model).__mro__)


def _torchvision_head(model: nn.Module) -> list[str]:
    """Return the names of the modules that are the head of a torchvision model; see `find_head`."""
    children = dict(model.named_children())
    found = [name for name in TORCHVISION if name in children]
    if "backbone" in children:
        inside = children["roi_heads"].named_children() if "roi_heads" in children else ()
        return found + [f"roi_heads.{name}" for name, _ in inside if name.endswith("_predictor")]
    return [name if name in ("fc", "head", "heads") else f"{name}{_last(children[name])}" for name in found]


def _last(module: nn.Module) -> str:
    """Return the path of a module's last layer with parameters, with a dot before it; empty if it is the module."""
    names = [
        name for name, part in named_outside(module) if next(bare(part).parameters(recurse=False), None) is not None
    ]
    return f".{names[-1]}" if names and names[-1] else ""
