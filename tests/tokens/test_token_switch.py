"""Which share of the patches holds at the moment."""

from types import SimpleNamespace
from typing import Any

import pytest

from peft_fps.layers.adapter_state import AdapterState
from peft_fps.tokens.token_switch import TokenSwitch


def guide(active: list[str], merged: list[str] = [], disabled: bool = False, **rates: float) -> Any:  # noqa: B006
    return SimpleNamespace(
        active_adapters=active,
        merged_adapters=merged,
        disable_adapters=disabled,
        fps_state={name: AdapterState(token_keep_rate=rate) for name, rate in rates.items()},
    )


@pytest.mark.parametrize(
    ("fixed", "of", "now", "merged"),
    [
        (None, guide(["a"], a=0.5), 0.5, 1.0),
        (None, guide(["b"], a=0.5), 1.0, 1.0),
        (None, guide(["a"], disabled=True, a=0.5), 1.0, 1.0),
        (None, guide(["b"], ["a"], a=0.5), 0.5, 0.5),
        (None, guide(["a"], ["b"], a=0.5), 1.0, 1.0),
        (0.7, guide(["a"], a=0.9), 0.7, 0.7),
        (0.7, guide(["a"], ["a"], True, a=0.5), 0.7, 0.5),
        (None, guide(["a"]), 1.0, 1.0),
    ],
)
def test_the_smallest_share_of_those_that_count(fixed: float | None, of: Any, now: float, merged: float) -> None:
    switch = TokenSwitch("block", 1, fixed, {"a": of})
    assert [switch.keep_rate(), switch.merged_rate(), switch.needed] == [now, merged, True]


def test_a_block_without_adapters_and_share_is_not_needed() -> None:
    switch = TokenSwitch("block", 1)
    assert [switch.keep_rate(), switch.merged_rate(), switch.needed] == [1.0, 1.0, False]
