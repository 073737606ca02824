"""What all layers of one adapter share, and what a failed load puts back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.selection.calibration_record import CalibrationRecord


@dataclass(frozen=True)
class Evaluation:
    """What a Trainer has measured of an adapter, during training or after it.

    Attributes:
        step: number of training steps before the evaluation.
        metrics: finite numbers by name, without the Trainer's prefix `eval_`.
        dataset: `name` and `type` of the data set, perhaps also `config` and `split`. The type is the id of a data set
            on the Hub, or `"unknown"`.
    """

    step: int
    metrics: Mapping[str, float]
    dataset: Mapping[str, str] = field(default_factory=lambda: {"name": "evaluation set", "type": "unknown"})

    @property
    def when(self) -> str:
        """When the evaluation was, as the end of a sentence."""
        return f"after {self.step:,} training step{'' if self.step == 1 else 's'}"


@dataclass
class AdapterState:
    """What all layers of one adapter share.

    Attributes:
        selected: whether its entries are those that its config asks for: calibrated, loaded, or chosen by a score that
            needs no data.
        warned: whether the warning about training without calibration was given.
        warned_of_write: whether the warning about a base weight that something writes to was given.
        warned_of_indices: whether the warning about index tensors that something writes to was given.
        warned_of_change_while_merged: whether the warning about a merged weight that something has changed was given.
        calibration: how its entries were chosen; None if they were chosen without data, or that is unknown.
        base_fingerprint: of the base weights; None if they could not be read.
        saved_inputs: what the layers keep of their inputs for backward, see `FPSConfig`.
        unreached: paths of modules that no data has reached, which hold neither entries nor a bias delta.
        inert_biases: paths of modules whose bias does not change the output, see `has_inert_bias`. The adapter has a
            bias delta there only if it came with one.
        buffers: digests of the base model's buffers when the adapter was added, by name.
        before: the model before an adapter file began to load, to be restored if the file is refused. None once the
            file is loaded, and for an adapter that came from no file.
        base_parameters: number of parameters of the base model without its output head; None if it was not counted.
        evaluation: the newest evaluation by a Trainer, for the model card; None if there was none.
        token_keep_rate: share of the patches that stay in the blocks that select tokens, at the moment; None if the
            adapter selects no tokens.
        token_blocks: indices of these blocks; None until they are chosen.
        gate_penalty: weight of the sparsity term of the adapter's gates; None if it has no gates.
    """

    selected: bool = False
    warned: bool = False
    warned_of_write: bool = False
    warned_of_indices: bool = False
    warned_of_change_while_merged: bool = False
    calibration: CalibrationRecord | None = None
    base_fingerprint: Mapping[str, str] | None = None
    saved_inputs: str = "rebuild"
    unreached: set[str] = field(default_factory=set)
    inert_biases: frozenset[str] = frozenset()
    buffers: dict[str, str] = field(default_factory=dict)
    before: "Before | None" = None
    base_parameters: int | None = None
    evaluation: Evaluation | None = None
    token_keep_rate: float | None = None
    token_blocks: tuple[int, ...] | None = None
    gate_penalty: float | None = None


@dataclass(frozen=True)
class Before:
    """What PEFT changes in a model by adding an adapter, as it was before.

    Attributes:
        trainable: every parameter and whether it required grad.
        active: layers, modules that other adapters train whole, and what was active there.
        merged: layers and the adapters that were merged there.
    """

    trainable: list[tuple[nn.Parameter, bool]]
    active: list[tuple[Any, Any]]
    merged: list[tuple[BaseTunerLayer, list[str]]]

    @classmethod
    def of(cls, model: nn.Module) -> "Before":
        """Return the present state of a model."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        holders: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
        layers = [module for module in holders if isinstance(module, BaseTunerLayer)]
        return cls(
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            [(module, module._active_adapter) for module in holders],
            [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged],
        )

    def restore(self) -> None:
        """Put the state back. Adapters that were merged are merged again, with what they hold now."""
        for module, active in self.active:
            module._active_adapter = active
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for layer, names in self.merged:
            if not layer.merged:
                layer.merge(adapter_names=names)
