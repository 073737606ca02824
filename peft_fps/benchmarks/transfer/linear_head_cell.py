"""The cell of a linear head, fitted to the frozen model's features."""

import time

import torch

from peft_fps.benchmarks.transfer.cells import Cell, Record, Setting
from peft_fps.benchmarks.transfer.tasks import PARTS, Task
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.vision.classifiers import classifier
from peft_fps.vision.linear_head import fit_linear_head
from peft_fps.vision.prediction import Predictor


def run_linear_head(cell: Cell, setting: Setting, task: Task) -> Record:
    """Fit a logistic regression on the frozen features, which are the same in every epoch and computed once."""
    base = task.load_base(cell.seed)
    head, start = classifier(base), time.perf_counter()
    predictor = Predictor(torch.device("cpu"), setting.batch_size, task.collator(base), workers=0)
    data = {
        part: (predictor.features(base, head, task.splits[part], part), task.splits[part].labels) for part in PARTS
    }
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
