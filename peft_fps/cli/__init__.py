"""The `peft-fps` command: a module for each of its commands, and `app`, which puts them together.

| module | subject |
|---|---|
| `app` | the commands, put together |
| `finetune`, `select` | fine-tune a model, and choose entries without training |
| `inspect`, `compare`, `merge` | look at a saved adapter, compare two, merge one into its base model |
| `reproduce` | the papers' recipes |
| `benchmark_cost`, `benchmark_transfer`, `benchmark_overlap`, `benchmark_derive` | the benchmarks |
| `option_fields` | options made of the fields of a dataclass |
| `terminal` | what commands write: tables, JSON, log records, errors |
"""

import sys
from importlib.util import find_spec


REQUIRED = ("typer", "rich", "datasets", "PIL", "sklearn")
"""Modules that the command needs beyond the library's own dependencies: the extra `cli`."""


def main() -> None:
    """Run the command; the entry point of `peft-fps`."""
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"peft-fps: {', '.join(missing)} not installed, install peft-fps[cli]\n")
        raise SystemExit(1)
    from peft_fps.cli.app import app

    app()
