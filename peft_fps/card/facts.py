"""What a model card says about an adapter: its config, its record, and the header of its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from transformers.modelcard import TASK_MAPPING

from peft_fps.card.selection_method import DescribedSettings, describe
from peft_fps.checkpoint import PEFT_PREFIX, PICKLED_WEIGHTS, WEIGHTS, is_left_out, open_safetensors
from peft_fps.checkpoint.record import FORMAT_VERSION, AdapterRecord
from peft_fps.layers.adapter_state import AdapterState, Evaluation


TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
"""PEFT's task types: the class of transformers that loads a base model, and the Hub's name of the task."""


class CardSettings(DescribedSettings, Protocol):
    """Fields of `FPSConfig` that a card shows, besides those of a description."""

    budget: float | None
    per_neuron: float | None
    budget_pattern: dict[str, float]
    bias: Literal["none", "all", "with_norms"]
    token_keep_rate: float | None
    task_type: Any
    base_model_name_or_path: str | None


SHOWN = (
    *("importance", "order", "granularity", "bias", "budget", "per_neuron", "budget_pattern"),
    "token_keep_rate",
)
"""Fields of the config that a card shows."""


@dataclass(frozen=True)
class SavedAdapter:
    """What the config of an adapter does not say about it: what is known only when it is saved.

    Attributes:
        record: what saving records.
        base_parameters: number of parameters of the base model without its output head; None if it is unknown.
        evaluation: what a Trainer has measured; None if it has measured nothing.
    """

    record: AdapterRecord
    base_parameters: int | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that a card says.

    Attributes:
        settings: what the config asks for, by field.
        method: one line on how the entries were chosen.
        calibration: the record of how they were chosen, as plain data; None if there is none.
        modules: number of modules with an entry or a bias delta.
        weights: number of weights in these modules.
        entries: number of selected weights.
        biases: number of bias deltas, without those that are left out; None if the file does not tell.
        base_parameters: number of parameters of the base model without its output head; None if it is unknown.
        whole: shapes of the tensors that are trained and saved whole, by name.
        file: name of the adapter's file.
        bytes: size of the file.
        format_version: of the file.
        base_model: name or path of the base model, None if it has none.
        base_class: class of transformers that loads it, None if it is not one of transformers.
        task: the Hub's name of what the model does.
        fingerprint: of the base weights, None if it was not taken.
        evaluation: what was measured, None if nothing was.
        picture: name of a picture of the selection beside the card, None if there is none.
        location: what to load the adapter from, a folder or a repository.
        subfolder: where it lies in there, None for right there.
        token_blocks: indices of the blocks that select tokens.
    """

    settings: Mapping[str, Any]
    method: str
    calibration: Mapping[str, Any] | None
    modules: int
    weights: int
    entries: int
    biases: int | None
    base_parameters: int | None
    whole: Mapping[str, tuple[int, ...]]
    file: str
    bytes: int
    format_version: int
    base_model: str | None = None
    base_class: str | None = None
    task: str = "other"
    fingerprint: Mapping[str, str] | None = None
    evaluation: Evaluation | None = None
    picture: str | None = None
    location: str = "path/or/name/of/this/adapter"
    subfolder: str | None = None
    token_blocks: tuple[int, ...] = ()

    @property
    def labels(self) -> int | None:
        """Number of labels of a classifier whose head is one matrix; of several one cannot tell which is the last."""
        matrices = [shape for shape in self.whole.values() if len(shape) == 2]
        return matrices[0][0] if self.task.endswith("-classification") and len(matrices) == 1 else None


def read_facts(
    folder: Path, config: CardSettings, saved: SavedAdapter, base: Mapping[str, str] | None, **more: Any
) -> Facts:
    """Return the facts about an adapter that has been saved.

    Args:
        folder: folder with the adapter's file.
        config: what the user asked for.
        saved: what was saved.
        base: class of the base model and its module, under PEFT's names `base_model_class` and `parent_library`. Not
            needed if the config has a `task_type`.
        more: `picture`, `location` and `subfolder` of `Facts`.

    Raises:
        ValueError: there is no readable file of an adapter.
    """
    record = saved.record
    biases: int | None = None
    whole: dict[str, tuple[int, ...]] = {}
    path = folder / WEIGHTS
    if path.exists():
        biases, whole = _read_sizes(path, set(record.whole_tensors or ()))
    else:
        path = folder / PICKLED_WEIGHTS
        if not path.exists():
            raise ValueError(f"{folder} holds no {WEIGHTS}, expected a saved adapter.")
    base_class, task = base_of(config, base)
    return Facts(
        settings={key: getattr(config, key) for key in SHOWN},
        token_blocks=record.selecting_blocks or (),
        method=describe(config, AdapterState(selected=True, calibration=record.calibration)),
        calibration=None if record.calibration is None else record.calibration.to_json(),
        modules=len(record.allocation),
        weights=sum(sizes.neurons * sizes.inputs for sizes in record.allocation.values()),
        entries=sum(sizes.entries for sizes in record.allocation.values()),
        biases=biases,
        base_parameters=saved.base_parameters,
        whole=whole,
        file=path.name,
        bytes=path.stat().st_size,
        format_version=FORMAT_VERSION,
        base_model=config.base_model_name_or_path or None,
        base_class=base_class,
        task=task,
        fingerprint=record.base_fingerprint,
        evaluation=saved.evaluation,
        **more,
    )


def base_of(config: CardSettings, base: Mapping[str, str] | None) -> tuple[str | None, str]:
    """Return the class of transformers that loads a base model, None if there is none, and the name of its task."""
    if config.task_type is not None:
        return TASKS[config.task_type]
    if not base or not base["parent_library"].startswith("transformers."):
        return None, "other"
    name, known = base["base_model_class"], cast(dict[str, dict[str, Any]], TASK_MAPPING)
    return name, next((task for task, classes in known.items() if name in _names(classes)), "other")


def _names(classes: Mapping[str, Any]) -> list[str]:
    """Return the names of all classes of a task; transformers' table holds one or several for each type of model."""
    return [name for held in classes.values() for name in ([held] if isinstance(held, str) else held)]


def _read_sizes(path: Path, whole: set[str]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of bias deltas, and the shapes of the tensors named in `whole`; reads no other tensors."""
    biases, shapes = 0, {}
    with open_safetensors(path) as file:
        for key in sorted(file.keys()):
            name = key.removeprefix(PEFT_PREFIX)
            if name.endswith(".fps_bias"):
                bias = file.get_tensor(key)
                biases += 0 if is_left_out(bias) else bias.numel()
            elif name in whole:
                shapes[name] = tuple(file.get_slice(key).get_shape())
    return biases, shapes
