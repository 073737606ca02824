"""What a model card says about an adapter, read from its config and the header of its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.modelcard import TASK_MAPPING

from peft_fps.adapters import AdapterState
from peft_fps.card.evaluation import Evaluation
from peft_fps.checkpoint import PEFT_PREFIX, PICKLED_WEIGHTS, WEIGHTS, open_safetensors
from peft_fps.config import FPSConfig
from peft_fps.describing import describe


TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
"""PEFT's task types: the class of transformers that loads a base model, and the Hub's name of the task."""


@dataclass(frozen=True)
class Facts:
    """All that a card says.

    Attributes:
        settings: what the config asks for, by field.
        method: one line on how the entries were chosen.
        calibration: the record of it, None if there is none.
        modules: number of modules with an entry or a bias delta.
        weights: weights that there were to select from.
        entries: selected weights.
        biases: bias deltas, None if the file does not tell.
        base_parameters: of the base model without its output head, None if unknown.
        whole: shapes of the tensors that are trained and saved whole, by name.
        file: name of the adapter's file.
        bytes: its size.
        format_version: of the file.
        base_model: name or path of the base model, None if it has none.
        base_class: class of transformers that loads it, None if it is not one of transformers.
        task: the Hub's name of what the model does.
        fingerprint: of the base weights, None if it was not taken.
        evaluation: what was measured, None if nothing was.
        picture: name of a picture of the selection beside the card, None if there is none.
        location: what to load the adapter from, a folder or a repository.
        subfolder: where it lies in there, None for right there.
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

    @property
    def labels(self) -> int | None:
        """Number of labels of a classifier whose head is one matrix; of several one cannot tell which is the last."""
        matrices = [shape for shape in self.whole.values() if len(shape) == 2]
        return matrices[0][0] if self.task.endswith("-classification") and len(matrices) == 1 else None


def read_facts(folder: Path, config: FPSConfig, base: Mapping[str, str] | None, **more: Any) -> Facts:
    """Return the facts about an adapter that has been saved.

    Args:
        folder: with the adapter's file.
        config: as it was saved, with its record of what was.
        base: class of the base model and its module, `base_model_class` and `parent_library` in PEFT's words; not
            needed where `config.task_type` tells it.
        more: `picture`, `location` and `subfolder`, see `Facts`.

    Raises:
        ValueError: there is no readable file of an adapter.
    """
    biases: int | None = None
    whole: dict[str, tuple[int, ...]] = {}
    path = folder / WEIGHTS
    if path.exists():
        biases, whole = _read_header(path, set(config.whole_tensors or ()))
    else:
        path = folder / PICKLED_WEIGHTS
        if not path.exists():
            raise ValueError(f"{folder} holds no {WEIGHTS}, expected a saved adapter.")
    allocation = config.allocation or {}
    base_class, task = base_of(config, base)
    return Facts(
        settings={
            key: getattr(config, key)
            for key in ("importance", "order", "granularity", "bias", "budget", "per_neuron", "budget_pattern")
        },
        method=describe(config, AdapterState(selected=True, calibration=config.calibration)),
        calibration=config.calibration,
        modules=len(allocation),
        weights=sum(sizes["neurons"] * sizes["inputs"] for sizes in allocation.values()),
        entries=sum(sizes["entries"] for sizes in allocation.values()),
        biases=biases,
        base_parameters=config.automatic.get("base_parameters"),
        whole=whole,
        file=path.name,
        bytes=path.stat().st_size,
        format_version=config.format_version,
        base_model=config.base_model_name_or_path or None,
        base_class=base_class,
        task=task,
        fingerprint=config.base_fingerprint,
        evaluation=config.automatic.get("evaluation"),
        **more,
    )


def base_of(config: FPSConfig, base: Mapping[str, str] | None) -> tuple[str | None, str]:
    """Return the class of transformers that loads a base model, None if there is none, and the name of its task."""
    if config.task_type is not None:
        return TASKS[config.task_type]
    if not base or not base["parent_library"].startswith("transformers."):
        return None, "other"
    name, known = base["base_model_class"], cast(dict[str, dict[str, Any]], TASK_MAPPING)
    return name, next((task for task, classes in known.items() if name in _names(classes)), "other")


def _names(classes: Mapping[str, Any]) -> list[str]:
    return [name for held in classes.values() for name in ([held] if isinstance(held, str) else held)]


def _read_header(path: Path, whole: set[str]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of bias deltas, and the shapes of the tensors named in `whole`; reads no tensor."""
    biases, shapes = 0, {}
    with open_safetensors(path) as file:
        for key in sorted(file.keys()):
            name = key.removeprefix(PEFT_PREFIX)
            if name.endswith(".fps_bias"):
                biases += file.get_slice(key).get_shape()[0]
            elif name in whole:
                shapes[name] = tuple(file.get_slice(key).get_shape())
    return biases, shapes
