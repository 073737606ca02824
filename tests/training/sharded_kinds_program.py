"""Run by two processes: embeddings, packed experts and attention under FSDP2, and what came of it."""

from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from peft_fps import FPSConfig, Selection
from tests.support.helpers import tokens
from tests.training.sharded_program import descend, whole_state


CASES = {
    f"{'tied' if tied else 'apart'}, {units}": (tied, units)
    for tied, units in product((False, True), ("one unit", "units"))
}
TARGETS: dict[str, Any] = {
    "target_modules": ["embedding", "in_proj", "out_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


class Kinds(nn.Module):
    """Tokens, attention, experts, and a head that may have the weight of the tokens."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.router = nn.Linear(8, 4)
        config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=4)
        config._experts_implementation = "grouped_mm"
        self.experts = MixtralExperts(config)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = (x + self.attention(x, x, x, need_weights=False)[0]).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return self.head(x + self.experts(x, chosen, weights))


def base(tied: bool) -> Kinds:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Kinds(tied)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def adapted(tied: bool) -> Any:
    return get_peft_model(base(tied), FPSConfig(per_neuron=2, **TARGETS))


def sharded(model: Any, units: str) -> Any:
    mesh, inner = init_device_mesh("cpu", (2,)), model.base_model.model
    for part in (inner.attention, inner.experts) if units == "units" else ():
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in tokens(8, 7).split(2)]


def train(model: Any, examples: slice) -> None:
    ids = tokens(8, 7)[examples]
    descend(model, lambda: cross_entropy(model(ids), ids.flatten()))


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model.eval()(tokens(8, 7))


def live(folder: Path, rank: int, tied: bool, units: str) -> None:
    model = sharded(adapted(tied), units)
    model.calibrate(batches()[2 * rank : 2 * rank + 2], progress=False)
    Selection.of(model).save(folder / f"selection{rank}.safetensors")
    train(model, slice(4 * rank, 4 * rank + 4))
    before = outputs(model)
    model.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    dist.barrier()
    loaded = sharded(adapted(tied), units)
    loaded.load_adapter(folder / "adapter", "default")
    assert torch.equal(outputs(loaded), before)
    loaded.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(loaded), before)
    loaded.unmerge_adapter()
    assert torch.equal(outputs(loaded), before)
    state = whole_state(loaded.merge_and_unload())
    if rank == 0:
        torch.save({"state": state, "outputs": before}, folder / "live.pt")


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, case in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        live(folder / name, dist.get_rank(), *case)
    dist.destroy_process_group()
