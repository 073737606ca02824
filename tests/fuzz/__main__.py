"""python -m tests.fuzz --files 10000 --seed 0: damage files, load them, count what came of it; 1 if anything is wrong.

Each piece runs in a process of its own with bounded memory, so that a crash or a huge allocation is noticed as well.
"""

import argparse
import json
import resource
import sys
from collections import Counter
from pathlib import Path

from tests.support.forked import run_program


PIECE = 250
MEMORY = 1 << 30
"""Bytes of address space that a piece may take beyond what the libraries have taken."""


def judge_piece(first: int, count: int, seed: int) -> None:
    import torch

    from tests.fuzz.files import judge_files

    torch.set_num_threads(1)
    judge_files(0, 20, -1)  # everything is imported and warm before memory is bounded
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    result = judge_files(first, count, seed)
    sys.stdout.write(json.dumps({"outcomes": result.outcomes, "violations": result.violations}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to repeat one")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    violations: list[str] = []
    for first in range(options.first, options.first + options.files, PIECE):
        count = min(PIECE, options.first + options.files - first)
        program = f"from tests.fuzz.__main__ import judge_piece; judge_piece({first}, {count}, {options.seed})"
        try:
            found = json.loads(run_program(program, timeout=40 * PIECE)[0])
        except AssertionError as error:
            outcomes["crash"] += 1
            violations.append(f"files {first} to {first + count} of seed {options.seed} crashed: {error}")
        else:
            outcomes.update(found["outcomes"])
            violations += found["violations"]
        sys.stdout.write(f"seed {options.seed}, {first + count} files, {len(violations)} violations\n")
        sys.stdout.flush()
    for text in violations:
        sys.stdout.write(f"{text}\n")
    for outcome, number in sorted(outcomes.items()):
        sys.stdout.write(f"{number:7,}  {outcome}\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
