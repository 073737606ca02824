"""Evidence from backward passes over data, for the importances that sum up gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peft_fps.base.head import output_head
from peft_fps.calibration import is_distributed, run_model
from peft_fps.gradients import (
    Accumulator,
    BatchLoss,
    Exact,
    Streaming,
    TwoViews,
    Weight,
    accumulate_gradients,
    contrastive_step,
    task_loss,
)
from peft_fps.importance.importance import Evidence, Gathering, Request, Score
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.quantised_linear import check_gradients
from peft_fps.selection.calibration_record import CalibrationRecord


MEMORIES = ("device", "cpu", "streaming")


def gather_gradients(
    request: Request, *, term: Callable[[Tensor, Tensor], Tensor], per_example: bool = False
) -> tuple[Evidence, dict[str, int]]:
    """Run forward and backward passes of the base model over data, and sum up a function of the gradients.

    Args:
        request: model, layers, settings and data.
        term: takes a weight and its gradient, both `(neurons, inputs)` float32. Returns the term to add.
        per_example: run a pass for each example of a batch instead of one for the batch. Default: False.

    Returns:
        The sums by module path, and the numbers of `batches` and `examples`.

    Raises:
        ValueError, TypeError: as `peft_fps.calibrate`. The model is unchanged then.
    """
    weights = weights_of(request)
    sums = accumulators(request, streamable=True)
    counts = accumulate_gradients(
        request.base,
        weights,
        request.data,
        batch_loss(request.base, request.config, request.how),
        sums,
        term=lambda path, gradient: term(weights[path].as_matrix(weights[path].parameter.detach()), gradient),
        per_example=per_example,
        training=request.how.training_mode,
    )
    return reached(sums, per_example), counts


def size_of_sums(layer: EntryLayer, path: str, config: Settings, sums: Accumulator) -> Score:
    """Return the absolute values of a layer's sums as its scores.

    It is the `Importance.scorer` of importances that sum up gradients or changes.

    Args:
        layer: not used.
        path: not used.
        config: not used.
        sums: of the layer.
    """
    return lambda first, last: sums.rows(first, last).float().abs()


def loss_of(record: CalibrationRecord) -> str:
    """Return the words that a report adds if the gradients are those of the contrastive loss."""
    return ", contrastive loss" if record.loss == "contrastive" else ""


def reached(sums: Mapping[str, Accumulator], per_example: bool = False) -> dict[str, Accumulator]:
    """Return the sums of the modules that got a gradient.

    Args:
        sums: sums by module path.
        per_example: whether each example had a pass of its own. The error then advises `fisher="batch"`.

    Raises:
        ValueError: all sums are zero, so that they cannot rank entries.
    """
    with_gradient = {path: accumulator for path, accumulator in sums.items() if accumulator.reached}
    if with_gradient and all(accumulator.is_zero() for accumulator in with_gradient.values()):
        alone = " A loss that compares the examples of a batch needs fisher='batch'." if per_example else ""
        raise ValueError(
            f"the gradients of all {len(with_gradient)} modules are zero, expected some to choose entries by. Check "
            f"what the loss depends on: labels that count, rewards that differ.{alone} Nothing was changed."
        )
    return with_gradient


def weights_of(request: Request) -> dict[str, Weight]:
    """Return the weights of the layers to score, by module path.

    Raises:
        ValueError: a weight cannot get a gradient, because it is quantised, offloaded, or made in inference mode.
    """
    name = request.config.importance
    check_gradients(request.layers, name)
    for path, layer in request.layers.items():
        remedy = f"since importance={name!r} needs a backward pass"
        if layer.base_layer.weight.device.type == "meta":
            raise ValueError(
                f"{path}: its weight is offloaded (on the meta device), expected one that gets gradients, {remedy}. "
                "Keep the model on a device, or choose importance='activation'. Nothing was changed."
            )
        if layer.base_layer.weight.is_inference():
            raise ValueError(
                f"{path}: its weight was made in inference mode, expected one that gets gradients, {remedy}. Load the "
                "model outside of torch.inference_mode(), or choose importance='activation'. Nothing was changed."
            )
    return {path: Weight(layer.base_layer.weight, layer.layout) for path, layer in request.layers.items()}


def accumulators(request: Request, *, streamable: bool) -> dict[str, Accumulator]:
    """Return empty sums for every layer, in the memory that `calibrate(accumulators=...)` names.

    Args:
        request: model, layers and settings.
        streamable: whether a shortlist of the first batch's largest elements suffices for the importance.

    Raises:
        ValueError: the memory is unknown, or is `"streaming"` where a shortlist does not suffice.
    """
    layers, config, where = request.layers, request.config, request.how.accumulators
    if where not in MEMORIES:
        raise ValueError(f"accumulators is {where!r}, expected one of {', '.join(map(repr, MEMORIES))}.")
    if where != "streaming":
        device = torch.device("cpu") if where == "cpu" else None
        return {path: Exact(device) for path in layers}
    unfit = [
        text
        for text, applies in (
            (f"importance={config.importance!r}", not streamable),
            (f"granularity={config.granularity!r}", config.granularity in ("row", "column")),
            ("order='bottom'", config.order == "bottom"),
            ("several processes", is_distributed()),
        )
        if applies
    ]
    if unfit:
        raise ValueError(
            f"accumulators='streaming' was given with {', '.join(unfit)}, expected accumulators='device' or 'cpu': a "
            "shortlist of the largest entries cannot serve these."
        )
    by_neuron = config.granularity in ("neuron", "block")
    name = request.adapter_name
    # a module that an earlier calibration did not reach has no entries, and may get one per neuron now
    entries = {
        path: layer.fps_values[name].numel() if layer.carries(name) else layer.shape.neurons
        for path, layer in layers.items()
    }
    if config.granularity in ("model", "block"):
        # spread evenly, because only the sum counts and an earlier calibration may have spread it unevenly
        total, neurons = sum(entries.values()), sum(layer.shape.neurons for layer in layers.values())
        entries = {path: -(-total * layer.shape.neurons // neurons) for path, layer in layers.items()}
    return {path: Streaming(number, by_neuron) for path, number in entries.items()}


def batch_loss(base: nn.Module, config: Settings, how: Gathering) -> BatchLoss:
    """Return the loss of a batch that the config or the arguments of `calibrate` name.

    Args:
        base: base model.
        config: settings of the adapter.
        how: arguments of `calibrate`. Default loss: `task_loss`.

    Raises:
        ValueError: the config names the contrastive loss, and the arguments name a loss or a run too. Or the model has
            no known head.
    """
    if config.loss == "contrastive":
        if how.loss is not None:
            raise ValueError(
                "loss was given to calibrate, but the config says loss='contrastive'. Leave one of them out."
            )
        if how.run is not None:
            raise ValueError(
                "run was given to calibrate, but loss='contrastive' of the config runs the model on two views of each "
                "image itself. Leave one of them out."
            )
        heads = output_head(base) or config.modules_to_save or []
        if not heads:
            raise ValueError(
                f"{type(base).__name__} has no classification head that is known, whose input loss='contrastive' "
                "compares. Name it in modules_to_save, or use loss='task'."
            )
        head, views = heads[0], how.views or TwoViews()
        return lambda model, batch: contrastive_step(model, head, batch, views)
    of_outputs, run = how.loss or task_loss, how.run or run_model
    return lambda model, batch: of_outputs(run(model, batch), batch)
