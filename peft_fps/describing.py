"""One line on how an adapter's entries were chosen."""

from typing import Any

from peft_fps.adapters import AdapterState
from peft_fps.config import WITHOUT_DATA, FPSConfig


TEXTS = {
    "magnitude": "weight magnitude",
    "gradient": "|sum of gradients|",
    "sensitivity": "|weight x sum of gradients|",
    "movement": "movement in a short fine-tuning",
    "l0": "change under hard-concrete gates",
}


def describe(config: FPSConfig, state: AdapterState) -> str:
    """Return the method behind a selection: what its record says, or else what the config asks for."""
    record: dict[str, Any] = config.to_dict() | (state.calibration or {})
    chosen, examples = record["importance"], (state.calibration or {}).get("examples")
    text = "bottom of " if record["order"] == "bottom" else ""
    if config.needs_calibration and state.calibration is None and not state.selected:
        text += "weight magnitude until calibrated"
    else:
        text += _score(record)
        if examples is not None and chosen not in WITHOUT_DATA:
            text += f" over {examples:,} examples"
    return f"{text}, granularity {record['granularity']}"


def _score(record: dict[str, Any]) -> str:
    chosen = record["importance"]
    if chosen == "random":
        return f"chance (seed {record['seed']})"
    if chosen == "activation":
        typical = "mean |input|" if record["norm"] == "l1" else "root mean square of the input"
        return f"weight magnitude x {typical}" if record["weight_magnitude"] else typical
    if chosen == "fisher":
        return f"squared gradients of each {record['fisher']}"
    loss = ", contrastive loss" if record["loss"] == "contrastive" else ""
    return f"{TEXTS.get(chosen, chosen)}{loss}"
