"""TRL's `SFTTrainer` with an `FPSConfig`: calibration, then training; the base model stays; saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_fps import FPSCallback, FPSConfig
from tests.helpers import base_bytes, layers_of, selected_columns, tiny_gpt2, tiny_llama, tokens


trl = pytest.importorskip("trl", reason="trl is not installed; pip install trl")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # renamed in transformers

WORDS = [f"w{number}" for number in range(46)]
LINES = [" ".join(WORDS[(start + step) % 46] for step in range(3 + start % 4)) for start in range(12)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def trainer(folder: Path, base: Any, config: FPSConfig, callbacks: list[Any], **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return trl.SFTTrainer(
        base,
        trl.SFTConfig(str(folder), **(defaults | options)),
        train_dataset=Dataset.from_list([{"text": line} for line in LINES]),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )


def selections(model: Any) -> dict[str, list[list[int]]]:
    return {path: selected_columns(layer) for path, layer in layers_of(model).items()}


def lines_of(*numbers: int) -> list[torch.Tensor]:
    """Token ids of the lines as the trainer makes them, each alone."""
    vocabulary = tokenizer()
    return [torch.tensor([vocabulary(LINES[number])["input_ids"] + [vocabulary.eos_token_id]]) for number in numbers]


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "packed": {"packing": True, "max_length": 16},
    "by gradients": {"importance": "gradient"},
    "over the whole model": {"granularity": "model"},
}


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_trains_the_selected_entries_alone_and_saves_and_loads_them(build: Any, way: str, tmp_path: Path) -> None:
    options = dict(OPTIONS[way])
    chosen = {name: options.pop(name) for name in ("importance", "granularity") if name in options}
    run = trainer(tmp_path, build(), FPSConfig(per_neuron=2, **chosen), [FPSCallback()], **options)
    model = run.model
    assert isinstance(model, PeftModel)
    before, by_magnitude = base_bytes(model), selections(model)
    run.train()
    assert "examples" in model.selection_report().method
    assert selections(model) != by_magnitude
    assert base_bytes(model) == before
    learned = [layer.fps_values["default"] for layer in layers_of(model).values()]
    assert all(bool(values.any()) for values in learned if values.numel())

    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).logits)
        assert not torch.allclose(build()(input_ids=tokens()).logits, loaded(input_ids=tokens()).logits, atol=1e-3)


def test_the_callback_calibrates_on_the_trainers_own_texts_without_padding(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_llama(), FPSConfig(per_neuron=3), [FPSCallback()], max_steps=1)
    run.train()
    other = trainer(tmp_path, tiny_llama(), FPSConfig(per_neuron=3), []).model
    other.calibrate([{"input_ids": ids} for ids in lines_of(*range(12))], progress=False)
    assert selections(run.model) == selections(other)


def test_calibration_by_hand_before_training_is_as_good(tmp_path: Path) -> None:
    by_hand, by_callback = (
        trainer(tmp_path, tiny_llama(), FPSConfig(per_neuron=2), callbacks) for callbacks in ([], [FPSCallback()])
    )
    by_hand.model.calibrate(by_hand.get_train_dataloader(), progress=False)
    chosen = selections(by_hand.model)
    for run in (by_hand, by_callback):
        run.train()
        assert selections(run.model) == chosen
    for path, layer in layers_of(by_hand.model).items():
        assert torch.equal(layer.fps_values["default"], layers_of(by_callback.model)[path].fps_values["default"])


def test_without_calibration_it_says_which_line_to_add(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_llama(), FPSConfig(per_neuron=2), [], max_steps=1)
    with pytest.warns(UserWarning, match=r"model\.calibrate\(train_dataloader\).*callbacks=\[FPSCallback\(\)\]"):
        run.train()
