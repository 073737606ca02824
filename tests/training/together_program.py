"""Run by two processes: calibrations in which one of them has no data, or fails, and write down how each has ended."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from peft_fps import FPSConfig, Selection
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import bits, image_batches, images, snapshot, tiny_vit


IMPORTANCES = ("activation", "gradient")
SHARED = ("activation", "gradient", "fisher", "sensitivity")


def labelled(count: int, seed: int) -> list[dict[str, Tensor]]:
    return [batch | {"labels": torch.tensor([0, 1, 2, 3])} for batch in image_batches(count, seed=seed)]


def of_both(folder: Path, name: str) -> list[Any]:
    """What the first and the second process have written down under a name."""
    return [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(2)]


def own(rank: int) -> list[dict[str, Tensor]]:
    """Three batches for the first process, one for the second."""
    return labelled(3, 0) if rank == 0 else labelled(1, 50)


def model_for(importance: str) -> Any:
    return get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance=importance, modules_to_save=[]))


def failing(module: nn.Module, calls: int) -> None:
    """Let a module fail after so many calls."""
    left = [calls]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the model has had enough")

    module.register_forward_pre_hook(fail)


def broken(batches: list[Any]) -> Iterator[Any]:
    yield batches[0]
    raise OSError("the disk is gone")


def with_nan(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    batches[-1]["pixel_values"][0, 0, 0, 0] = torch.nan
    return batches


def nothing(model: Any) -> None:
    return None


def trained(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "fps_values" in name).data.fill_(0.5)


def dispatched(rank: int) -> Any:
    """The first process reads for both."""
    return prepared([{name: tensor[0] for name, tensor in batch.items()} for batch in labelled(8, 7)], rank, True)


class Breaking(Dataset[dict[str, Tensor]]):
    """Cannot be read from the fifth example on, or not at all."""

    def __init__(self, readable: int) -> None:
        self._readable = readable

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self._readable:
            raise OSError("the disk is gone")
        return {"pixel_values": images(1, seed=index)[0], "labels": torch.tensor(index % 5)}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Examples without a length."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (Breaking(16)[index] for index in range(self._count))


def prepared(data: Any, rank: int, dispatch: bool | None, **options: Any) -> Any:
    """Batches of two, as accelerate shares them out."""
    return prepare_data_loader(
        DataLoader(data, batch_size=2, **options),
        torch.device("cpu"),
        num_processes=2,
        process_index=rank,
        put_on_device=True,
        dispatch_batches=dispatch,
    )


def unlike(rank: int) -> Any:
    """The first process reads for both, and cannot join the batches that it has read."""
    batches = iter([torch.ones(2, 3, size, size) for size in (16, 16, 8, 16)])
    return prepared(
        Breaking(16), rank, True, collate_fn=lambda _: {"pixel_values": next(batches), "labels": torch.tensor([0, 1])}
    )


Case = tuple[Callable[[int], Any], int, Callable[[Any], None]]
"""From a rank to its data; the process whose model is prepared, and how."""

CASES: dict[str, Case] = {
    "one without data": (lambda rank: own(0) if rank == 0 else [], 0, nothing),
    "first without data": (lambda rank: own(0) if rank == 1 else iter([]), 0, nothing),
    "none has data": (lambda rank: [], 0, nothing),
    "no data": (lambda rank: own(0) if rank == 0 else None, 0, nothing),
    "wrong data": (lambda rank: own(0) if rank == 1 else 5, 0, nothing),
    "wrong batch": (lambda rank: own(0) if rank == 0 else [*own(0)[:1], "text"], 0, nothing),
    "not a number": (lambda rank: own(rank) if rank == 0 else with_nan(own(1)), 0, nothing),
    "data ends badly": (lambda rank: broken(own(0)) if rank == 0 else own(1), 0, nothing),
    "model fails": (own, 0, lambda model: failing(model.base_model.model.vit, 1)),
    "model fails at once": (own, 1, lambda model: failing(model.base_model.model.vit, 0)),
    "trained already": (own, 1, trained),
    "model fails where one reads for all": (dispatched, 1, lambda model: failing(model.base_model.model.vit, 1)),
    "reader fails where it reads for all": (dispatched, 0, lambda model: failing(model.base_model.model.vit, 0)),
    "reader cannot read": (lambda rank: prepared(Breaking(5), rank, True), 0, nothing),
    "reader cannot read anything": (lambda rank: prepared(Breaking(0), rank, True), 0, nothing),
    "reader cannot join": (unlike, 0, nothing),
    "all is well": (own, 0, nothing),
}


def run(folder: Path, rank: int) -> None:
    ended: dict[str, Any] = {}
    for importance in IMPORTANCES:
        for name, (data, who, prepare) in CASES.items():
            model = model_for(importance)
            if rank == who:
                prepare(model)
            before = snapshot(model)
            try:
                model.calibrate(data(rank), progress=False)
            except Exception as error:
                assert snapshot(model) == before, name
                ended[f"{importance}: {name}"] = f"{type(error).__name__}: {error}"
                continue
            found = Selection.of(model)
            columns = torch.cat([module.columns.int() for module in found.modules.values()])
            calibration = found.method["calibration"]
            ended[f"{importance}: {name}"] = [calibration["batches"], calibration["examples"], bits(columns).hex()]
    if rank == 0:  # what needs no data is no matter of several processes
        model_for("magnitude").calibrate()
    (folder / f"{rank}.json").write_text(json.dumps(ended))


def run_shares(folder: Path, rank: int) -> None:
    """Calibrate on every second image, by every importance, and write down what was selected and reported."""
    pixels, labels = images(8), torch.arange(8) % 5
    mine = [{"pixel_values": pixels[rank::2], "labels": labels[rank::2]}]
    found: dict[str, Any] = {}
    for importance in SHARED:
        model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance=importance))
        report = model.calibrate(mine, progress=False)
        found[importance] = {"columns": selection_of(model), "report": str(report)}
    try:
        model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance="gradient"))
        model.calibrate(mine, progress=False, accumulators="streaming")
    except ValueError as error:
        found["refusal"] = str(error)
    (folder / f"shares{rank}.json").write_text(json.dumps(found))


LOADERS: dict[str, Callable[[int], Any]] = {
    "complete": lambda rank: prepared(Subset(Breaking(16), range(8)), rank, False),
    "uneven": lambda rank: prepared(Subset(Breaking(16), range(7)), rank, False),
    "fewer batches than processes": lambda rank: prepared(Subset(Breaking(16), range(1)), rank, False),
    "dispatched": lambda rank: prepared(Subset(Breaking(16), range(7)), rank, True),
    "dispatched, one batch over": lambda rank: prepared(Subset(Breaking(16), range(6)), rank, True),
    "stream": lambda rank: prepared(Stream(7), rank, None),
    "own streams": lambda rank: DataLoader(Stream(7) if rank else Stream(0), batch_size=2),
}
EXAMPLES = {"complete": 8, "fewer batches than processes": 1, "dispatched, one batch over": 6}
"""Numbers of examples of these loaders. Of the others they are 7."""


def run_loaders(folder: Path, rank: int) -> None:
    """Calibrate on what loaders give to each process, and write down what was selected."""
    found: dict[str, Any] = {}
    for name, load in LOADERS.items():
        model = model_for("activation")
        model.calibrate(load(rank), progress=False)
        examples = Selection.of(model).method["calibration"]["examples"]
        found[name] = {"columns": selection_of(model), "examples": examples}
    (folder / f"loaders{rank}.json").write_text(json.dumps(found))


def vanish(folder: Path) -> None:
    """Let a process be gone without a word in the midst of a calibration."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model, rank = model_for("activation"), dist.get_rank()
    if rank == 1:
        model.base_model.model.vit.register_forward_pre_hook(lambda *_: os._exit(0))
    try:
        model.calibrate(own(rank), progress=False)
    except RuntimeError as error:
        (folder / "gone.txt").write_text(str(error))
    os._exit(0)  # without a farewell to the group, whose other process is gone


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    PartialState(cpu=True)  # of accelerate, which finds the group
    run(folder, dist.get_rank())
    run_shares(folder, dist.get_rank())
    run_loaders(folder, dist.get_rank())
    dist.destroy_process_group()
