"""How large an adapter's change is beside the base output in each module, measured on data."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_fps.base.compiled import run_eagerly
from peft_fps.calibration import Pass, device_of, feed
from peft_fps.calibration.preserve import undisturbed
from peft_fps.layers.lookup import adapter_layers, base_model
from peft_fps.layers.sparse_product import ProductLayer


@dataclass
class Measured:
    """Sums over the positions that a module has seen.

    Attributes:
        magnitude: sum of ‖M(x)‖ / ‖W₀x‖.
        passed: number of positions at which the change counts.
        positions: number of positions.
    """

    magnitude: float = 0.0
    passed: int = 0
    positions: int = 0


def probe_changes(model: nn.Module, adapter_name: str, data: Any) -> dict[str, Measured]:
    """Run a model on data with its active adapters, and measure the change of one of them. The model stays as it is.

    Args:
        model: has the adapter.
        adapter_name: its name.
        data: batches or examples, as for `calibrate`.

    Returns:
        By module path, of the modules with entries that the data has reached. Norms, and layers with a forward of
        their own, are not measured.

    Raises:
        TypeError, ValueError: the data is of an unknown kind, or there is none.
    """
    base = base_model(model)
    layers = {
        path: layer
        for path, layer in adapter_layers(model, adapter_name).items()
        if isinstance(layer, ProductLayer) and layer.adds_its_change
    }
    found: dict[str, Measured] = {}
    batches, device = Pass(data, progress=False, purpose="the probe"), device_of(base)
    with undisturbed(base), run_eagerly(base), _watched(layers, adapter_name, found), closing(iter(batches)) as passes:
        for _, batch in passes:
            feed(base, batch, device)
    return found


@contextmanager
def _watched(layers: Mapping[str, ProductLayer], adapter_name: str, found: dict[str, Measured]) -> Iterator[None]:
    """Add up in `found`, by path, the change in every call of the layers within the context."""

    def measure(path: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            plain = layer.base_layer(*args)
            magnitude = layer.relative_change(layer.change_alone(adapter_name, args[0]), plain)
            threshold, sums = layer.threshold(adapter_name), found.setdefault(path, Measured())
            sums.magnitude += float(magnitude.sum())
            sums.passed += magnitude.numel() if threshold is None else int((magnitude >= threshold).sum())
            sums.positions += magnitude.numel()

        return hook

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(measure(path)).remove)
        yield
