"""What an importance is: what it needs, how its evidence is gathered, and how that becomes scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from peft_fps.calibration import InputStatistics, Pass, Run
from peft_fps.gradients import Accumulator, Loss
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.selection.calibration_record import CalibrationRecord


Evidence = Mapping[str, InputStatistics | Accumulator]
"""What the data said, by module path: statistics of inputs, or sums of gradients or changes."""

Score = Callable[[int, int], Tensor]
"""From `first, last` to the scores of these rows of a weight, `(last - first, inputs)` float32, never negative."""

UNREACHED = 1e-30
"""Factor by which modules without evidence come last where modules are compared."""


@dataclass(frozen=True)
class Gathering:
    """The arguments of `peft_fps.calibrate` that say how evidence is gathered; it explains each of them."""

    loss: Loss | None = None
    views: Callable[[Tensor], Tensor] | None = None
    accumulators: Literal["device", "cpu", "streaming"] = "device"
    training_mode: bool = False
    run: Run | None = None


@dataclass(frozen=True)
class Request:
    """What an importance gathers its evidence from.

    Attributes:
        base: the base model with its FPS layers, whose adapters are switched off.
        layers: the layers to score, by module path.
        config: settings of the adapter.
        adapter_name: name of the adapter. A short training trains its head and biases too.
        data: the batches.
        how: arguments of `peft_fps.calibrate`.
    """

    base: nn.Module
    layers: Mapping[str, EntryLayer]
    config: Settings
    adapter_name: str
    data: Pass
    how: Gathering


def nothing_reached(config: Settings, evidence: Evidence) -> float:
    """Return the factor by which modules without evidence come last, if any module has evidence; else 1."""
    return UNREACHED if evidence else 1.0


@dataclass(frozen=True)
class Importance:
    """A score of weights.

    Attributes:
        name: value of `FPSConfig.importance`.
        needs: what the importance needs from data: `"nothing"`, a `"forward"` pass, a `"backward"` pass, or a short
            `"training"`.
        help: description in the help of the command.
        text: returns the description in reports, from the record of a calibration.
        scorer: returns the scores of a layer, from the layer, its module path, the settings and the layer's evidence
            (None if the importance needs no data).
        gather: runs the base model over data. Returns the evidence by module path, without modules that the data did
            not reach, and the numbers of batches and examples. None if the importance needs no data.
        recorded: settings that the importance depends on, which the record of a calibration keeps.
        stand_in: returns the factor that makes weight magnitude comparable with these scores, for modules that the
            data did not reach.
    """

    name: str
    needs: Literal["nothing", "forward", "backward", "training"]
    help: str
    text: Callable[[CalibrationRecord], str]
    scorer: Callable[[EntryLayer, str, Settings, Any], Score]
    gather: Callable[[Request], tuple[Evidence, dict[str, int]]] | None = None
    recorded: tuple[str, ...] = ()
    stand_in: Callable[[Settings, Evidence], float] = nothing_reached
