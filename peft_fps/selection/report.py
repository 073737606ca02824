"""The report of a selection: numbers per module and in total, as data and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerSelection:
    """The selection of one targeted module.

    Attributes:
        module: path of the module.
        neurons: rows of its weight.
        inputs: fan-in of a neuron.
        entries: number of selected entries.
        biases: number of bias deltas.
        bytes: bytes of its tensors in the adapter file.
        relative_change: mean of ‖M(x)‖ / ‖W₀x‖ over the positions of probed data, M the change of the adapter. None
            without a probe, and where the data did not reach the module.
        passing: share of these positions at which the change counts. 1 without a gate, None where
            `relative_change` is.
    """

    module: str
    neurons: int
    inputs: int
    entries: int
    biases: int
    bytes: int
    relative_change: float | None = field(default=None, kw_only=True)
    passing: float | None = field(default=None, kw_only=True)

    @property
    def share(self) -> float:
        """Selected share of the module's weights."""
        return self.entries / max(self.neurons * self.inputs, 1)


@dataclass(frozen=True)
class NormSelection(LayerSelection):
    """One normalisation. Only its bias is trained, so it has no inputs and no entries."""

    inputs: int = field(default=0, init=False)
    entries: int = field(default=0, init=False)


@dataclass(frozen=True)
class SelectionReport:
    """The selection of an adapter; `str()` gives a table, `to_dict()` plain data.

    Attributes:
        layers: one item per targeted module, normalisations as `NormSelection`.
        base_parameters: number of parameters of the base model without its output head.
        head_parameters: number of parameters of the trained output head and other `modules_to_save`.
        head_bytes: bytes of these in the adapter file.
        budget: the configured limit as a share of `base_parameters`. None with `per_neuron`.
        method: one line on how the entries were chosen.
        unreached: paths of modules that the calibration data did not reach, and that are not trained.
        inert_biases: numbers of neurons by path of the modules whose bias is not trained since it cannot change the
            output. The file has placeholders for them.
        token_keep_rate: share of the patches that stay where tokens are selected. None if none are selected.
        token_blocks: indices of the blocks that select tokens.
        tied: paths of modules that share the weight of an adapted embedding and compute with its changes, by path of
            the embedding.
        unseen: number of entries at tokens that the calibration data did not hold, by path of the embedding. Only the
            report of a calibration knows it.
        left_out: weights above 1 % of the base model that are neither adapted nor trained whole: their shares of all
            its parameters, by full name. Weights of one name in several blocks count together, under a name with `*`
            for the numbers of the blocks.
    """

    layers: tuple[LayerSelection, ...]
    base_parameters: int
    head_parameters: int
    head_bytes: int
    budget: float | None
    method: str
    unreached: tuple[str, ...] = ()
    token_keep_rate: float | None = None
    token_blocks: tuple[int, ...] = ()
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unseen: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, float] = field(default_factory=dict)
    inert_biases: Mapping[str, int] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Number of selected entries of all modules."""
        return sum(layer.entries for layer in self.layers)

    @property
    def biases(self) -> int:
        """Number of bias deltas of all modules."""
        return sum(layer.biases for layer in self.layers)

    @property
    def trained(self) -> int:
        """Number of selected entries and bias deltas, which the budget limits."""
        return self.entries + self.biases

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the adapter file, the head included."""
        return sum(layer.bytes for layer in self.layers) + self.head_bytes

    @property
    def share(self) -> float:
        """`trained` as a share of `base_parameters`, which the budget limits. The head counts on neither side."""
        return self.trained / self.base_parameters

    @property
    def share_with_head(self) -> float:
        """The papers' "Params (%)" as a share. The head counts in the numerator but not in the denominator."""
        return (self.trained + self.head_parameters) / self.base_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties as plain data."""
        derived = ("entries", "biases", "trained", "bytes", "share", "share_with_head")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        probed = any(layer.relative_change is not None for layer in self.layers)
        more = ("change", "passing") if probed else ()
        rows: list[tuple[str, ...]] = [
            ("module", "neurons", "fan-in", "entries", "per neuron", "share", "biases", "bytes", *more)
        ]
        for layer in self.layers:
            rows.append(
                (
                    layer.module,
                    f"{layer.neurons:,}",
                    f"{layer.inputs:,}",
                    f"{layer.entries:,}",
                    f"{layer.entries / layer.neurons:.2f}",
                    f"{layer.share:.3%}",
                    f"{layer.biases:,}",
                    f"{layer.bytes:,}",
                    *(_probed(layer) if probed else ()),
                )
            )
        neurons = sum(layer.neurons for layer in self.layers if not isinstance(layer, NormSelection))
        weights = sum(layer.neurons * layer.inputs for layer in self.layers)
        rows.append(
            (
                "total",
                f"{neurons:,}",
                "",
                f"{self.entries:,}",
                f"{self.entries / neurons:.2f}" if neurons else "",
                f"{self.entries / weights:.3%}" if weights else "",
                f"{self.biases:,}",
                f"{self.bytes - self.head_bytes:,}",
                *("",) * len(more),
            )
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        limit = "" if self.budget is None else f", budget {self.budget:.3%}"
        summary = [
            f"selected by {self.method}",
            f"trainable without head: {self.trained:,} of {self.base_parameters:,} ({self.share:.4%}{limit})",
            f"trainable with head:    {self.trained + self.head_parameters:,} ({self.share_with_head:.4%}, "
            "the papers' convention)",
            f"adapter file:           {self.bytes:,} bytes, of these {self.head_bytes:,} for the head",
        ]
        if not self.head_parameters:
            summary.append("no module is trained whole: a new output head has to be named in modules_to_save")
        if self.token_keep_rate is not None:
            blocks = ", ".join(map(str, self.token_blocks))
            summary.append(
                f"tokens:                 {self.token_keep_rate:.1%} of the patches stay in blocks {blocks}, the "
                "others become one"
            )
        if self.unreached:
            summary.append(f"not reached by calibration, not trained: {', '.join(self.unreached)}")
        if self.inert_biases:
            number = len(self.inert_biases)
            summary.append(
                f"biases of {number} key projection{'' if number == 1 else 's'} "
                f"({sum(self.inert_biases.values()):,} numbers) are left out: softmax cancels them"
            )
        for embedding, uses in self.tied.items():
            summary.append(f"tied weights: the changes of {embedding} count in {', '.join(uses)} too")
        for embedding, number in self.unseen.items():
            summary.append(f"at tokens that calibration never saw: {number:,} entries of {embedding}")
        names = [f"{name} ({share:.1%})" for name, share in self.left_out.items()]
        summary.append(f"left out, above 1 % of the model: {', '.join(names) or 'nothing'}")
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *summary])


def _probed(layer: LayerSelection) -> tuple[str, str]:
    """Return the cells of a row on the probe, relative change and share of positions. They are empty without one."""
    if layer.relative_change is None or layer.passing is None:
        return "", ""
    return f"{layer.relative_change:.4f}", f"{layer.passing:.1%}"
