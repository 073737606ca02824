"""Which share of the patches a block keeps at the moment: that of the adapters that are active in the model."""

from peft_fps.layers.fps_layer import FPSLayer


class TokenSwitch:
    """What a block that selects tokens reads on every call. It follows the adapters without being told.

    Attributes:
        path: of the block in the base model, for messages.
        protected: number of tokens at the start of the sequence that always stay.
        fixed: keep rate of a model without the adapters that gave it; None if there is none.
        guides: by adapter that selects tokens in the block, one of its layers, which knows whether it is active.
    """

    def __init__(
        self, path: str, protected: int, fixed: float | None = None, guides: dict[str, FPSLayer] | None = None
    ) -> None:
        self.path = path
        self.protected = protected
        self.fixed = fixed
        self.guides = {} if guides is None else guides

    @property
    def needed(self) -> bool:
        """Whether the block may ever select tokens."""
        return self.fixed is not None or bool(self.guides)

    def keep_rate(self) -> float:
        """Return the share of the patches that stay: the smallest that an active or merged adapter asks for, else 1.

        Adapters that are switched off do not count.
        """
        rate = 1.0 if self.fixed is None else self.fixed
        for name, guide in self.guides.items():
            if not guide.disable_adapters:
                rate = min(rate, _rate(name, guide, guide.merged_adapters or guide.active_adapters))
        return rate

    def merged_rate(self) -> float:
        """Return the share that stays when the adapters that are merged now become part of the model."""
        rate = 1.0 if self.fixed is None else self.fixed
        return min([rate, *(_rate(name, guide, guide.merged_adapters) for name, guide in self.guides.items())])


def _rate(adapter_name: str, guide: FPSLayer, present: list[str]) -> float:
    """Return the keep rate of an adapter, 1 if it selects no tokens or is not present.

    Args:
        adapter_name: name of the adapter.
        guide: one of its layers.
        present: names of the adapters that count: the active or the merged ones.
    """
    state = guide.fps_state.get(adapter_name)
    if adapter_name not in present or state is None or state.token_keep_rate is None:
        return 1.0
    return state.token_keep_rate
