"""Run by several processes: calibrate and train a tiny ViT with the Trainer, and write down what came of it."""

import os
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, ViTConfig, ViTForImageClassification

from peft_fps import FPSCallback, FPSConfig, Selection
from tests.training.trainers import arguments


IMAGES = 32


class Images(Dataset):
    def __init__(self):
        self.pixels = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": torch.tensor(index % 3)}


def train(folder: Path, batch_size: int, importance: str, **options) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    centred = importance == "activation"
    model = get_peft_model(base, FPSConfig(budget=0.05, bias="all" if centred else "none", importance=importance))
    options |= {"per_device_train_batch_size": batch_size, "num_train_epochs": 2, "max_steps": -1}
    settings = arguments(folder / "run", weight_decay=0.0, save_strategy="epoch", seed=0, **options)
    trainer = Trainer(model, settings, train_dataset=Images(), callbacks=[FPSCallback(centred=centred)])
    trainer.train()
    rank = os.environ.get("RANK", "0")
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    Selection.of(model).save(folder / f"selection{rank}.safetensors")
    state = model.state_dict()
    torch.save(
        {name: state[name] for name in state if "fps_" in name or "modules_to_save" in name}, folder / f"{rank}.pt"
    )
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "classifier" not in name)


def main(folder: Path, batch_size: int, importances: tuple[str, ...], environment: dict[str, str]) -> None:
    """Train with every importance, each in a folder of its own, with the batch size of a process."""
    os.environ.update(environment)
    for chosen_by in importances:
        train(folder / chosen_by, batch_size, chosen_by, ddp_backend="gloo", ddp_find_unused_parameters=False)
    torch.distributed.destroy_process_group()
