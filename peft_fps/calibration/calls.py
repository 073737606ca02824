"""From a batch to calls of the model: by name, as one mapping, or one call for each of several columns."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.calibration.batches import count_examples, inputs_of


Run = Callable[[nn.Module, Any], Any]
"""From the model and a batch on its device to the model's outputs."""

LABELS = {"labels", "label", "return_loss"}
"""Names that are no input by themselves."""
FEATURE = re.compile(
    r"^(|.+_)(input_ids|inputs_embeds|sentence_embedding|pixel_values|pixel_values_videos|input_features|input_values)$"
)
"""A name of an input, behind that of its column (`anchor_input_ids`) as sentence-transformers' collators have it."""
TENSOR = re.compile(r"(typing\.)?(Optional\[)?(torch\.)?\w*Tensor\b")
"""An annotation of what cannot be a mapping."""


@dataclass(frozen=True)
class Forward:
    """What a model's forward takes.

    Attributes:
        names: of its arguments.
        needed: of them, those without a default.
        others: whether any other name is an input as well.
        mapping: whether its one argument may be a mapping.
    """

    names: tuple[str, ...]
    needed: frozenset[str]
    others: bool
    mapping: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        """Read the signature of a model's forward."""
        parameters = inspect.signature(model.forward).parameters.values()
        own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p for p in own if p.default is p.empty]
        first = needed or own
        names = tuple(p.name for p in own)
        # transformers passes further names on to parts of a model, which read no input from them
        others = any(p.kind is p.VAR_KEYWORD for p in parameters) and not (isinstance(model, PreTrainedModel) and own)
        lone = len(first) == 1 and first[0].kind is not inspect.Parameter.KEYWORD_ONLY
        mapping = lone and not TENSOR.match(inspect.formatannotation(first[0].annotation).strip("'"))
        return cls(names, frozenset(p.name for p in needed), others, mapping)

    def named(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is passed by name: nothing if no input is among it, or if more is needed."""
        passed = {name: value for name, value in inputs.items() if self.others or name in self.names}
        return passed if self.needed <= passed.keys() and passed.keys() - LABELS else {}

    def call(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return positional arguments and those by name, or None if it takes none of the inputs."""
        named = self.named(inputs)
        if named:
            return (), named
        return ((dict(inputs),), {}) if self.mapping and inputs.keys() - LABELS else None


def feed(model: nn.Module, batch: Any, device: torch.device, run: Run | None = None) -> int:
    """Run the model on one batch, moved to `device`, and return the number of examples in it.

    Args:
        model: to be run.
        batch: of data.
        device: of the model.
        run: how; `run_model` if None, which needs no labels.
    """
    inputs = send_to_device(inputs_of(batch) if run is None else batch, device)
    (run or run_model)(model, inputs)
    return count_examples(inputs)


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return the model's outputs for a batch on its device: a list of them if it has several columns.

    Of a tuple or list the first element counts, the rest being labels; a tensor is passed as it is. A mapping is
    passed by name (names that the model's forward does not take are left out), or, if none fits, to a forward that
    takes one mapping, as in sentence-transformers. Several mappings of the same names are a call each, and so are
    several columns in one mapping (`anchor_input_ids`, `positive_input_ids`).

    Raises:
        TypeError: the model's forward takes nothing of what the batch holds.
    """
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor):
        return model(inputs)
    outputs = [model(*args, **kwargs) for args, kwargs in _calls(model, inputs)]
    return outputs if len(outputs) > 1 else outputs[0]


def fits(model: nn.Module, batch: Any) -> bool:
    """Whether `run_model` finds what the model's forward takes in a batch."""
    try:
        inputs = inputs_of(batch)
        return isinstance(inputs, Tensor) or bool(_calls(model, inputs))
    except TypeError:
        return False


def _calls(
    model: nn.Module, inputs: Mapping[str, Any] | list[Mapping[str, Any]]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    forward = Forward.of(model)
    columns = inputs if isinstance(inputs, list) else _columns(inputs, forward)
    found = [(column, forward.call(column)) for column in columns]
    for column, call in found:
        if call is None:
            takes = ", ".join([*forward.names, *(["any name"] if forward.others else [])]) or "nothing"
            raise TypeError(
                f"a calibration batch holds {', '.join(map(repr, column)) or 'nothing'}, but the forward of "
                f"{type(model).__name__} takes {takes}. Name the inputs as forward does, or say how the model is "
                "called: calibrate(data, run=lambda model, batch: ...). Nothing was changed."
            )
    return [call for _, call in found if call is not None]


def _columns(inputs: Mapping[str, Any], forward: Forward) -> list[Mapping[str, Any]]:
    """Mappings of the same names without their columns' prefixes, or the mapping itself if it has no columns."""
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
