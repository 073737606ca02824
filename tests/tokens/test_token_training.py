"""A Trainer with token selection: calibration, training, evaluation, resuming."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_fps import FPSCallback, FPSConfig
from tests.support.helpers import normal, weighted_of
from tests.tokens.vision_models import build


EXAMPLES = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(normal(8, 3, 16, 16))]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-2} | options,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    return Trainer(
        model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:4], callbacks=[FPSCallback(progress=False)]
    )


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(build("vit"), FPSConfig(per_neuron=1, token_keep_rate=0.5, **options))


def values(model: Any) -> list[torch.Tensor]:
    return [layer.fps_values["default"].detach() for layer in weighted_of(model).values()]


def test_a_trainer_calibrates_trains_and_restores_the_best(tmp_path: Path) -> None:
    model = adapted()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer(model, tmp_path, **best).train()
    assert all(bool(held.any()) for held in values(model))
    report = model.selection_report()
    assert "over 8 examples" in report.method
    loaded = PeftModel.from_pretrained(build("vit"), str(tmp_path / "checkpoint-2"))
    assert loaded.selection_report().token_blocks == report.token_blocks


def test_resuming_needs_the_blocks_and_is_exact_with_them(tmp_path: Path) -> None:
    whole = adapted(token_blocks=[1, 3])
    trainer(whole, tmp_path / "whole").train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    resumed = adapted(token_blocks=[1, 3])
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=checkpoint)
    assert all(map(torch.equal, values(resumed), values(whole)))
    with pytest.raises(ValueError, match=re.escape("Make the adapter with token_blocks=[...]")):
        trainer(adapted(), tmp_path / "other").train(resume_from_checkpoint=checkpoint)
