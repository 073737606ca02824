"""How an adapter's entries were chosen: as a record, and on one line.

`calibrate` writes a `CalibrationRecord`, and `Selection.apply` passes on that of its selection. Entries that were
chosen without data have none; for them the config says how they were chosen.
"""

import json
from typing import Any, Protocol

from peft_fps.checkpoint.record import check_fingerprint_form
from peft_fps.importance import IMPORTANCES, WITHOUT_DATA, Settings
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.selection.calibration_record import CalibrationRecord


METHOD_FIELDS = ("importance", "order", "granularity")
"""Fields that every record of known origin has."""


class DescribedSettings(Settings, Protocol):
    """Fields of `FPSConfig` that a description reads, besides those of importances."""

    init_weights: bool

    @property
    def needs_calibration(self) -> bool:
        """Whether the entries depend on data."""


def describe(config: DescribedSettings, state: AdapterState) -> str:
    """Return one line that says how an adapter's entries were chosen, as far as `method_record` knows."""
    record = method_record(config, state)
    if record is None:
        return "an unknown method" if config.init_weights or state.calibration is not None else "chance"
    text = f"{'bottom of ' if record.order == 'bottom' else ''}{_score(record)}"
    if state.calibration is None and config.needs_calibration:
        text += " until calibrated"
    elif record.examples is not None and record.importance not in WITHOUT_DATA:
        text += f" over {record.examples:,} examples"
    return text if record.granularity is None else f"{text}, granularity {record.granularity}"


def method_record(config: DescribedSettings, state: AdapterState) -> CalibrationRecord | None:
    """Return the record of an adapter's entries. Of entries that were chosen without data, return what it would be.

    Returns:
        The record. None if it is unknown how the entries were chosen: the record says nothing, the places are random
        (`init_weights=False`), or the adapter was loaded without a record although its importance needs data.
    """
    if state.calibration is not None:
        return state.calibration if state.calibration.known else None
    if not config.init_weights or (config.needs_calibration and state.selected):
        return None
    importance = config.importance if config.importance in WITHOUT_DATA else "magnitude"
    return CalibrationRecord(importance, config.order, config.granularity, config.seed)


def plain_method(method: Any) -> dict[str, Any]:
    """Return a deep copy of a selection's method as JSON holds it. Check the parts that this package relies on.

    Raises:
        TypeError: the method is not a dict.
        ValueError: the method is not plain data, or `calibration` or `base_fingerprint` in it is malformed.
    """
    advice = "expected a dict of plain data: strings, finite numbers, True, False, None, and lists and dicts of them."
    if not isinstance(method, dict):
        raise TypeError(f"method is {method!r} of type {type(method).__name__}, {advice}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(method, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"method cannot be written as JSON: {error}; {advice}") from error
    record = plain.get("calibration")
    if not isinstance(record, dict | None):
        raise ValueError(f"method has calibration={record!r}, expected None or a dict.")
    if record is not None:
        CalibrationRecord.from_json(record, "method['calibration']")
    check_fingerprint_form("method['base_fingerprint']", plain.get("base_fingerprint"))
    return plain


def _score(record: CalibrationRecord) -> str:
    """Describe the score. A setting that a record made by hand leaves out is taken to be the default."""
    if record.combination is not None:
        return f"{record.combination} combination of {', '.join(record.adapters)}"
    if record.importance is None:
        return "an unknown method"
    known = IMPORTANCES.get(record.importance)
    return record.importance if known is None else known.text(record)
