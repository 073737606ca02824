"""Whether a number of entries is enough for a granularity, known from sizes alone."""

from collections.abc import Mapping

from peft_fps.selection.budget_allocation import LayerShape, round_up


def check_granularity(
    granularity: str,
    layers: Mapping[str, LayerShape],
    entries: int,
    *,
    biases: int = 0,
    base_parameters: int | None = None,
) -> None:
    """Raise ValueError if the entries of all layers together are too few for the granularity, but not none.

    `"block"` needs one per neuron, `"row"` and `"column"` enough for one whole neuron or input of some layer; no entry
    at all is BitFit under every granularity.

    Args:
        granularity: any; the others need nothing.
        layers: shapes by module path.
        entries: of all layers together.
        biases: bias deltas that are trained beside them, and
        base_parameters: what the budget is a share of; for the advice to raise it.
    """
    if granularity not in ("block", "row", "column") or not entries:
        return
    neurons = sum(layer.neurons for layer in layers.values())
    if granularity == "block":
        needed, margin = neurons, 0
        expected = f"at least one entry for each of the {neurons:,} neurons of {len(layers)} modules"
    else:
        sizes = {name: layer.inputs if granularity == "row" else layer.neurons for name, layer in layers.items()}
        smallest = min(sizes, key=lambda name: sizes[name])
        # a budget is used up to less than one entry per module
        needed, margin = sizes[smallest], len(layers)
        unit = "neuron" if granularity == "row" else "input"
        expected = f"at least the {needed:,} of one whole {unit} of {smallest}, the module where it is smallest"
    if entries >= needed:
        return
    enough = needed + margin
    advice = f"Raise per_neuron to at least {round_up(enough, neurons):g}"
    if base_parameters is not None:
        advice += f" or the budget to at least {round_up(enough + biases, base_parameters):g}"
    raise ValueError(
        f"granularity={granularity!r} found {entries:,} entries in all, expected {expected}. {advice}, or choose "
        "another granularity."
    )
