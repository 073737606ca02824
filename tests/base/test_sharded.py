"""Parameters that are cut up, in a group of one process, where a shard is the whole."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.sharded import gathered, has_shards, is_sharded
from tests.support.expert_models import expert_model


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def cut_up(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach().clone(), mesh), requires_grad=False)


def test_a_packed_weight_stands_for_the_parameters_of_its_owner(mesh: DeviceMesh) -> None:
    experts = expert_model("Mixtral").model.layers[0].mlp.experts
    packed = PackedWeight(experts, "down_proj")
    assert not has_shards(packed)
    experts.down_proj = cut_up(experts.down_proj, mesh)
    before = experts.down_proj.full_tensor().clone()
    assert has_shards(packed)
    with gathered([packed], keep=True):
        assert not is_sharded(packed.weight)
        packed.weight.mul_(2)
    assert is_sharded(packed.weight)
    assert torch.equal(packed.weight.full_tensor(), 2 * before)


def test_a_parameter_of_several_modules_is_one_while_it_is_whole(mesh: DeviceMesh) -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    one.weight = other.weight = cut_up(one.weight, mesh)
    before = one.weight.full_tensor().clone()
    with gathered([one, other], keep=True):
        assert one.weight is other.weight
        one.weight.add_(1)
    assert one.weight is other.weight
    assert torch.equal(other.weight.full_tensor(), before + 1)
