"""Finished cells in a file, one JSON object per line, so that a stopped run goes on."""

import json
import os
from pathlib import Path
from typing import Any

from peft_fps.benchmarks.transfer.cells import Record, Setting
from peft_fps.benchmarks.transfer.plan import Rates


class Store:
    """The cells of one table; the first line holds the setting.

    Args:
        path: the file; made with the first cell.
        setting: of the table that is to be run.
        facts: the machine and versions, kept in the first line of a new file.
        rates: learning rates chosen in another run, kept there too. Default: none, or those that the file holds.

    Raises:
        ValueError: the file holds cells of another setting or at other rates, or is no such file.
    """

    def __init__(self, path: Path, setting: Setting, facts: dict[str, Any], rates: Rates | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        self.rates = dict(rates or {})
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            of_another = {"rates": [[*key, rate] for key, rate in self.rates.items()]} if self.rates else {}
            self._append({"setting": setting.comparable(), **facts, **of_another})
            return
        header, self.records = read(path)
        found, wanted = {"attention": "sdpa"} | header["setting"], setting.comparable()  # older files do not say it
        if found != wanted:
            raise ValueError(
                f"{path} holds cells of the setting {found}, expected {wanted}. Choose another --output, or the same "
                "options."
            )
        self.rates = taken_rates(header)
        if rates is not None and rates != self.rates:
            raise ValueError(
                f"{path} holds cells at other learning rates than --rates-of has chosen, expected the same ones. "
                "Choose another --output, or leave --rates-of out."
            )
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):  # a line that a kill has cut short
            os.truncate(path, whole.rfind(b"\n") + 1)

    def add(self, record: Record) -> None:
        """Keep a finished cell."""
        self._append(record.to_dict())
        self.records.append(record)

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def taken_rates(header: dict[str, Any]) -> dict[tuple[str, str], float | None]:
    """Return the learning rates that a file's first line says were taken from another run, by method and task."""
    return {(method, task): rate for method, task, rate in header.get("rates", [])}


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the first line and the cells of a file; a last line that was cut short is left out.

    Raises:
        ValueError: the file is not of this form.
    """
    try:
        header, *cells = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if not isinstance(header, dict) or "setting" not in header:
            raise ValueError("no setting in the first line")
        return header, [Record.from_dict(cell) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no cells of a transfer benchmark: {error!r}. Choose another --output."
        ) from error
