"""Evidence from a short training that is undone, for the importances that sum up changes of weights."""

from collections.abc import Callable

from torch import nn

from peft_fps.calibration import is_distributed
from peft_fps.importance.gradient_sums import accumulators, batch_loss, reached, weights_of
from peft_fps.importance.importance import Evidence, Request
from peft_fps.layers.lookup import adapter_layers, whole_parameters


def gather_changes(
    request: Request, *, train: Callable[..., dict[str, int]], default_rate: float
) -> tuple[Evidence, dict[str, int]]:
    """Run a short training, and sum up the changes of the weights.

    Args:
        request: model, layers, settings and data.
        train: runs the training and undoes it. Takes the base model, the weights, further parameters to train, the
            data, the loss, the sums to add the changes to, and `learning_rate`. Returns the numbers of `batches` and
            `examples`.
        default_rate: learning rate if the settings do not name one.

    Returns:
        The sums by module path, and the numbers of `batches` and `examples`.

    Raises:
        ValueError, TypeError: as `peft_fps.calibrate`. ValueError too in a distributed run. The model is unchanged
            then.
    """
    config, rate = request.config, request.config.selection_learning_rate
    weights = weights_of(request)
    sums = accumulators(request, streamable=False)
    loss = batch_loss(request.base, config, request.how)
    if is_distributed():
        raise ValueError(
            f"importance={config.importance!r} trains for a while, which several processes would do apart. Select "
            "in one process, and give the selection to the others (Selection.save, Selection.load)."
        )
    others = _trained_along(request.base, request.adapter_name)
    learning_rate = default_rate if rate is None else rate
    counts = train(request.base, weights, others, request.data, loss, sums, learning_rate=learning_rate)
    return reached(sums), counts


def _trained_along(base: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the biases that the adapter changes, and the parameters of modules that it trains completely.

    Their names differ from all module paths, which are the names of weights.
    """
    biased = {
        path: layer for path, layer in adapter_layers(base, adapter_name).items() if adapter_name in layer.fps_bias
    }
    biases = {f"{path} bias": layer.base_layer.bias for path, layer in biased.items()}
    return biases | {f"{name} whole": parameter for name, parameter in whole_parameters(base, adapter_name).items()}
