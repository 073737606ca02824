"""Run by two processes: the life of an adapter on models that FSDP2 has sharded, and write down what came of it."""

import json
import os
import runpy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset

from peft_fps import FPSConfig, Selection, hotswap_adapter, save_adapter
from tests.support.helpers import images, tiny_vit
from tests.training.together_program import Breaking, failing, prepared


IMPORTANCES = ("activation", "magnitude", "random")


def pixels_and_labels() -> tuple[Tensor, Tensor]:
    return images(8), torch.arange(8) % 5


def shares() -> list[list[dict[str, Tensor]]]:
    """Three batches for the first process, one for the second."""
    pixels, labels = pixels_and_labels()
    batches = [{"pixel_values": p, "labels": t} for p, t in zip(pixels.split(2), labels.split(2), strict=True)]
    return [batches[:3], batches[3:]]


def adapted(**options: Any) -> Any:
    settings: dict[str, Any] = {"budget": 0.05, "bias": "with_norms"}
    return get_peft_model(tiny_vit(), FPSConfig(**(settings | options)))


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.vit.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpointed(model: Any) -> Any:
    """As accelerate wraps the blocks for fsdp_activation_checkpointing."""
    blocks = model.base_model.model.vit.layers
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    return model


def watched(model: nn.Module) -> list[int]:
    """Numbers of elements that are there as a whole while a linear layer runs; filled by running the model."""
    found: list[int] = []

    def note(*_: Any) -> None:
        found.append(sum(p.numel() for p in model.parameters() if not isinstance(p, DTensor)))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    return found


def descend(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Three steps; the mean over both processes is the mean over all examples."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model: Any, examples: slice) -> None:
    pixels, labels = pixels_and_labels()
    descend(model, lambda: model(pixel_values=pixels[examples], labels=labels[examples]).loss)


def outcome(action: Any) -> str | None:
    """What an action says when it fails."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels_and_labels()[0]).logits


def whole_state(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def parts(model: Any) -> dict[str, bytes]:
    """What this process holds."""
    model.reshard()  # an evaluation leaves what the outermost module holds as a whole
    local = {name: parameter.detach().to_local().clone() for name, parameter in model.named_parameters()}
    return {name: tensor.numpy().tobytes() for name, tensor in local.items()}


def select(folder: Path, rank: int) -> None:
    for importance in IMPORTANCES:
        model = sharded(adapted(importance=importance))
        modes, held = [module.training for module in model.modules()], watched(model)
        report = model.calibrate(shares()[rank], progress=False)
        Selection.of(model).save(folder / f"{importance}{rank}.safetensors")
        (folder / f"{importance}{rank}.txt").write_text(str(report))
        assert [module.training for module in model.modules()] == modes
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        block = sum(parameter.numel() for parameter in model.base_model.model.vit.layers[0].parameters())
        assert max(held, default=0) <= block < total / 2, (held, block, total)
    model = sharded(adapted(importance="activation"))
    model.calibrate(prepared(Subset(Breaking(16), range(7)), rank, dispatch=True), progress=False)
    Selection.of(model).save(folder / f"dispatched{rank}.safetensors")
    scored = Selection.from_scores(model, lambda path, weight: weight.abs())
    scored.apply(model)
    Selection.of(model).save(folder / f"own{rank}.safetensors")


def live(folder: Path, rank: int) -> None:
    model = sharded(adapted())
    outputs(model)  # leaves what the outermost module holds as a whole
    model.calibrate(shares()[rank], progress=False)
    train(model, slice(4 * rank, 4 * rank + 4))
    before = outputs(model)
    save_adapter(model, folder / "adapter", is_main_process=rank == 0)
    gathered = whole_state(model)  # the same in both processes
    model.save_pretrained(folder / f"gathered{rank}", state_dict=gathered)
    dist.barrier()
    loaded = sharded(checkpointed(adapted()))
    loaded.load_adapter(folder / "adapter", "default")
    assert torch.equal(outputs(loaded), before)
    held = parts(loaded)
    loaded.merge_adapter(safe_merge=True)
    merged = outputs(loaded)
    torch.testing.assert_close(merged, before)
    assert parts(loaded) != held
    loaded.unmerge_adapter()
    assert parts(loaded) == held
    outputs(loaded)
    assert "holds trained changes" in str(outcome(lambda: loaded.calibrate(shares()[rank], progress=False)))
    save_adapter(loaded, folder / "again", is_main_process=rank == 0)
    state = whole_state(loaded.merge_and_unload())
    if rank == 0:
        torch.save({"state": state, "outputs": before, "merged": merged}, folder / "live.pt")


def refuse(folder: Path, rank: int) -> None:
    data = shares()[rank]
    after = fully_shard(tiny_vit(), mesh=init_device_mesh("cpu", (2,)))
    cases = {
        "attach": lambda: get_peft_model(after, FPSConfig(budget=0.05)),
        "gradient": lambda: sharded(adapted(importance="gradient")).calibrate(data, progress=False),
        "model": lambda: sharded(adapted(granularity="model")).calibrate(data, progress=False),
        "load": lambda: sharded(adapted(budget=0.06)).load_adapter(folder / "adapter", "default"),
        "apply": lambda: Selection.of(adapted()).apply(sharded(adapted(budget=0.06))),
        "hotswap": lambda: hotswap_adapter(sharded(adapted()), str(folder / "adapter"), "default"),
        "second": lambda: sharded(adapted()).add_adapter("second", FPSConfig(budget=0.05)),
        "combine": lambda: sharded(adapted()).add_weighted_adapter(["default"], [1.0], "second"),
    }
    (folder / f"refused{rank}.json").write_text(json.dumps({name: outcome(case) for name, case in cases.items()}))


class Choosing(nn.Module):
    """Runs the one layer or the other, as experts are chosen by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.mean() > 0 else self.other(x)


def fail(folder: Path, rank: int) -> None:
    first, second = shares()
    wrong = {"pixel_values": torch.full((2, 3, 16, 16), torch.nan)}
    cases: dict[str, Any] = {
        # data of both processes, and the one whose model fails in the second call of its second block
        "all is well": ([first, second], None),
        "one without data": ([first, iter([])], None),
        "none has data": ([[], []], None),
        "model fails": ([first, second], 0),
        "model fails where it runs for the other": ([first, second], 1),
        "reader cannot read": ([prepared(Breaking(5), rank, dispatch=True)] * 2, None),
        "model fails where one reads for all": ([prepared(Breaking(16), rank, dispatch=True)] * 2, 1),
        "wrong batch": ([first, ["text"]], None),
        "not a number": ([first, [wrong]], None),
        "cannot be sent": ([[first[0] | {"unsent": lambda: None}], []], None),
    }
    ended = {}
    for name, (data, fails) in cases.items():
        model = sharded(adapted())
        if rank == fails:
            failing(model.base_model.model.vit.layers[1], 1)
        before = parts(model), [list(module._forward_pre_hooks.values()) for module in model.modules()]
        ended[name] = outcome(partial(model.calibrate, data[rank], progress=False))
        if ended[name] is not None:
            assert parts(model) == before[0], name
        assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == before[1], name
    chooser = get_peft_model(Choosing(), FPSConfig(per_neuron=1, target_modules=["one", "other"]))
    fully_shard(chooser, mesh=init_device_mesh("cpu", (2,)))
    x = torch.ones(2, 4)
    ended["other modules"] = outcome(lambda: chooser.calibrate([x if rank == 0 else -x], progress=False))
    (folder / f"ended{rank}.json").write_text(json.dumps(ended))


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    PartialState(cpu=True)  # of accelerate, which finds the group
    for section in (select, live, refuse, fail):
        section(folder, dist.get_rank())
    dist.destroy_process_group()


def launched(folder: Path, program: str, variables: dict[str, str]) -> None:
    """Run a program as `accelerate launch` does, where accelerate believes that the CPU can do FSDP2, as it can."""
    os.environ.update(variables, ACCELERATE_USE_CPU="true")
    os.chdir(folder)
    prepared = AcceleratorState.__init__

    def prepare(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        prepared(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = prepare
    runpy.run_path(program, run_name="__main__")
    dist.destroy_process_group()
