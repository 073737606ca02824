"""How large an adapter's part of one module is."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleSizes:
    """The sizes of one module's part of an adapter.

    Attributes:
        neurons: rows of the weight.
        inputs: columns of the weight; 0 where the adapter changes a bias alone.
        entries: selected entries, at most neurons times inputs.
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
        """Whether the module is a norm, whose bias alone is trained; files say so by 0 inputs."""
        return self.inputs == 0
