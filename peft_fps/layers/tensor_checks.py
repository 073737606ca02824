"""What an adapter's tensors must be before a layer computes with them, looked at once and not in every forward.

A look reads the tensors' values, which no tracer can follow. So `torch.compile` is told to call the methods that look
as they are, while it traces: a model need not have run before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from peft_fps.base.sharded import is_partitioned, is_sharded, own_part
from peft_fps.layers.placement import PlacedLayer
from peft_fps.sparse import StructureError, check_finite, check_floating, is_jit_tracing


DIVERGED = (
    "Either training diverged: train again with a lower learning rate, and not in float16. Or the adapter's file is "
    "damaged: load an intact one."
)
"""Why an adapter may hold NaN or infinity, and what to do, as the end of a message."""
ONLY_PARAMETERS = (
    "Where models are averaged, average parameters alone, with `use_buffers=False`: buffers hold indices, which an "
    "average rounds."
)
"""What averaging an adapter takes, as the end of a message."""


class CheckedLayer(PlacedLayer):
    """The part of an FPS layer that checks.

    Attributes:
        neurons: number of elements of a bias delta.
        fps_bias: per adapter `(neurons,)`, bias delta.
    """

    neurons: int
    fps_bias: nn.ParameterDict

    def carries(self, adapter_name: str) -> bool:
        """Whether the adapter holds something here."""
        raise NotImplementedError

    def bias_delta(self, adapter_name: str) -> nn.Parameter | None:
        """The adapter's bias delta `(neurons,)`, None where it has none."""
        return self.fps_bias[adapter_name] if adapter_name in self.fps_bias and self.carries(adapter_name) else None

    # --- whether the tensors are valid ------------------------------------------------------------------------------

    def awaits_loading(self, adapter_name: str) -> bool:
        """Whether the adapter was built from a saved config and its tensors were neither loaded nor selected."""
        tensors = [*self.index_tensors(adapter_name), *self.adapter_parameters(adapter_name)]
        if any(tensor.device.type == "meta" for tensor in tensors):
            return True
        return self.carries(adapter_name) and self._is_blank(adapter_name)

    def is_away(self, adapter_name: str) -> bool:
        """Whether a parameter of the adapter is on the meta device, as after offloading."""
        return any(parameter.device.type == "meta" for parameter in self.adapter_parameters(adapter_name))

    def _is_blank(self, adapter_name: str) -> bool:
        """Whether the tensors hold what no valid adapter holds."""
        bias = self.fps_bias.get(adapter_name)
        if bias is None or (is_sharded(bias) and not own_part(bias).numel()):
            return False
        return bool(own_part(bias.detach()).isnan().all())

    def check_tensors(self, adapter_name: str) -> None:
        """Raise ValueError unless the adapter's tensors are loaded, well-formed and finite."""
        where = f"{self.module_path}: adapter {adapter_name!r}"
        if self.is_away(adapter_name):
            raise ValueError(
                f"{where} has its values on the meta device, expected loaded tensors. Load an adapter file, build "
                "the adapter without low_cpu_mem_usage, or, if accelerate offloads the model, let it do so before the "
                "adapter is attached."
            )
        if self.awaits_loading(adapter_name):
            first, *_ = (*self.index_names, "fps_bias")
            raise ValueError(
                f"{where} was built from a saved config, and its {first} were not loaded. Load an adapter file that "
                "holds them, select entries with model.calibrate(...), or start from an FPSConfig without a "
                "record."
            )
        try:
            self._check_form(adapter_name)
        except StructureError as error:
            damaged = f"Its tensors are damaged or incomplete; load an intact file. {ONLY_PARAMETERS}"
            raise ValueError(f"{where}: {error}. {damaged if self.is_finite(adapter_name) else DIVERGED}") from error

    def _check_form(self, adapter_name: str) -> None:
        """Raise StructureError unless the tensors are well-formed and finite."""
        if (bias := self.bias_delta(adapter_name)) is not None:
            check_floating("fps_bias", bias, torch.Size([self.neurons]))
            check_finite("fps_bias", bias)

    # --- before a forward -------------------------------------------------------------------------------------------

    def prepare(self, adapter_name: str) -> None:
        """Check the adapter's tensors, unless they are known to be valid.

        Raises:
            ValueError: they do not form a valid adapter of this layer, or were never loaded.
        """
        if not torch.compiler.is_compiling():
            self._prepare(adapter_name)
        elif message := self._prepare_while_tracing(adapter_name):
            raise ValueError(message)

    def is_prepared(self, adapter_name: str) -> bool:
        """Whether the adapter's tensors were checked."""
        raise NotImplementedError

    def forget(self, adapter_name: str) -> None:
        """Let the next use check the adapter's tensors."""
        raise NotImplementedError

    def is_sharded(self, adapter_name: str) -> bool:
        """Whether each process holds only a part of what the adapter trains here."""
        return any(is_sharded(each) or is_partitioned(each) for each in self.adapter_parameters(adapter_name))

    def renew(self, adapter_name: str) -> None:
        """Check the adapter's tensors now, after they have changed; invalid ones are refused in use."""
        self.forget(adapter_name)
        try:
            self._prepare(adapter_name)
        except ValueError:
            self.forget(adapter_name)

    def _prepare(self, adapter_name: str) -> None:
        raise NotImplementedError

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _prepare_while_tracing(self, adapter_name: str) -> str:
        """Prepare, and return what is wrong: raised from here, it would reach the user as an error of the compiler."""
        try:
            self._prepare(adapter_name)
        except ValueError as error:
            return str(error)
        return ""

    def _refuse_tracing(self, adapter_name: str, tensor: Tensor) -> None:
        """Raise ValueError if a tracer that cannot read tensors is at work."""
        if isinstance(tensor, FakeTensor) or is_jit_tracing():
            raise ValueError(
                f"{self.module_path}: adapter {adapter_name!r} is traced before its tensors were checked, which reads "
                "their values, expected a model that has run. Run it once on any input before you trace or export "
                "it, or merge it first with model.merge_and_unload()."
            )


def renew_after_loading(layer: CheckedLayer, incompatible_keys: Any) -> None:
    """Hook on `load_state_dict`: the new tensors of active adapters are checked, and serve compiled forwards too."""
    for name in layer.fps_state:
        if layer.is_sharded(name):
            layer.forget(name)  # to look at it now might wait for processes that load nothing
        elif layer.is_prepared(name) or name in layer.active_adapters:
            layer.renew(name)
        else:
            layer.forget(name)
