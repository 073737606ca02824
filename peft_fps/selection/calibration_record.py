"""How an adapter's entries were chosen, as `calibrate`, `Selection.apply` and `add_weighted_adapter` note it."""

from dataclasses import dataclass, fields
from typing import Any


TEXTS = ("importance", "order", "granularity", "norm", "fisher", "loss", "combination", "majority_sign_method")
COUNTS = ("seed", "selection_epochs", "batches", "examples")
NUMBERS = ("selection_learning_rate", "l0_penalty", "density")
LISTS = ("unreached", "adapters", "weights")
"""Fields of a `CalibrationRecord` by their type, without `weight_magnitude`."""


@dataclass(frozen=True)
class CalibrationRecord:
    """How the entries of an adapter were chosen. A field that does not apply, or is not known, is None or empty.

    A record without any field says that nothing is known. That is not the same as no record: an adapter without one
    was chosen without data, as its config says.

    Attributes:
        importance: name of the score; of a score of the user's own the name that the user gave it.
        order: `"top"` or `"bottom"`.
        granularity: how the entries were spread.
        seed: of the `"random"` importance.
        norm, weight_magnitude, fisher, loss, selection_learning_rate, selection_epochs, l0_penalty: settings that the
            importance depends on, see `FPSConfig`.
        batches: number of batches of data.
        examples: number of examples of data.
        unreached: paths of the targeted modules that the data did not reach, and that hold no entries.
        combination: the `combination_type` of `add_weighted_adapter`.
        adapters: names of the adapters that were combined.
        weights: their weights.
        density: share of the entries that pruning kept.
        majority_sign_method: how signs were elected.
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
        """Return the fields that are known as plain data, lists for tuples."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in held.items()
            if value not in (None, ())
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "calibration") -> "CalibrationRecord":
        """Return the record that plain data holds. Keys that this version does not know are left out.

        Args:
            value: as `to_json` returns it; lists may be tuples.
            where: what the error calls it.

        Raises:
            TypeError: the value is no dict.
            ValueError: a field is not of its type; names it.
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
    if not isinstance(members, tuple) or any(isinstance(m, bool) or not isinstance(m, kind) for m in members):
        shown = list(members) if isinstance(members, tuple) else members
        raise ValueError(f"{name} is {shown!r}, expected a list of {description}.")
