"""What the data says about an adapter's weights, gathered as its config asks for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peft_fps.adapters import FPSLayer
from peft_fps.calibration import Observed, Pass, is_distributed, observe, run_model
from peft_fps.config import FPSConfig
from peft_fps.gradients import (
    Accumulator,
    BatchLoss,
    Exact,
    Loss,
    Streaming,
    TwoViews,
    Weight,
    accumulate_gated_changes,
    accumulate_gradients,
    accumulate_movement,
    contrastive_step,
    task_loss,
)
from peft_fps.lookup import adapter_layers, whole_parameters
from peft_fps.scoring import Evidence
from peft_fps.targets import output_head


BACKWARD = ("gradient", "fisher", "sensitivity")
SHORT_TRAINING = {"movement": 3e-4, "l0": 1e-3}
"""Importances that train for a while, and their learning rates where the config leaves them open."""

MEMORIES = ("device", "cpu", "streaming")


@dataclass(frozen=True)
class Gathering:
    """How losses, views and sums are had; see `peft_fps.calibrate`, where each is explained."""

    loss: Loss | None = None
    views: Callable[[Tensor], Tensor] | None = None
    accumulators: Literal["device", "cpu", "streaming"] = "device"
    training_mode: bool = False


def gather(
    base: nn.Module,
    layers: Mapping[str, FPSLayer],
    config: FPSConfig,
    adapter_name: str,
    data: Pass,
    how: Gathering,
) -> tuple[Evidence, dict[str, int]]:
    """Run the base model over data, and return the evidence by module path and the numbers of batches and examples.

    Args:
        base: the base model with its layers, adapters off.
        layers: to be scored, by module path.
        config: says what is needed.
        adapter_name: whose head and biases are trained along in a short training.
        data: the batches.
        how: further choices.

    Raises:
        ValueError, TypeError: as `peft_fps.calibrate`. Nothing was changed then.
    """
    if config.importance == "activation":
        return observe(base, {path: _observed(layer) for path, layer in layers.items()}, config.norm, data)
    _check_reachable(layers, config)
    weights = {path: Weight(layer.base_layer.weight, layer.transposed) for path, layer in layers.items()}
    sums = _accumulators(layers, config, adapter_name, how)
    loss = _batch_loss(base, config, how)
    if config.importance in BACKWARD:
        counts = accumulate_gradients(
            base,
            weights,
            data,
            loss,
            sums,
            term=_term(config.importance, weights),
            per_example=config.importance == "fisher" and config.fisher == "example",
            training=how.training_mode,
        )
    else:
        if is_distributed():
            raise ValueError(
                f"importance={config.importance!r} trains for a while, which several processes would do apart. Select "
                "in one process, and give the selection to the others (Selection.save, Selection.load)."
            )
        others = _trained_along(base, adapter_name)
        default = SHORT_TRAINING[config.importance]
        rate = default if config.selection_learning_rate is None else config.selection_learning_rate
        if config.importance == "movement":
            counts = accumulate_movement(base, weights, others, data, loss, sums, learning_rate=rate)
        else:
            counts = accumulate_gated_changes(
                base, weights, others, data, loss, sums, learning_rate=rate, penalty=config.l0_penalty
            )
    return {path: held for path, held in sums.items() if held.reached}, counts


def _observed(layer: FPSLayer) -> Observed:
    groups = getattr(layer.base_layer, "groups", 1)
    assert isinstance(layer, nn.Module)
    return Observed(layer, layer.base_layer, groups, layer.shape.inputs)


def _check_reachable(layers: Mapping[str, FPSLayer], config: FPSConfig) -> None:
    for path, layer in layers.items():
        if layer.base_layer.weight.device.type == "meta":
            raise ValueError(
                f"{path}: its weight is offloaded (on the meta device), expected one that gets gradients, since "
                f"importance={config.importance!r} needs a backward pass. Keep the model on a device, or choose "
                "importance='activation'. Nothing was changed."
            )
        if layer.base_layer.weight.is_inference():
            raise ValueError(
                f"{path}: its weight was made in inference mode, expected one that gets gradients, since "
                f"importance={config.importance!r} needs a backward pass. Load the model outside of "
                "torch.inference_mode(), or choose importance='activation'. Nothing was changed."
            )


def _accumulators(
    layers: Mapping[str, FPSLayer], config: FPSConfig, adapter_name: str, how: Gathering
) -> dict[str, Accumulator]:
    if how.accumulators not in MEMORIES:
        raise ValueError(f"accumulators is {how.accumulators!r}, expected one of {', '.join(map(repr, MEMORIES))}.")
    if how.accumulators != "streaming":
        device = torch.device("cpu") if how.accumulators == "cpu" else None
        return {path: Exact(device) for path in layers}
    unfit = [
        text
        for text, found in (
            (f"importance={config.importance!r}", config.importance not in BACKWARD),
            (f"granularity={config.granularity!r}", config.granularity in ("row", "column")),
            ("order='bottom'", config.order == "bottom"),
            ("several processes", is_distributed()),
        )
        if found
    ]
    if unfit:
        raise ValueError(
            f"accumulators='streaming' was given with {', '.join(unfit)}, expected accumulators='device' or 'cpu': a "
            "shortlist of the largest entries cannot serve these."
        )
    by_neuron = config.granularity in ("neuron", "block")
    entries = {path: layer.fps_values[adapter_name].numel() for path, layer in layers.items()}
    if config.granularity in ("model", "block"):
        # only their sum counts; how an earlier calibration has spread them must not bind this one
        total, neurons = sum(entries.values()), sum(layer.shape.neurons for layer in layers.values())
        entries = {path: -(-total * layer.shape.neurons // neurons) for path, layer in layers.items()}
    return {path: Streaming(number, by_neuron) for path, number in entries.items()}


def _batch_loss(base: nn.Module, config: FPSConfig, how: Gathering) -> BatchLoss:
    if config.loss == "contrastive":
        if how.loss is not None:
            raise ValueError(
                "loss was given to calibrate, but the config says loss='contrastive'. Leave one of them out."
            )
        heads = output_head(base) or config.modules_to_save or []
        if not heads:
            raise ValueError(
                f"{type(base).__name__} has no classification head that is known, whose input loss='contrastive' "
                "compares. Name it in modules_to_save, or use loss='task'."
            )
        head, views = heads[0], how.views or TwoViews()
        return lambda model, batch: contrastive_step(model, head, batch, views)
    of_outputs = how.loss or task_loss
    return lambda model, batch: of_outputs(run_model(model, batch), batch)


def _term(name: str, weights: Mapping[str, Weight]) -> Callable[[str, Tensor], Tensor]:
    if name == "fisher":
        return lambda path, gradient: gradient.square()
    if name == "gradient":
        return lambda path, gradient: gradient
    # with its sign: what the weight gains in one batch it may lose in the next
    return lambda path, gradient: weights[path].as_matrix(weights[path].parameter.detach()) * gradient


def _trained_along(base: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Biases that the adapter changes, and modules that it trains whole, by names that no weight has."""
    biased = {
        path: layer for path, layer in adapter_layers(base, adapter_name).items() if adapter_name in layer.fps_bias
    }
    biases = {f"{path} bias": layer.base_layer.bias for path, layer in biased.items()}
    return biases | {f"{name} whole": parameter for name, parameter in whole_parameters(base, adapter_name).items()}
