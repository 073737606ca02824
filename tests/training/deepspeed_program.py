"""Run by two processes: training through the Trainer with DeepSpeed's ZeRO stages on the CPU, and what came of it."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_fps import FPSCallback, FPSConfig, last_complete_checkpoint
from tests.support.helpers import tiny_vit
from tests.training.ddp_program import Images


STAGES = (1, 2)
PARTITION_ALL = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
"""By default small parameters stay whole."""


def adapted() -> Any:
    return get_peft_model(tiny_vit(3), FPSConfig(budget=0.06))


def trainer(model: Any, folder: Path, stage: int) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        weight_decay=0.0,
        deepspeed={
            "zero_optimization": {"stage": stage} | (PARTITION_ALL if stage == 3 else {}),
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=Images(), callbacks=[FPSCallback()])


def train(folder: Path, stage: int) -> None:
    """Train to the end; then once more from the first checkpoint on."""
    for name in ("adapter", "resumed"):
        training = trainer(adapted(), folder, stage)
        training.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
        training.save_model(str(folder / name))
        told = [each.centring for each in training.callback_handler.callbacks if isinstance(each, FPSCallback)]
        (folder / f"centring{dist.get_rank()}.txt").write_text(*told)
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "run" / "checkpoint-4" / "trainer_state.json").unlink()
        dist.barrier()


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed: Any = import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
    # accelerate knows DeepSpeed only on accelerators
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    for stage in STAGES:
        (folder / str(stage)).mkdir(exist_ok=True)
        train(folder / str(stage), stage)
    try:
        trainer(adapted(), folder / "3", 3).train()
    except ValueError as error:
        (folder / f"refused{dist.get_rank()}.txt").write_text(str(error))
    model = adapted()
    model.calibrate([{"pixel_values": Images().pixels[dist.get_rank() :: 2]}], progress=False)
    training = trainer(model, folder / "3", 3)
    training.train()
    training.save_model(str(folder / "3" / "adapter"))
    dist.destroy_process_group()
