"""Mean inputs of the layers of an adapter, on the base model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_fps.base.compiled import run_eagerly
from peft_fps.calibration import Pass, Run, device_of, failing_together, observe
from peft_fps.importance.activation import observed_layer
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import base_model
from peft_fps.lifecycle.adapters_off import adapters_off


def _collective(model: nn.Module, *_: Any) -> Any:
    """Return the device on which the processes of a distributed run exchange their sums."""
    return device_of(base_model(model))


@failing_together(_collective)
def input_means(
    model: nn.Module, adapter_name: str, layers: Mapping[str, EntryLayer], data: Pass, run: Run | None = None
) -> dict[str, Tensor]:
    """Run the base model on data, and return the mean of each input of some layers.

    In a distributed run every process brings its own data, and all get the means over all.

    Args:
        model: model with the adapter.
        adapter_name: name of the adapter. Modules that it trains whole run as they are in the base model, so that the
            means are the same when training is resumed.
        layers: layers by path in the base model.
        data: the batches.
        run: runs the model on a batch. Default: as `peft_fps.calibrate` does.

    Returns:
        `(groups, inputs)` in the dtype of `wide_dtype` by path, of the layers that the data reaches. Only grouped
        convolutions and stacked weights have several groups.
    """
    base = base_model(model)
    observed = {path: observed_layer(layer) for path, layer in layers.items()}
    with adapters_off(base, adapter_name, whole=False), run_eagerly(base):
        statistics, _ = observe(base, observed, "signed", data, run)
    return {path: found.mean() for path, found in statistics.items()}
