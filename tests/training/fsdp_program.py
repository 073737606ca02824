"""Run by two processes: train a sharded model (FSDP2) beside the whole one, then ask for what needs whole weights."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ViTConfig, ViTForImageClassification

from peft_fps import FPSConfig


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    return get_peft_model(base, FPSConfig(budget=0.05))


def train(model, pixels, labels):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def refusal(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pixels, labels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    whole, sharded = model(), model()
    for each in (whole, sharded):
        each.calibrate([{"pixel_values": pixels}], progress=False)
    train(whole, pixels, labels)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.base_model.model.vit.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    mine = slice(8 * rank, 8 * rank + 8)
    train(sharded, pixels[mine], labels[mine])
    gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    refusals = {
        "calibrate": refusal(lambda: sharded.calibrate([{"pixel_values": pixels}], discard_values=True)),
        "merge": refusal(sharded.merge_adapter),
        "merge_and_unload": refusal(sharded.merge_and_unload),
        "save": refusal(lambda: sharded.save_pretrained(folder / "refused")),
    }
    if rank == 0:
        expected = get_peft_model_state_dict(whole)
        found = get_peft_model_state_dict(sharded, state_dict=gathered)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        (folder / "refusals.json").write_text(json.dumps(refusals))
    dist.destroy_process_group()
