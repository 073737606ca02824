"""What token selection saves, on a tiny model."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost import token_costs
from peft_fps.benchmarks.cost.methods import KEEP_RATES, TOKEN_METHODS, blocks_of
from peft_fps.benchmarks.cost.workload import Workload


def test_the_blocks_lie_at_the_quarters(base: PreTrainedModel) -> None:
    assert blocks_of(base) == [0, 1]
    config: Any = base.config
    config.num_hidden_layers = 12
    assert blocks_of(type(base)(config)) == [3, 6, 9]


def test_steps_memory_and_inference_of_every_keep_rate(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_costs, "in_own_processes", lambda jobs, at_once: [job() for job in jobs])
    row = token_costs.measure_tokens(workload)
    assert list(row.raw["step"]) == list(row.raw["bytes"]) == list(TOKEN_METHODS)
    assert list(row.raw["inference"]) == [f"keep-{rate:g}" for rate in KEEP_RATES]
    saved = [row.raw["bytes"][f"keep-{rate:g}"]["saved"] for rate in KEEP_RATES]
    assert saved[-1] < saved[0]
    figures = {figure.what: figure.value for figure in row.figures}
    inference = row.raw["inference"]
    assert figures["FPS, keep rate 0.5 ÷ all patches, merged and in inference"] == pytest.approx(
        inference["keep-0.5"]["median"] / inference["keep-1"]["median"]
    )
    assert len(figures) == 2 * 5 + 3
