"""Writes the files of this folder, with peft_fps as of format version 1: `python write.py`."""

from pathlib import Path

import torch
from encoder import Encoder
from peft import get_peft_model
from safetensors.torch import save_file

from peft_fps import FPSConfig, Selection


here = Path(__file__).resolve().parent
torch.manual_seed(0)
base = Encoder().eval()
saved = {f"base.{name}": tensor.clone() for name, tensor in base.state_dict().items()}
x, labels = torch.randn(12, 4, 8), torch.arange(12) % 3
saved["x"] = x
data = [(x[:6], labels[:6]), (x[6:], labels[6:])]


def fill(adapter: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter += 0.3 * torch.randn_like(parameter)


# entries, biases, norms, a head that is trained whole, and a module that no data reached
config = FPSConfig(per_neuron=2, bias="with_norms", modules_to_save=["classifier"], norm="l2")
model = get_peft_model(base, config)
model.calibrate(data, progress=False)
fill("default")
Selection.of(model).save(here / "selection.safetensors")
# no biases, nothing whole, few entries in the better of two modules
other = FPSConfig(
    importance="fisher",
    budget=0.1,
    granularity="model",
    order="bottom",
    bias="none",
    target_modules=["query"],
    modules_to_save=[],
)
model.add_adapter("other", other)
model.set_adapter("other")
model.calibrate(data, progress=False)
fill("other")
model.base_model.add_weighted_adapter(["default", "other"], [0.5, 1.0], "both")
for name in ("default", "other", "both"):
    model.set_adapter(name)
    with torch.no_grad():
        saved[f"output.{name}"] = model(x)
model.save_pretrained(here)
FPSConfig(importance="movement", budget=0.02).save_pretrained(here / "config_alone")
for card in here.rglob("README.md"):
    card.unlink()
save_file(saved, here / "outputs.safetensors")
