"""How an adapter's entries were chosen: as a record, and on one line.

`calibrate` writes a record, plain data with `importance`, `order`, `granularity` and what the importance depends on;
`Selection.apply` hands on the record of its selection. Entries that were chosen without data have none yet.
"""

import json
from typing import Any

from peft_fps.adapter_state import AdapterState
from peft_fps.checks import check_unreached
from peft_fps.config import FPSConfig
from peft_fps.importances import IMPORTANCES, WITHOUT_DATA


CHOSEN = ("importance", "order", "granularity")
"""What every record tells."""


def describe(config: FPSConfig, state: AdapterState) -> str:
    """Return one line on the method behind an adapter's entries, as far as `method_record` knows it."""
    record = method_record(config, state)
    if record is None:
        return "an unknown method" if config.init_weights or state.calibration is not None else "chance"
    text = f"{'bottom of ' if record.get('order') == 'bottom' else ''}{_score(record)}"
    examples, granularity = record.get("examples"), record.get("granularity")
    if state.calibration is None and config.needs_calibration:
        text += " until calibrated"
    elif examples is not None and record.get("importance") not in WITHOUT_DATA:
        text += f" over {examples:,} examples"
    return text if granularity is None else f"{text}, granularity {granularity}"


def method_record(config: FPSConfig, state: AdapterState) -> dict[str, Any] | None:
    """Return the record of an adapter's entries, or what it would be where they were chosen without data.

    None where that is unknown: an empty record, random places (`init_weights=False`), and an adapter that was loaded
    without a record, although its importance needs data.
    """
    if state.calibration is not None:
        return state.calibration or None
    if not config.init_weights or (config.needs_calibration and state.selected):
        return None
    importance = config.importance if config.importance in WITHOUT_DATA else "magnitude"
    return {"importance": importance, **{key: getattr(config, key) for key in ("order", "granularity", "seed")}}


def plain_method(method: Any) -> dict[str, Any]:
    """Return a deep copy of a selection's method as JSON holds it, checked as far as this package relies on it.

    Raises:
        TypeError: the method is no dict.
        ValueError: it is not plain data, or its records are not of their form.
    """
    advice = "expected a dict of plain data: strings, finite numbers, True, False, None, and lists and dicts of them."
    if not isinstance(method, dict):
        raise TypeError(f"method is {method!r} of type {type(method).__name__}, {advice}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(method, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"method cannot be written as JSON: {error}; {advice}") from error
    record, digest = plain.get("calibration"), plain.get("base_fingerprint")
    examples = record.get("examples", 0) if isinstance(record, dict) else 0
    if not isinstance(record, dict | None) or isinstance(examples, bool) or not isinstance(examples, int):
        raise ValueError(f"method has calibration={record!r}, expected None or a dict whose 'examples' is an integer.")
    if isinstance(record, dict):
        check_unreached("method", record)
    strings = isinstance(digest, dict) and all(isinstance(digest.get(key), str) for key in ("sha256", "dtype"))
    if digest is not None and not strings:
        raise ValueError(f"method has base_fingerprint={digest!r}, expected None or a dict with 'sha256' and 'dtype'.")
    return plain


def _score(record: dict[str, Any]) -> str:
    """The score; a detail that the record leaves out (of hand-made ones) is taken to be the config's default."""
    if "combination" in record:
        return f"{record['combination']} combination of {', '.join(map(str, record.get('adapters', ())))}"
    chosen = record.get("importance")
    known = IMPORTANCES.get(str(chosen))
    if known is not None:
        return known.text(record)
    return "an unknown method" if chosen is None else str(chosen)
