"""Calls of a model on a batch: with arguments by name, with one mapping, or one call for each of several columns."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.calibration.batch_masks import LIKELY
from peft_fps.calibration.batches import count_examples, inputs_of, mask_beside


Run = Callable[[nn.Module, Any], Any]
"""Takes the model and a batch on its device. Returns the model's outputs."""

LABELS = {"labels", "label", "return_loss"}
"""Names that do not suffice as inputs of a call."""
FEATURE = re.compile(
    r"^(|.+_)(input_ids|inputs_embeds|sentence_embedding|pixel_values|pixel_values_videos|input_features|input_values)$"
)
"""Name of an input behind the name of its column, as sentence-transformers' collators write it: `anchor_input_ids`."""
TENSOR = re.compile(r"(typing\.)?(Optional\[)?(torch\.)?\w*Tensor\b")
"""Annotation of an argument that cannot be a mapping."""


@dataclass(frozen=True)
class Forward:
    """The arguments of a model's forward.

    Attributes:
        names: names of the arguments.
        needed: names of the arguments without a default.
        others: whether forward takes inputs by any other name as well.
        mapping: whether forward may take all inputs as one mapping.
    """

    names: tuple[str, ...]
    needed: frozenset[str]
    others: bool
    mapping: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        """Read the signature of a model's forward."""
        parameters = inspect.signature(model.forward).parameters.values()
        listed = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p for p in listed if p.default is p.empty]
        first = needed or listed
        names = tuple(p.name for p in listed)
        # transformers passes further names on to parts of a model, which read no input from them
        passed_on = isinstance(model, PreTrainedModel) and listed
        others = any(p.kind is p.VAR_KEYWORD for p in parameters) and not passed_on
        lone = len(first) == 1 and first[0].kind is not inspect.Parameter.KEYWORD_ONLY
        mapping = lone and not TENSOR.match(inspect.formatannotation(first[0].annotation).strip("'"))
        return cls(names, frozenset(p.name for p in needed), others, mapping)

    def named(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs that forward takes by name.

        Args:
            inputs: inputs and labels of a batch by name.

        Returns:
            Arguments by name. Empty if they include no input, or lack an argument without a default.
        """
        passed = {name: value for name, value in inputs.items() if self.others or name in self.names}
        return passed if self.needed <= passed.keys() and passed.keys() - LABELS else {}

    def call(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return positional arguments and arguments by name, or None if forward takes none of the inputs.

        Args:
            inputs: inputs and labels of a batch by name.
        """
        named = self.named(inputs)
        if named:
            return (), named
        return ((dict(inputs),), {}) if self.mapping and inputs.keys() - LABELS else None


def feed(model: nn.Module, batch: Any, device: torch.device, run: Run | None = None) -> int:
    """Run the model on one batch and return the number of examples in it.

    Args:
        model: model to run.
        batch: batch on any device.
        device: device that the batch is moved to.
        run: runs the model on the batch. Default: `run_model`, which needs no labels.

    Raises:
        TypeError: the default cannot run the model on the batch.
    """
    inputs = send_to_device(_inputs_for(model, batch) if run is None else batch, device)
    (run or run_model)(model, inputs)
    return count_examples(inputs)


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch.

    A tensor is the first argument of forward. The items of a mapping are arguments by name, without those that forward
    does not take. If none fits, the mapping is the one argument of forward, as in sentence-transformers.

    Args:
        model: model to run.
        batch: batch on the model's device. In a tuple or list only the first element counts, because the rest are
            labels; but of tensors `(tokens, mask, ...)`, the mask goes to the model's argument for it. Several
            mappings with the same names are one call each. So are several columns in one mapping
            (`anchor_input_ids`, `positive_input_ids`).

    Returns:
        The outputs of the model, in a list if there are several calls.

    Raises:
        TypeError: the model's forward takes none of the batch's items, or the batch is of another kind.
    """
    inputs = _inputs_for(model, batch)
    if isinstance(inputs, Tensor):
        return model(inputs)
    outputs = [model(*args, **kwargs) for args, kwargs in _calls(model, inputs)]
    return outputs if len(outputs) > 1 else outputs[0]


def _inputs_for(model: nn.Module, batch: Any) -> Any:
    """Return the part of a batch that goes to the model, with the mask that a tuple of tensors may have second.

    The mask goes to an argument `attention_mask`, or to the second one if its name is that of a mask.
    """
    inputs, mask = inputs_of(batch), mask_beside(batch)
    if mask is None:
        return inputs
    first, *others = inspect.signature(model.forward).parameters
    named = [name for name in others if name == "attention_mask"] or [n for n in others[:1] if LIKELY.fullmatch(n)]
    return {first: inputs, named[0]: mask} if named else inputs


def fits(model: nn.Module, batch: Any) -> bool:
    """Whether `run_model` can run the model on a batch."""
    try:
        inputs = inputs_of(batch)
        return isinstance(inputs, Tensor) or bool(_calls(model, inputs))
    except TypeError:
        return False


def _calls(
    model: nn.Module, inputs: Mapping[str, Any] | list[Mapping[str, Any]]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return positional arguments and arguments by name of each call that a batch needs.

    Args:
        model: model to call.
        inputs: as `inputs_of` returns them.

    Raises:
        TypeError: the model's forward takes none of the inputs of a call.
    """
    forward = Forward.of(model)
    columns = inputs if isinstance(inputs, list) else _columns(inputs, forward)
    calls = [(column, forward.call(column)) for column in columns]
    for column, call in calls:
        if call is None:
            takes = ", ".join([*forward.names, *(["any name"] if forward.others else [])]) or "nothing"
            raise TypeError(
                f"a calibration batch holds {', '.join(map(repr, column)) or 'nothing'}, but the forward of "
                f"{type(model).__name__} takes {takes}. Name the inputs as forward does, or say how the model is "
                "called: calibrate(data, run=lambda model, batch: ...). Nothing was changed."
            )
    return [call for _, call in calls if call is not None]


def _columns(inputs: Mapping[str, Any], forward: Forward) -> list[Mapping[str, Any]]:
    """Split a mapping into its columns.

    Args:
        inputs: inputs of all columns, such as `anchor_input_ids` and `positive_input_ids`.
        forward: arguments of the model's forward.

    Returns:
        One mapping per column with names that lack the prefix of the column. The mapping itself if it has no columns,
        or if forward takes its names.
    """
    if forward.named(inputs):
        return [inputs]
    features = [match for match in map(FEATURE.match, inputs) if match]
    prefixes = dict.fromkeys(match[1] for match in features)
    if not prefixes or "" in prefixes:
        return [inputs]
    columns: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for name, value in inputs.items():
        owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if owner is not None:
            columns[owner][name.removeprefix(owner)] = value
    return list(columns.values())
