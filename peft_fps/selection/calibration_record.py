"""The record of how an adapter's entries were chosen, which `calibrate` and `add_weighted_adapter` write."""

from dataclasses import dataclass, fields
from typing import Any


TEXTS = ("importance", "order", "granularity", "norm", "fisher", "loss", "combination", "majority_sign_method")
COUNTS = ("seed", "selection_epochs", "batches", "examples")
NUMBERS = ("selection_learning_rate", "l0_penalty", "density")
LISTS = ("unreached", "adapters", "weights")
"""Fields of a `CalibrationRecord` by their type, without `weight_magnitude`."""


@dataclass(frozen=True)
class CalibrationRecord:
    """How the entries of an adapter were chosen.

    A field that does not apply, or is not known, is None or empty. A record without any field says that nothing is
    known. An adapter without a record has entries that were chosen without data, by the settings of its config.

    Attributes:
        importance: name of the score. For scores of the user, the name that the user gave them.
        order: `"top"` or `"bottom"`.
        granularity: value of `FPSConfig.granularity`.
        seed: seed of the `"random"` importance.
        norm, weight_magnitude, fisher, loss, selection_learning_rate, selection_epochs, l0_penalty: settings that the
            importance depends on; see `FPSConfig`.
        batches: number of batches of data.
        examples: number of examples of data.
        unreached: paths of the targeted modules that the data did not reach, and that have no entries.
        combination: `combination_type` of `add_weighted_adapter`.
        adapters: names of the combined adapters.
        weights: their weights.
        density: share of the entries that pruning kept.
        majority_sign_method: how signs were elected.

    Raises:
        ValueError: a field is not of its type.
    """

    importance: str | None = None
    order: str | None = None
    granularity: str | None = None
    seed: int | None = None
    norm: str | None = None
    weight_magnitude: bool | None = None
    fisher: str | None = None
    loss: str | None = None
    selection_learning_rate: float | None = None
    selection_epochs: int | None = None
    l0_penalty: float | None = None
    batches: int | None = None
    examples: int | None = None
    unreached: tuple[str, ...] = ()
    combination: str | None = None
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    density: float | None = None
    majority_sign_method: str | None = None

    def __post_init__(self) -> None:
        for names, kind, description in (
            (TEXTS, str, "a string"),
            (COUNTS, int, "an integer"),
            (NUMBERS, (int, float), "a number"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                    raise ValueError(f"{name} is {value!r}, expected {description} or none.")
        if not isinstance(self.weight_magnitude, bool | None):
            raise ValueError(f"weight_magnitude is {self.weight_magnitude!r}, expected True, False or none.")
        for name in ("unreached", "adapters"):
            _check_members(name, getattr(self, name), str, "names")
        _check_members("weights", self.weights, (int, float), "numbers")

    @property
    def known(self) -> bool:
        """Whether the record says anything."""
        return self != CalibrationRecord()

    def to_json(self) -> dict[str, Any]:
        """Return the known fields as plain data, with lists for tuples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, ())
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "calibration") -> "CalibrationRecord":
        """Make a record of plain data. Keys that this version does not know are left out.

        Args:
            value: a dict as `to_json` returns it. Lists may be tuples.
            where: what errors call the value.

        Raises:
            TypeError: the value is no dict.
            ValueError: a field is not of its type.
        """
        if not isinstance(value, dict):
            raise TypeError(f"{where} is {value!r} of type {type(value).__name__}, expected a dict or none.")
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {key: item for key, item in value.items() if key in known and item is not None}
        for name in LISTS:
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _check_members(name: str, members: Any, kind: Any, description: str) -> None:
    """Check that a field is a tuple of one type.

    Args:
        name: name of the field.
        members: its value.
        kind: type of the members, or a tuple of types. A bool is never one of them.
        description: what the error expects a list of.

    Raises:
        ValueError: the value is no such tuple.
    """
    if not isinstance(members, tuple) or any(isinstance(m, bool) or not isinstance(m, kind) for m in members):
        shown = list(members) if isinstance(members, tuple) else members
        raise ValueError(f"{name} is {shown!r}, expected a list of {description}.")
