"""Scores of one layer's weights by the importance of an adapter's config."""

from peft_fps.importance import IMPORTANCES, Evidence, Score
from peft_fps.importance.magnitude import magnitude
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer


def scorer(layer: EntryLayer, path: str, config: Settings, evidence: Evidence) -> Score:
    """Return the scores of a layer.

    Weight magnitude, times `Importance.stand_in`, is the score if the importance needs data and the layer has no
    evidence. This is so before calibration, and for a module that no batch reaches.

    Args:
        layer: layer to score.
        path: module path of the layer.
        config: settings that name the importance.
        evidence: evidence of all layers by module path. It may be empty.

    Returns:
        A function that takes `first` and `last` and returns the scores of these neurons, `(last - first, inputs)`
        float32.
    """
    importance, layer_evidence = IMPORTANCES[config.importance], evidence.get(path)
    if layer_evidence is not None or importance.needs == "nothing":
        return importance.scorer(layer, path, config, layer_evidence)
    factor = importance.stand_in(config, evidence)
    return lambda first, last: magnitude(layer.weight_rows(first, last)) * factor
