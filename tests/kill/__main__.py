"""python -m tests.kill --kills 200 --seed 0: kill processes that save; 1 if anything is lost or mixed up."""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import torch
    from huggingface_hub.utils import logging

    from tests.kill.scenes import play

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # of model cards without metadata
    with tempfile.TemporaryDirectory() as folder:
        found, wrong = play(Path(folder), options.kills, options.seed)
    for name, counts in found.items():
        sys.stdout.write(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}\n")
    for text in wrong:
        sys.stdout.write(f"WRONG {text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
