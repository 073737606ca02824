"""python -m tests.fuzz --files 10000 --seed 0: damage files, load them, count what came of it; 1 if anything is wrong.

Each piece runs in a process of its own with bounded memory, so that a crash or a huge allocation is noticed as well.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path


PIECE = 250
MEMORY = 1 << 30
"""Bytes of address space that a piece may take beyond what the libraries have taken."""


def child(first: int, count: int, seed: int) -> None:
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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.first, options.files, options.seed)
        return 0
    outcomes: Counter[str] = Counter()
    violations: list[str] = []
    for first in range(options.first, options.first + options.files, PIECE):
        count = min(PIECE, options.first + options.files - first)
        command = [sys.executable, "-m", "tests.fuzz", "--child", f"--first={first}", f"--files={count}"]
        try:
            run = subprocess.run(
                [*command, f"--seed={options.seed}"], capture_output=True, text=True, timeout=40 * PIECE
            )
            found = json.loads(run.stdout) if run.returncode == 0 else None
        except subprocess.TimeoutExpired as error:
            run, found = error, None
        if found is None:
            outcomes["crash"] += 1
            violations.append(f"files {first} to {first + count} of seed {options.seed} crashed: {run}")
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
