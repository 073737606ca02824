"""The base model of a saved adapter: its class, the size of its output head, and loading it."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from peft_fps.adapter_folders.adapter_contents import Inspection
from peft_fps.adapter_folders.stored_weights import WholeModelNeededError
from peft_fps.card.facts import TASKS
from peft_fps.vision.upstream_noise import no_head_report


def load_base(
    name: str, revision: str | None, adapter: Inspection, dtype: str | None, *, weights: bool = True
) -> PreTrainedModel:
    """Load the base model of an adapter, its output head as large as the adapter's own.

    Args:
        name: a folder, or a name on the Hub.
        revision: on the Hub.
        adapter: what the adapter holds.
        dtype: name of a dtype of torch. None means that of the files.
        weights: whether to read them. Otherwise they are checked as well, and the model is on the meta device.

    Raises:
        WholeModelNeededError: the weights are quantised, and were not to be read.
        ValueError: there is no such model, its class is unknown, or it lacks weights that the adapter does not hold.
    """
    where = {} if revision is None else {"revision": revision}
    place: dict[str, Any] = {} if weights else {"device_map": {"": "meta"}}
    try:
        base = AutoConfig.from_pretrained(name, **where)
        if not weights and getattr(base, "quantization_config", None) is not None:
            raise WholeModelNeededError("its weights are quantised")
        kind = model_class(name, adapter, base)
        sizes = head_sizes(kind, base, adapter.heads)
        with no_head_report():
            model, loaded = kind.from_pretrained(
                name,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **place,
                **where,
                **sizes,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"The base model {name!r} could not be loaded: {error} Another one: --base.") from error
    unfit = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    absent = sorted(unfit - set(adapter.heads))
    if absent:
        raise ValueError(
            f"The base model {name!r} lacks {len(absent)} weights of a {type(model).__name__}, or holds them in "
            f"another shape, and the adapter does not bring them: {', '.join(absent[:3])}. The merged model would "
            "have random weights there. Give the model that the adapter was made from with --base."
        )
    return model


def model_class(name: str, adapter: Inspection, base: Any) -> Any:
    """Return the class of transformers to load a base model by: recorded in the adapter, or else in the model.

    Nothing outside transformers is imported, whatever a config says.

    Args:
        name: folder or name on the Hub of the base model, for the error.
        adapter: what the adapter holds.
        base: config of the base model.

    Raises:
        ValueError: neither tells, the model's code is not part of transformers, or the base is another kind of model.
    """
    task = adapter.config and adapter.config.task_type
    if task in TASKS:
        return getattr(transformers, TASKS[task][0])
    names = [kind for kind in (adapter.base_class, *(base.architectures or ())) if isinstance(kind, str)]
    for kind in names:
        found = getattr(transformers, kind, None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            continue
        if not isinstance(base, found.config_class or object):
            raise ValueError(f"it is a {base.model_type} model, and the adapter was made from a {kind}.")
        return found
    raise ValueError(
        f"The model's class is {' or '.join(names) or 'not recorded'}, expected one of transformers. Merge in a "
        f"program: load {name!r}, then PeftModel.from_pretrained(model, adapter).merge_and_unload()."
    )


def head_sizes(kind: Any, base: Any, heads: Mapping[str, Tensor]) -> dict[str, int]:
    """Return `num_labels` if the adapter's output head is for another number of classes than the base's, else nothing.

    Args:
        kind: class of the base model.
        base: its config.
        heads: tensors that the adapter holds whole, by name.

    Raises:
        ValueError: a tensor that the adapter holds whole has a shape that another number of classes does not explain.
    """
    with torch.device("meta"):
        empty = (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(base)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    other = {name: head for name, head in heads.items() if name in shapes and shapes[name] != head.shape}
    numbers = {head.shape[0] for head in other.values() if head.dim()}
    for name, head in other.items():
        of_classes = head.dim() and shapes[name][0] == base.num_labels and shapes[name][1:] == head.shape[1:]
        if not of_classes or len(numbers) > 1:
            raise ValueError(
                f"{name} has the shape {tuple(head.shape)} in the adapter and {tuple(shapes[name])} in the base "
                "model, expected shapes that differ by the number of classes alone."
            )
    return {"num_labels": numbers.pop()} if numbers else {}
