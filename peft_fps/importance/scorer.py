"""Scores of one layer's weights as an adapter's config asks for them."""

from peft_fps.importance import IMPORTANCES, Evidence, Score
from peft_fps.importance.magnitude import magnitude
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer


def scorer(layer: EntryLayer, path: str, config: Settings, evidence: Evidence) -> Score:
    """Return a function that scores the rows `first:last` of the layer's weight, `(last - first, inputs)` float32.

    Where data is due but missing (not calibrated, or a module that no batch reached), magnitude stands in.

    Args:
        layer: gives the weight.
        path: its module path.
        config: says which importance.
        evidence: from the data; may be empty.
    """
    importance, found = IMPORTANCES[config.importance], evidence.get(path)
    if found is not None or importance.needs == "nothing":
        return importance.scorer(layer, path, config, found)
    equal = importance.stand_in(config, evidence)
    return lambda first, last: magnitude(layer.weight_rows(first, last)) * equal
