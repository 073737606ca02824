"""python -m tests.street: the life of an adapter on all models under many configurations; 1 if anything is wrong.

A line for each model and configuration that goes wrong, and counts at the end. Libraries that are not installed are
named and left out.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.street.lifecycle import Case, run


LIBRARIES = ("transformers", "timm", "torchvision")

OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"granularity": granularity, "bias": bias, "importance": importance}
    for granularity, bias, importance in product(
        ("neuron", "layer", "model"), ("none", "all", "with_norms"), ("activation", "gradient")
    )
)


def cases(libraries: list[str]) -> Iterator[tuple[str, Case]]:
    for library in libraries:
        try:
            import_module(library)
        except (ImportError, RuntimeError) as error:
            sys.stdout.write(f"{library}: left out, since it cannot be imported ({error})\n")
            continue
        for name, case in import_module(f"tests.street.{library}_models").MODELS.items():
            yield f"{library} {name}", case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.street", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="only this one")
    parser.add_argument("--match", default="", help="only models with this in their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = failed = 0
    for name, case in cases(options.library or list(LIBRARIES)):
        if options.match not in name:
            continue
        for changes in OPTIONS:
            done += 1
            with TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    run(replace(case, options={**(case.options or {}), **changes}), Path(folder))
                except Exception as error:  # whatever goes wrong with a model is what is looked for
                    failed += 1
                    sys.stdout.write(f"{name}, {changes}: {type(error).__name__}: {str(error)[:300]}\n")
        sys.stdout.write(f"{name}: done; {done} runs, {failed} failed\n")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
