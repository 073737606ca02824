"""The type of importances: what they need from data, how they gather evidence, and how they score by it."""

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
"""Results of a run over data by module path: statistics of inputs, or sums of gradients or changes."""

Score = Callable[[int, int], Tensor]
"""Takes `first` and `last`. Returns the scores of these neurons, `(last - first, inputs)` float32, not negative."""

UNREACHED = 1e-30
"""Factor that ranks modules without evidence last where modules compete."""


@dataclass(frozen=True)
class Gathering:
    """Arguments of `peft_fps.calibrate` that say how to gather evidence; see there."""

    loss: Loss | None = None
    views: Callable[[Tensor], Tensor] | None = None
    accumulators: Literal["device", "cpu", "streaming"] = "device"
    training_mode: bool = False
    run: Run | None = None


@dataclass(frozen=True)
class Request:
    """Model, layers, settings and data that an importance gathers its evidence from.

    Attributes:
        base: the base model with its FPS layers. All adapters are switched off.
        layers: layers to score by module path.
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
    """Return the factor that ranks modules without evidence last: `UNREACHED`, or 1 if no module has evidence."""
    return UNREACHED if evidence else 1.0


@dataclass(frozen=True)
class Importance:
    """A score of weights.

    Attributes:
        name: value of `FPSConfig.importance`.
        needs: what the importance needs from data: `"nothing"`, a `"forward"` pass, a `"backward"` pass, or a short
            `"training"`.
        help: description in the help of the command.
        text: takes the record of a calibration. Returns the description for reports.
        scorer: takes a layer, its module path, the settings, and the layer's evidence (None if the importance needs no
            data). Returns the scores of the layer.
        gather: runs the base model over data. Returns the evidence by module path, without modules that the data does
            not reach, and the numbers of `batches` and `examples`. None if the importance needs no data.
        recorded: names of the settings that the importance depends on. The record of a calibration holds them.
        stand_in: takes the settings and the evidence. Returns the factor of weight magnitude that makes it comparable
            with these scores, for modules that the data does not reach.
    """

    name: str
    needs: Literal["nothing", "forward", "backward", "training"]
    help: str
    text: Callable[[CalibrationRecord], str]
    scorer: Callable[[EntryLayer, str, Settings, Any], Score]
    gather: Callable[[Request], tuple[Evidence, dict[str, int]]] | None = None
    recorded: tuple[str, ...] = ()
    stand_in: Callable[[Settings, Evidence], float] = nothing_reached
