"""What calibration warns of: modules and experts that its data did not reach, and weights read past a layer."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.calibration import InputStatistics
from peft_fps.config import FPSConfig
from peft_fps.importance import Evidence
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.packed_layer import PackedLayer


NOT_TRAINABLE = "were not called (the model may read their weight without calling them) or got no gradient"
"""What calibration by gradients finds of the modules that it does not reach."""


def warn_of_unreached(
    unreached: Collection[str], layers: Mapping[str, FPSLayer], config: FPSConfig, found: str
) -> None:
    """Name the modules that will not be trained, and say what becomes of their budget.

    Args:
        unreached: their paths.
        layers: all that the adapter targets.
        config: of the adapter.
        found: what calibration found of them, as a verb with its object: `"saw no input"`.
    """
    rest = "Their part of the budget goes to the others" if config.per_neuron is None else "The others keep per_neuron"
    warnings.warn(
        f"{len(unreached)} of {len(layers)} modules {found} during calibration and will not be trained: "
        f"{', '.join(unreached)}. {rest}.",
        stacklevel=3,
    )


def warn_of_tied_uses(layers: Mapping[str, EntryLayer], called: Collection[str]) -> None:
    """Warn of linear layers that share the weight of an adapted embedding and were not called.

    If the model reads their weight in another way, the embedding's changes count there only when they are merged.

    Args:
        layers: those with entries, by path.
        called: paths of all modules that calibration has called.
    """
    for path, layer in layers.items():
        missed = [place for place, use in layer.sharing.items() if isinstance(use, nn.Linear) and place not in called]
        if missed:
            warnings.warn(
                f"{', '.join(missed)}: shares the weight of {path} (tied weights) and was not called during "
                "calibration. If the model reads this weight without calling the module, the changes of the embedding "
                "count there only once they are merged: compare outputs before and after merging, or untie the "
                "weights.",
                stacklevel=4,
            )


def warn_of_idle_experts(layers: Mapping[str, FPSLayer], evidence: Evidence) -> None:
    """Name the experts of packed weights that got no token, or no gradient.

    Args:
        layers: all that the adapter targets, by path.
        evidence: by path of the layers that were reached.
    """
    idle: dict[str, tuple[list[int], int]] = {}
    for path, layer in layers.items():
        if (
            isinstance(layer, PackedLayer)
            and layer.matrices > 1
            and type(layer.base_layer) is PackedWeight
            and path in evidence
        ):
            numbers = _idle(layer, evidence[path])
            owner = path.rpartition(".")[0]
            if numbers and len(numbers) >= len(idle.get(owner, ([], 0))[0]):
                idle[owner] = numbers, layer.matrices
    if idle:
        named = "; ".join(f"{len(n)} of {m} of {path} ({', '.join(map(str, n))})" for path, (n, m) in idle.items())
        warnings.warn(
            f"Experts without a token or a gradient during calibration: {named}. Their entries come after those of "
            "all others, and are not trained while no token reaches them.",
            stacklevel=3,
        )


def _idle(layer: PackedLayer, found: Any) -> list[int]:
    """Return the indices of the matrices that have no evidence."""
    if isinstance(found, InputStatistics):
        assert isinstance(found.positions, Tensor)
        return (found.positions == 0).nonzero()[:, 0].tolist()
    each = layer.shape.neurons // layer.matrices
    return [m for m in range(layer.matrices) if not bool(found.rows(m * each, (m + 1) * each).any())]
