"""Check by sizes alone whether a number of entries suffices for a granularity."""

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
    """Check that the entries of all layers together suffice for a granularity.

    `"block"` needs one entry per neuron. `"row"` and `"column"` need the entries of one complete neuron or input of
    some layer. The other granularities need none. No entry at all is BitFit and suffices for every granularity.

    Args:
        granularity: value of `FPSConfig.granularity`.
        layers: shapes by module path.
        entries: number of entries of all layers together.
        biases: number of bias deltas that are trained beside the entries.
        base_parameters: number of parameters that the budget is a share of. With it the error advises a budget.

    Raises:
        ValueError: there are too few entries.
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
        # rounding leaves up to one entry per module of a budget
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
