"""The sizes of an adapter's part of one module, as a record in a file holds them."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleSizes:
    """The sizes of one module's part of an adapter.

    Attributes:
        neurons: rows of the weight.
        inputs: columns of the weight. 0 if the adapter changes only a bias.
        entries: number of selected entries, at most neurons times inputs.

    Raises:
        ValueError: a size is no integer, is negative, or there are more entries than weights.
    """

    neurons: int
    inputs: int
    entries: int

    def __post_init__(self) -> None:
        sizes = asdict(self)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes.values()):
            raise ValueError(f"is {sizes!r}, expected integers of at least 0.")
        if self.entries > self.neurons * self.inputs:
            raise ValueError(f"is {sizes!r}, expected at most neurons times inputs entries.")

    @property
    def is_norm(self) -> bool:
        """Whether the module is a normalisation, of which only the bias is trained. Files mark it by 0 inputs."""
        return self.inputs == 0
