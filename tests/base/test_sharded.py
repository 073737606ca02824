"""What sharded models are refused for."""

import pytest
from torch import nn

from peft_fps.base import sharded
from tests.helpers import adapted
from tests.language_models import tiny_mixtral


def test_packed_weights_that_are_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else of a model may be sharded: their parameters are those of no layer that could be gathered."""
    model = adapted(tiny_mixtral(), target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    experts = model.get_base_model().model.layers[0].mlp.experts
    sharded.check_whole(model, "merge", "Merge before.", allow_fsdp=True)
    monkeypatch.setattr(sharded, "DTensor", Sharded)
    experts.base_layer.down_proj = Sharded(experts.base_layer.down_proj.detach(), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp\.experts\.base_layer\.down_proj: the parameter is one of packed"):
        sharded.check_whole(model, "merge", "Merge before.", allow_fsdp=True)


class Sharded(nn.Parameter):
    """Stands for a DTensor, of which a process holds a part."""
