"""One damaged file for every seed."""

import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.judge import CONFIG, DOORS, SELECTION, WEIGHTS, Judge, copy_of, without_digest, write_intact
from tests.fuzz.mutations import JSON, SAFETENSORS


KINDS = ("weights", "weights", "config", "config", "both", "selection", "selection of adapter")


@dataclass
class Result:
    """Outcomes of many files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def judge_file(judge: Judge, seed: str) -> str:
    """Damage a file as the seed says, and load it; returns kind and outcome."""
    chance = Random(seed)
    kind = chance.choice(KINDS)
    with copy_of(judge.intact) as folder:
        if chance.random() < 0.8:
            without_digest(folder)
        damages = {
            WEIGHTS: SAFETENSORS if kind in ("weights", "both", "selection of adapter") else (),
            CONFIG: JSON if kind in ("config", "both", "selection of adapter") else (),
            SELECTION: SAFETENSORS if kind == "selection" else (),
        }
        for name, known in damages.items():
            if known:
                path = folder / name
                path.write_bytes(chance.choice(known)(path.read_bytes(), chance))
        if kind == "selection":
            return f"{kind}: {judge.selection(folder / SELECTION)}"
        if kind == "selection of adapter":
            return f"{kind}: {judge.selection_of_adapter(folder)}"
        return f"{kind}: {judge.adapter(folder, chance.choice(sorted(DOORS)))}"


def judge_files(first: int, count: int, seed: int) -> Result:
    """Judge the files `first` to `first + count` of a seed."""
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        judge = Judge(Path(name))
        write_intact(judge.intact)
        for number in range(first, first + count):
            try:
                result.outcomes[judge_file(judge, f"{seed}:{number}")] += 1
            except Exception:
                judge.ready.clear()
                result.outcomes["violation"] += 1
                result.violations.append(f"seed {seed}, file {number}\n{traceback.format_exc()}")
    return result
