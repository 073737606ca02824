"""What an importance is: what it needs, how its evidence is gathered, and how that becomes scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from peft_fps.calibration import InputStatistics, Pass, Run
from peft_fps.entry_layer import EntryLayer
from peft_fps.gradients import Accumulator, Loss


if TYPE_CHECKING:  # the config reads the table of importances
    from peft_fps.config import FPSConfig


Evidence = Mapping[str, InputStatistics | Accumulator]
"""What the data said, by module path: statistics of inputs, or sums of gradients or changes."""

Score = Callable[[int, int], Tensor]
"""From `first, last` to the scores of these rows of a weight, `(last - first, inputs)` float32, never negative."""

UNREACHED = 1e-30
"""Factor by which modules without evidence come last where modules are compared."""


@dataclass(frozen=True)
class Gathering:
    """How losses, views, sums and outputs are had; see `peft_fps.calibrate`, where each is explained."""

    loss: Loss | None = None
    views: Callable[[Tensor], Tensor] | None = None
    accumulators: Literal["device", "cpu", "streaming"] = "device"
    training_mode: bool = False
    run: Run | None = None


@dataclass(frozen=True)
class Request:
    """What evidence is gathered from.

    Attributes:
        base: the base model with its layers, adapters off.
        layers: to be scored, by module path.
        config: says what is needed.
        adapter_name: whose head and biases are trained along in a short training.
        data: the batches.
        how: further choices.
    """

    base: nn.Module
    layers: Mapping[str, EntryLayer]
    config: FPSConfig
    adapter_name: str
    data: Pass
    how: Gathering


def nothing_reached(config: FPSConfig, evidence: Evidence) -> float:
    """Let modules without evidence come last where others have some."""
    return UNREACHED if evidence else 1.0


@dataclass(frozen=True)
class Importance:
    """A score of weights.

    Attributes:
        name: as the config says it.
        needs: of the data: `"nothing"`, a `"forward"` pass, a `"backward"` pass, or a short `"training"`.
        help: its words in the command's help.
        text: from the record of a calibration to its words in reports.
        scorer: from a layer, its module path, the config and its evidence (None if it needs none) to its scores.
        gather: runs the base model over data, and returns the evidence by module path, of modules that were reached,
            and the numbers of batches and examples. None if it needs nothing.
        recorded: fields of the config that it depends on, kept with a selection.
        stand_in: factor that makes magnitude comparable with its scores, for modules that no batch reached.
    """

    name: str
    needs: Literal["nothing", "forward", "backward", "training"]
    help: str
    text: Callable[[Mapping[str, Any]], str]
    scorer: Callable[[EntryLayer, str, FPSConfig, Any], Score]
    gather: Callable[[Request], tuple[Evidence, dict[str, int]]] | None = None
    recorded: tuple[str, ...] = ()
    stand_in: Callable[[FPSConfig, Evidence], float] = nothing_reached
