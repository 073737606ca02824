"""The presets as a table: what each one sets, and what differs from its source."""

from collections.abc import Mapping
from typing import Any

from peft_fps.importance import IMPORTANCES
from peft_fps.presets import PRESETS, recipe_line


def preset_table() -> str:
    """Return the presets as a Markdown table: name, source, passes to select, settings, what differs."""
    rows = [
        (
            "preset",
            "method and source",
            "pass to select",
            "settings",
            "what differs from the source, or is open there",
        ),
        ("---",) * 5,
    ]
    for name, preset in PRESETS.items():
        fields = ", ".join(f"{key}={_quoted(value)}" for key, value in preset.settings.items())
        settings = f"`{fields}`; {recipe_line(preset.recipe)}"
        rows.append((f"`{name}`", preset.source, _passes(preset.settings), settings, preset.deviations))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _quoted(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_quoted(item)}" for key, item in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _passes(settings: Mapping[str, Any]) -> str:
    importance = settings.get("importance", "activation")
    needs = IMPORTANCES[importance].needs
    if settings.get("budget") == 0 or needs == "nothing":
        return "none"
    if needs == "forward":
        return "forward"
    if needs == "training":
        epochs = settings["selection_epochs"]
        return f"short training, {epochs} epoch{'s' if epochs > 1 else ''}"
    if settings.get("loss") == "contrastive":
        return "forward and backward, two views"
    return "forward and backward" + (", example by example" if settings.get("fisher") == "example" else "")
