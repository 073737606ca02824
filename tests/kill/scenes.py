"""What a process does when it is killed, and what must be found on disk afterwards."""

import json
import os
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from peft_fps import FPSCallback, FPSConfig, Selection
from peft_fps.checkpoint import last_complete_checkpoint, save_adapter
from peft_fps.selection.entries import ModuleEntries
from tests.support.helpers import _seeded, bits, layers_of, normal


WIDTH, ENTRIES = 768, 256
"""Wide enough that a good part of the time goes into writing."""


class Wrong(AssertionError):
    """A kill has left on disk what it must not."""


@dataclass
class Tally:
    """What was found after the kills."""

    found: Counter[str] = field(default_factory=Counter)


def kill(work: Callable[[Callable[[int], None]], None], delay: float) -> list[int]:
    """Run `work` in another process, kill it `delay` seconds after it has begun; returns what it has reported.

    `work` is given the function to report with; it reports once when it begins. It may end by itself.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            work(lambda number: os.write(writer, f"{number}\n".encode()) and None)
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"failed {error!r}\n".encode())
            os._exit(1)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 300)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(reader) as pipe:
        reports = pipe.read().split("\n")[:-1] if ready else []
    if not reports or any(line.startswith("failed") for line in reports):
        raise Wrong(f"the process failed before it was killed: {reports[-1:]}")
    return [int(line) for line in reports]


# --- adapters -------------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    return _seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)))


def columns_of(number: int) -> Tensor:
    """The columns of version `number` of an adapter, the same for every neuron."""
    return torch.arange(ENTRIES) + number % (WIDTH - ENTRIES)


def set_version(model: PeftModel, number: int) -> None:
    """Let entries, values and the config's record all say `number`."""
    entries = ModuleEntries(columns_of(number).repeat(WIDTH), torch.full((WIDTH,), ENTRIES), WIDTH)
    Selection({"0": entries}, {"calibration": {"importance": "random", "seed": number}}).apply(
        model, discard_values=True
    )
    layers_of(model)["0"].fps_values["default"].data.fill_(number)


def version_in(folder: Path) -> int:
    """The version on disk; a mixture is `Wrong`, an adapter that does not load a ValueError."""
    model = PeftModel.from_pretrained(wide(), folder)
    layer = layers_of(model)["0"]
    values = layer.fps_values["default"].unique().tolist()
    record = layer.fps_state["default"].calibration
    number = int(values[0])
    whole = values == [number] and record is not None and record.seed == number
    if not whole or not torch.equal(layer.fps_columns["default"].long(), columns_of(number).repeat(WIDTH)):
        raise Wrong(f"a mixture loads: values {values[:3]}, record {record}")
    return number


def save_in_turn(
    save: Callable[[PeftModel, Path], None], folder: Path, first: int, report: Callable[[int], None]
) -> None:
    """Save one version after the other, and report each."""
    model = get_peft_model(wide(), FPSConfig(per_neuron=ENTRIES, importance="magnitude"))
    report(first - 1)
    for number in range(first, first + 10_000):
        set_version(model, number)
        save(model, folder)
        report(number)


def pretrained(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)


def adapters(folder: Path, kills: int, chance: Random, safe: bool) -> Tally:
    """Kill a process that saves adapters over each other; with `safe`, never may one be lost."""
    tally, target, last = Tally(), folder / "adapter", 0
    save = save_adapter if safe else pretrained
    model = get_peft_model(wide(), FPSConfig(per_neuron=ENTRIES, importance="magnitude"))
    set_version(model, 0)
    save(model, target)
    for _ in range(kills):
        reports = kill(partial(save_in_turn, save, target, last + 1), chance.uniform(0, 0.4))
        try:
            number = version_in(target)
        except ValueError as error:
            if safe:
                raise Wrong(f"the adapter is lost: {error}") from error
            tally.found["refused, old adapter lost"] += 1
            last = reports[-1] + 1
            set_version(model, last)
            save(model, target)
            continue
        if number not in (reports[-1], reports[-1] + 1):
            raise Wrong(f"version {number} is on disk, expected {reports[-1]} or the next")
        tally.found["old" if number == reports[-1] else "new"] += 1
        last = number
    if safe:  # nothing but what one kill leaves, and the next save clears that away
        save(model, target)
        left = sorted(path.name for path in folder.iterdir())
        if left != ["adapter"]:
            raise Wrong(f"left behind: {left}")
    return tally


# --- selections -----------------------------------------------------------------------------------------------------


def selection_of(number: int) -> Selection:
    counts = torch.full((WIDTH,), ENTRIES)
    return Selection({"0": ModuleEntries(columns_of(number).repeat(WIDTH), counts, WIDTH)}, {"seed": number})


def save_selections(path: Path, first: int, report: Callable[[int], None]) -> None:
    report(first - 1)
    for number in range(first, first + 100_000):
        selection_of(number).save(path)
        report(number)


def selections(folder: Path, kills: int, chance: Random) -> Tally:
    """Kill a process that saves selections over each other."""
    tally, path, last = Tally(), folder / "selection.safetensors", 0
    selection_of(0).save(path)
    for _ in range(kills):
        reports = kill(partial(save_selections, path, last + 1), chance.uniform(0, 0.2))
        found = Selection.load(path)
        number = found.method["seed"]
        if found != selection_of(number) or number not in (reports[-1], reports[-1] + 1):
            raise Wrong(f"selection {number} is on disk, expected {reports[-1]} or the next")
        tally.found["old" if number == reports[-1] else "new"] += 1
        last = number
    return tally


# --- calibration ----------------------------------------------------------------------------------------------------


def calibrated(number: int) -> PeftModel:
    """An adapter that was calibrated on the data of that number."""
    model = get_peft_model(wide(), FPSConfig(per_neuron=ENTRIES))
    calibrate(model, number)
    return model


def calibrate(model: PeftModel, number: int) -> None:
    model.calibrate([normal(8, WIDTH, seed=10 * number + i) for i in range(3)], progress=False, discard_values=True)


def calibrate_in_turn(folder: Path, first: int, report: Callable[[int], None]) -> None:
    model = get_peft_model(wide(), FPSConfig(per_neuron=ENTRIES))
    report(first - 1)
    for number in range(first, first + 10_000):
        calibrate(model, number)
        save_adapter(model, folder)
        report(number)


def calibrations(folder: Path, kills: int, chance: Random) -> Tally:
    """Kill a process that calibrates and saves over and over."""
    tally, target, last = Tally(), folder / "adapter", 0
    save_adapter(calibrated(0), target)
    for _ in range(kills):
        reports = kill(partial(calibrate_in_turn, target, last + 1), chance.uniform(0, 1.0))
        found = Selection.from_adapter(target)
        matching = [n for n in (reports[-1], reports[-1] + 1) if Selection.of(calibrated(n)) == found]
        if not matching:
            raise Wrong(f"the adapter on disk is neither of calibration {reports[-1]} nor of the next")
        tally.found["old" if matching[0] == reports[-1] else "new"] += 1
        last = matching[0]
    return tally


# --- training -------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """With dropout, so that the result depends on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(24, 48), nn.Linear(48, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.dropout(F.gelu(self.first(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, report: Callable[[int], None] | None = None) -> dict[str, bytes]:
    """Train, from the last complete checkpoint if there is one; returns the adapter's tensors."""
    torch.manual_seed(3)
    model = get_peft_model(_seeded(Regression), FPSConfig(per_neuron=4, target_modules=["first", "last"]))
    examples: Any = [{"x": normal(24, seed=i), "labels": i % 4} for i in range(40)]
    options = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=24, save_steps=3, learning_rate=1e-2, disable_tqdm=True,
        report_to=[], seed=5, use_cpu=True, logging_strategy="no", save_total_limit=3,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=examples, callbacks=[FPSCallback(progress=False)])
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(folder)
    if report is not None:
        report(0 if checkpoint is None else int(checkpoint.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=checkpoint)
    save_adapter(model, folder / "result")
    return {name: bits(tensor) for name, tensor in model.state_dict().items() if "fps_" in name}


def train_and_report(folder: Path, report: Callable[[int], None]) -> None:
    train(folder, report)
    report(24)


def trainings(folder: Path, kills: int, chance: Random, at_once: int = 5) -> Tally:
    """Kill training, and resume it until it ends: the result is that of an uninterrupted run."""
    tally = Tally()
    begun = time.monotonic()
    expected = train(folder / "uninterrupted")
    duration = time.monotonic() - begun
    while kills:
        run, steps = folder / "run", [0]
        for _ in range(min(at_once, kills)):
            reports = kill(partial(train_and_report, run), chance.uniform(0, duration))
            tally.found["finished before the kill" if reports[-1] == 24 else f"from step {reports[0]}"] += 1
            if reports[0] < steps[-1]:
                raise Wrong(f"resumed from step {reports[0]} after step {steps[-1]}")
            steps.append(reports[0])
            kills -= 1
            incomplete = [path.name for path in run.glob("checkpoint-*") if not (path / "trainer_state.json").exists()]
            tally.found["half a checkpoint left"] += bool(incomplete)
        if train(run) != expected:
            raise Wrong(f"the result differs from that of an uninterrupted run, resumed at the steps {steps}")
        tally.found["ended with the expected bits"] += 1
        shutil.rmtree(run)
    return tally


# --- all of it ------------------------------------------------------------------------------------------------------

SCENES: dict[str, tuple[float, Callable[[Path, int, Random], Tally]]] = {
    "save_adapter": (0.3, partial(adapters, safe=True)),
    "save_pretrained": (0.2, partial(adapters, safe=False)),
    "Selection.save": (0.15, selections),
    "calibrate": (0.1, calibrations),
    "Trainer": (0.25, trainings),
}
"""Share of the kills, and the scene; each takes a folder, a number of kills and the source of chance."""


def play(folder: Path, kills: int, seed: int) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Play all scenes; returns what was found by scene, and what was wrong."""
    found, wrong = {}, []
    for name, (share, scene) in SCENES.items():
        own = folder / name
        own.mkdir()
        try:
            tally = scene(own, max(1, round(share * kills)), Random(f"{seed} {name}"))
            found[name] = dict(sorted(tally.found.items()))
        except (Wrong, ValueError, OSError, json.JSONDecodeError) as error:
            wrong.append(f"{name}: {error!r}")
    return found, wrong
