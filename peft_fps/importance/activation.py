"""FPS: weight magnitude times the typical magnitude of its input (arXiv 2510.27359, eqs. 2-6)."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_fps.base.substitution import TRANSPOSED, overrides_forward
from peft_fps.calibration import InputStatistics, Observed, observe
from peft_fps.importance.importance import UNREACHED, Evidence, Importance, Request, Score, nothing_reached
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.packed_layer import PackedLayer
from peft_fps.selection.calibration_record import CalibrationRecord


def weight_times_activation(weight: Tensor, activation: Tensor) -> Tensor:
    """Return the magnitude of each weight times the typical magnitude of its input (arXiv 2510.27359, eqs. 2-4).

    Args:
        weight: `(rows, inputs)`.
        activation: typical magnitude of each input: mean |a| (`norm="l1"`, eq. 3) or root mean square (`"l2"`, eq. 4).
            `(inputs,)`, or `(rows, inputs)` if the rows read different inputs.

    Returns:
        `(rows, inputs)` float32.
    """
    return weight.float().abs() * activation.float()


def activation_alone(weight: Tensor, activation: Tensor) -> Tensor:
    """Return the typical magnitude of each weight's input (eqs. 5 and 6), so that all neurons have the same ranking.

    Args:
        weight: `(rows, inputs)`. Only its shape counts.
        activation: as in `weight_times_activation`.

    Returns:
        `(rows, inputs)` float32.
    """
    return activation.float().expand(weight.shape)


def _gather(request: Request) -> tuple[Evidence, dict[str, int]]:
    """Gather input statistics in one forward pass over the data."""
    layers = {path: observed_layer(layer) for path, layer in request.layers.items()}
    statistics, counts = observe(request.base, layers, request.config.norm, request.data, request.how.run)
    counted = (found.positions for found in statistics.values())
    if statistics and not any(bool((each > 0).any()) if isinstance(each, Tensor) else each > 0 for each in counted):
        raise ValueError(
            f"{next(iter(statistics))}: every position of every batch is padding by its mask, expected some "
            "that count. Check the masks of the calibration data. Nothing was changed."
        )
    _warn_of_padding(statistics)
    return statistics, counts


def _warn_of_padding(statistics: Mapping[str, InputStatistics]) -> None:
    """Name the modules whose statistics may hold padding because no mask fits their inputs."""
    unmasked = {path: found.unmasked for path, found in statistics.items() if found.unmasked is not None}
    if unmasked:
        path, first = next(iter(unmasked.items()))
        masks = ", ".join(dict.fromkeys(name for each in unmasked.values() for name in each.masks))
        warnings.warn(
            f"The inputs of {len(unmasked)} modules have other positions than the {masks}, {first.shape} in {path}, "
            f"so that padding among them counts like everything else: {', '.join(unmasked)}. Calibrate with batches "
            "without padding, of examples of one length or size, to leave it out.",
            stacklevel=3,
        )


def observed_layer(layer: EntryLayer) -> Observed:
    """Return what the forward pass has to know of a layer to observe it."""
    base = layer.base_layer
    groups = layer.matrices if isinstance(layer, PackedLayer) else getattr(base, "groups", 1)
    assert isinstance(layer, nn.Module)
    watched = overrides_forward(base) or isinstance(base, TRANSPOSED)
    sharing = {path: module for path, module in layer.sharing.items() if isinstance(module, nn.Embedding)}
    return Observed(layer, base, groups, layer.shape.inputs, watched, sharing)


def _scorer(layer: EntryLayer, path: str, config: Settings, statistics: InputStatistics) -> Score:
    """Return the scores of a layer from its input statistics; see `Importance.scorer`."""
    activation = statistics.typical(config.norm)
    if isinstance(statistics.positions, Tensor):  # experts without a token come last
        activation[statistics.positions == 0] = UNREACHED

    def score(first: int, last: int) -> Tensor:
        rows = layer.weight_rows(first, last)
        groups = torch.arange(first, last, device=activation.device) // (layer.shape.neurons // activation.shape[0])
        typical = (activation if activation.shape[0] == 1 else activation[groups]).to(rows.device)
        formula = weight_times_activation if config.weight_magnitude else activation_alone
        return formula(rows, typical)

    return score


def _mean_activation(config: Settings, evidence: Evidence) -> float:
    """Return the mean typical magnitude of all observed inputs, which stands in for inputs of unreached modules."""
    reached = [item.typical(config.norm) for item in evidence.values() if isinstance(item, InputStatistics)]
    if not reached:
        return nothing_reached(config, evidence)
    return float(sum(typical.mean().cpu() for typical in reached) / len(reached))


def _text(record: CalibrationRecord) -> str:
    """Return the description of the score for reports."""
    typical = "root mean square of the input" if record.norm == "l2" else "mean |input|"
    return typical if record.weight_magnitude is False else f"weight magnitude x {typical}"


ACTIVATION = Importance(
    name="activation",
    needs="forward",
    help="its magnitude times the typical magnitude of its input (FPS)",
    text=_text,
    scorer=_scorer,
    gather=_gather,
    recorded=("norm", "weight_magnitude"),
    stand_in=_mean_activation,
)
