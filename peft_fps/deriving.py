"""The part of an FPS layer that derives where entries lie, and notices when the tensors that say so have changed.

Checking the tensors reads their values, which no tracer can follow. So `torch.compile` is told to call the methods
that read as they are, while it traces, and to trace what reads the outcome: a model need not have run before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from peft_fps.latest import version
from peft_fps.selection import LayerShape
from peft_fps.sharded import is_sharded
from peft_fps.sparse import Structure, build_structure, is_jit_tracing, unite_structures


@dataclass(frozen=True)
class _Known:
    """A structure and the very tensors it was derived from, to notice when they are replaced or overwritten."""

    structure: Structure
    columns: Tensor
    row_counts: Tensor
    versions: tuple[int, int]


@dataclass
class Derived:
    """What is known of one adapter; this object stays while that changes, since a tracer may hold it already."""

    known: _Known | None = None


class DerivingLayer:
    """The structures of a layer's adapters.

    Attributes:
        module_path: path of the layer in the base model, for messages.
        shape: neurons and fan-in.
        transposed: whether the weight is stored as `(inputs, neurons)`.
        fps_columns: per adapter `(nnz,)`.
        fps_row_counts: per adapter `(neurons,)`.
        active_adapters: names of the active ones.
    """

    module_path: str
    shape: LayerShape
    transposed: bool
    fps_columns: BufferDict
    fps_row_counts: BufferDict
    active_adapters: list[str]
    _derived: dict[str, Derived]
    _united: dict[tuple[str, ...], tuple[list[Structure], Structure, Tensor]]

    def check_tensors(self, adapter_name: str) -> None:
        """Raise ValueError unless the adapter's tensors are loaded, well-formed and finite."""
        raise NotImplementedError

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's trained tensors."""
        raise NotImplementedError

    def structure(self, adapter_name: str) -> Structure:
        """Return where the adapter's entries lie, checking its tensors whenever they are not the ones last checked.

        A compiled forward looks for changes when it is compiled; later it follows those of `set_selection`,
        `load_state_dict` and `hotswap_adapter`.

        Raises:
            ValueError: the tensors do not form a valid adapter of this layer, or were never loaded.
        """
        if not torch.compiler.is_compiling():
            return self._derive(adapter_name)
        if message := self._derive_while_tracing(adapter_name):
            raise ValueError(message)
        known = self._derived[adapter_name].known
        assert known is not None
        return known.structure

    def united_structure(self, names: list[str]) -> tuple[Structure, Tensor]:
        """Return the union of several adapters' structures, and the places of their entries in it; raises alike."""
        structures = [self.structure(name) for name in names]
        if torch.compiler.is_compiling():
            self._unite_while_tracing(names)
            _, united, places = self._united[tuple(names)]
            return united, places
        return self._unite(names, structures)

    def renew(self, adapter_name: str) -> None:
        """Derive anew what compiled forwards read, after the tensors have changed; invalid ones are refused in use."""
        derived = self._derived[adapter_name]
        try:
            self._derive(adapter_name)
            for names in [names for names in self._united if adapter_name in names]:
                self._unite(list(names), [self._derive(name) for name in names])
        except ValueError:
            derived.known = None

    def _derive(self, adapter_name: str) -> Structure:
        derived = self._derived[adapter_name]
        known, columns, row_counts = derived.known, self.fps_columns[adapter_name], self.fps_row_counts[adapter_name]
        if known is not None and (_is_up_to_date(known, columns, row_counts) or isinstance(columns, FakeTensor)):
            return known.structure
        if isinstance(columns, FakeTensor) or is_jit_tracing():
            raise ValueError(
                f"{self.module_path}: adapter {adapter_name!r} is traced before its tensors were checked, which reads "
                "their values, expected a model that has run. Run it once on any input before you trace or export "
                "it, or merge it first with model.merge_and_unload()."
            )
        self.check_tensors(adapter_name)
        with torch.inference_mode(False):  # what is derived during inference must serve training later
            structure = build_structure(columns, row_counts, self.shape.neurons, self.shape.inputs, self.transposed)
        if columns.dtype != torch.int32 or row_counts.dtype != torch.int32:  # as a foreign loader left them
            columns, row_counts = columns.to(torch.int32), row_counts.to(torch.int32)
            self.fps_columns[adapter_name], self.fps_row_counts[adapter_name] = columns, row_counts
        derived.known = _Known(structure, columns, row_counts, (version(columns), version(row_counts)))
        return structure

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _derive_while_tracing(self, adapter_name: str) -> str:
        """Derive, and return what is wrong: raised from here, it would reach the user as an error of the compiler."""
        try:
            self._derive(adapter_name)
        except ValueError as error:
            return str(error)
        return ""

    def _unite(self, names: list[str], structures: list[Structure]) -> tuple[Structure, Tensor]:
        known = self._united.get(tuple(names))
        if known is None or any(old is not new for old, new in zip(known[0], structures, strict=True)):
            with torch.inference_mode(False):
                known = (structures, *unite_structures(structures))
            self._united[tuple(names)] = known
        return known[1:]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unite_while_tracing(self, names: list[str]) -> None:
        self._unite(names, [self._derive(name) for name in names])


def renew_after_loading(layer: DerivingLayer, incompatible_keys: Any) -> None:
    """Hook on `load_state_dict`: the new tensors of active adapters are checked, and serve compiled forwards too."""
    for name, derived in layer._derived.items():
        if any(is_sharded(parameter) for parameter in layer.adapter_parameters(name)):
            derived.known = None  # to look at it now might wait for processes that load nothing
        elif derived.known is not None or name in layer.active_adapters:
            layer.renew(name)


def _is_up_to_date(known: _Known, columns: Tensor, row_counts: Tensor) -> bool:
    same = known.columns is columns and known.row_counts is row_counts
    return same and known.versions == (version(columns), version(row_counts))
