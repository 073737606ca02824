"""The output head fitted to the frozen model's features: a cell of its own, and a start for others."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_fps.benchmarks.transfer.cells import Cell, Record, Setting
from peft_fps.benchmarks.transfer.tasks import PARTS, Task
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.vision.classifiers import classifier
from peft_fps.vision.linear_head import fit_linear_head
from peft_fps.vision.prediction import Predictor


def _features(
    base: PreTrainedModel, setting: Setting, task: Task, parts: tuple[str, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the inputs of the output head, `(images, features)`, and the labels, `(images,)`, by split."""
    predictor = Predictor(torch.device("cpu"), setting.batch_size, task.collator(base), workers=0)
    splits = {part: task.splits[part] for part in parts}
    return {
        part: (predictor.features(base, classifier(base), split, part), split.labels) for part, split in splits.items()
    }


def start_from_fitted_head(base: PreTrainedModel, setting: Setting, task: Task) -> float:
    """Give the output head the weights of a linear head that is fitted to its inputs; returns the seconds it took."""
    start, head = time.perf_counter(), classifier(base)
    data = _features(base, setting, task, ("train", "validation"))
    with torch.no_grad():
        for parameter, value in zip(
            (head.weight, head.bias), fit_linear_head(data["train"], data["validation"]).as_layer(), strict=True
        ):
            parameter.copy_(value)
    return time.perf_counter() - start


def run_linear_head(cell: Cell, setting: Setting, task: Task) -> Record:
    """Fit a logistic regression on the frozen features, which are the same in every epoch and computed once."""
    base = task.load_base(cell.seed)
    head, start = classifier(base), time.perf_counter()
    data = _features(base, setting, task, PARTS)
    fitted = fit_linear_head(data["train"], data["validation"])
    seconds = {"select": 0.0, "train": time.perf_counter() - start}
    return Record(
        cell=cell,
        group=task.group,
        validation=fitted.accuracy(*data["validation"]),
        test=fitted.accuracy(*data["test"]),
        trained=0,
        head=sum(p.numel() for p in head.parameters()),
        backbone=count_base_parameters(base),
        seconds=seconds,
        bytes={"select": 0, "train": sum(f.numel() * f.element_size() for f, _ in data.values()), "adapter": 0},
        loss=None,
        operations=0.0,
    )
