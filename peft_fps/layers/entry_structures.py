"""The part of an FPS layer that derives where entries lie, and notices when the tensors that say so have changed.

`torch.compile` traces what reads the outcome, and calls what derives it as it is: a model need not have run before.
"""

import warnings
from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from peft_fps.layers.tensor_checks import ONLY_PARAMETERS, CheckedLayer
from peft_fps.selection import LayerShape
from peft_fps.sparse import Layout, Structure, build_structure, unite_structures
from peft_fps.sparse.transforms import outside_transforms


@dataclass(frozen=True)
class _Known:
    """A structure, the tensors that it was derived from, and their versions, which tell whether they have changed."""

    structure: Structure
    columns: Tensor
    row_counts: Tensor
    versions: tuple[int, int]


@dataclass
class Derived:
    """What is known of one adapter; this object stays while that changes, since a tracer may hold it already.

    Attributes:
        known: its structure, None before the first use.
        checksum: of the entries that this package has set, loaded or derived last; None if that is unknown. A copy of
            the layer keeps it, so that the copy notices what is written to its tensors.
    """

    known: _Known | None = None
    checksum: tuple[int, int] | None = None


class StructuredLayer(CheckedLayer):
    """The part of a layer with entries that derives where they lie.

    Attributes:
        shape: of the weight seen as `(neurons, inputs)`.
        layout: how the weight is stored.
        fps_values: per adapter `(nnz,)`, the change at each entry.
        fps_columns: per adapter `(nnz,)` int32, the input of each entry.
        fps_row_counts: per adapter `(neurons,)` int32, the number of entries of each neuron.
    """

    shape: LayerShape
    layout: Layout
    fps_values: nn.ParameterDict
    fps_columns: BufferDict
    fps_row_counts: BufferDict
    _derived: dict[str, Derived]
    _united: dict[tuple[str, ...], tuple[list[Structure], Structure, Tensor]]

    def structure(self, adapter_name: str) -> Structure:
        """Return where the adapter's entries lie, checking its tensors whenever they are not the ones last checked.

        A compiled forward looks for changes when it is compiled; later it follows those of `set_selection`,
        `load_state_dict` and `hotswap_adapter`.

        Raises:
            ValueError: the tensors do not form a valid adapter of this layer, or were never loaded.
        """
        if not torch.compiler.is_compiling():
            return self._derive(adapter_name)
        self.prepare(adapter_name)
        known = self._derived[adapter_name].known
        assert known is not None
        return known.structure

    def united_structure(self, names: list[str]) -> tuple[Structure, Tensor]:
        """Return the union of several adapters' structures, and the places of their entries in it.

        Raises:
            ValueError: as `structure` does.
        """
        structures = [self.structure(name) for name in names]
        if torch.compiler.is_compiling():
            self._unite_while_tracing(names)
            _, united, places = self._united[tuple(names)]
            return united, places
        return self._unite(names, structures)

    def renew(self, adapter_name: str) -> None:
        """Derive anew what compiled forwards read, after the tensors have changed; invalid ones are refused in use."""
        derived = self._derived[adapter_name]
        derived.known = derived.checksum = None
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
            away = self.fps_values[adapter_name].device.type == "meta"  # where something offloads them after a use
            if not away:
                return known.structure
        self._refuse_tracing(adapter_name, columns)
        with outside_transforms(columns):
            self.check_tensors(adapter_name)
            checksum = checksum_of(columns, row_counts)
        if derived.checksum not in (None, checksum):
            self._warn_of_writing(adapter_name)
        # what is derived during inference, or within torch.func, must serve training later
        with torch.inference_mode(False), outside_transforms(columns):
            structure = build_structure(columns, row_counts, self.shape.neurons, self.shape.inputs, self.layout)
        if columns.dtype != torch.int32 or row_counts.dtype != torch.int32:  # as a foreign loader left them
            columns, row_counts = columns.to(torch.int32), row_counts.to(torch.int32)
            self.fps_columns[adapter_name], self.fps_row_counts[adapter_name] = columns, row_counts
        derived.checksum = checksum
        derived.known = _Known(structure, columns, row_counts, (tensor_version(columns), tensor_version(row_counts)))
        return structure

    def _prepare(self, adapter_name: str) -> None:
        self._derive(adapter_name)

    def check_computed(self, adapter_name: str) -> None:
        """Raise ValueError if the tensors say other entries than the layer computes with; warn if it will with them.

        Writing to them through `.data` leaves no trace that the next use could notice.
        """
        derived = self._derived[adapter_name]
        columns, row_counts = self.fps_columns[adapter_name], self.fps_row_counts[adapter_name]
        if derived.checksum in (None, checksum_of(columns, row_counts)):
            return
        if derived.known is None or not _is_up_to_date(derived.known, columns, row_counts):
            self._warn_of_writing(adapter_name)
        else:
            raise ValueError(
                f"{self.module_path}: adapter {adapter_name!r} has other entries in its tensors than it computes "
                "with, expected the same. Something wrote to them through `.data`, as callbacks that average a "
                f"model's buffers do. {ONLY_PARAMETERS} Give the adapter its entries anew, by load_state_dict or "
                "Selection.apply."
            )

    def _warn_of_writing(self, adapter_name: str) -> None:
        """Warn that something other than this package has written other entries to the tensors."""
        state = self.fps_state[adapter_name]
        if not state.warned_of_indices:
            state.warned_of_indices = True
            warnings.warn(
                f"{self.module_path}: something has written other entries to the tensors of adapter {adapter_name!r}, "
                "and the model computes with them from now on. If that was not meant, averaging of buffers, which "
                f"rounds indices, is a likely cause. {ONLY_PARAMETERS}",
                stacklevel=2,
            )

    def is_prepared(self, adapter_name: str) -> bool:
        """Whether the adapter's structure is known."""
        return self._derived[adapter_name].known is not None

    def forget(self, adapter_name: str) -> None:
        """Let the next use check the adapter's tensors, and derive its structure anew."""
        derived = self._derived.setdefault(adapter_name, Derived())
        derived.known = derived.checksum = None

    def _unite(self, names: list[str], structures: list[Structure]) -> tuple[Structure, Tensor]:
        known = self._united.get(tuple(names))
        if known is None or any(old is not new for old, new in zip(known[0], structures, strict=True)):
            with torch.inference_mode(False), outside_transforms(structures[0].positions):
                known = (structures, *unite_structures(structures))
            self._united[tuple(names)] = known
        return known[1:]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unite_while_tracing(self, names: list[str]) -> None:
        self._unite(names, [self._derive(name) for name in names])


def _is_up_to_date(known: _Known, columns: Tensor, row_counts: Tensor) -> bool:
    """Return whether a structure was derived from these very tensors, and nothing has written to them since."""
    same = known.columns is columns and known.row_counts is row_counts
    return same and known.versions == (tensor_version(columns), tensor_version(row_counts))


def checksum_of(columns: Tensor, row_counts: Tensor) -> tuple[int, int]:
    """Return numbers that tell where entries lie: sums weighted by place, which differ if a single index does."""
    return _weighted_sum(columns), _weighted_sum(row_counts)


def _weighted_sum(numbers: Tensor) -> int:
    places = torch.arange(1, numbers.numel() + 1, device=numbers.device)
    return int((places * numbers.to(torch.int64)).sum())


def tensor_version(tensor: Tensor) -> int:
    """Return the number of in-place changes of a tensor so far; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
