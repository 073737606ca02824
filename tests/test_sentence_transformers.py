"""sentence-transformers: models that take one mapping, sentence pairs, and its trainer's own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_fps
from peft_fps import FPSCallback, FPSConfig
from tests.support.helpers import base_bytes, layers_of, selected_columns, through_transformers, tiny_bert
from tests.support.words import LINES, tokenizer
from tests.training.trainers import QUIET


sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed; pip install sentence-transformers"
)
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

PAIRS = [{"anchor": line, "positive": LINES[(number + 1) % 12]} for number, line in enumerate(LINES)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_bert().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Any:
    transformer = sentence_transformers.base.modules.Transformer(str(folder))
    pooling = sentence_transformers.sentence_transformer.modules.Pooling(32)
    return sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()


def native(model: Any, config: FPSConfig) -> Any:
    model.add_adapter(config)
    return model


def inner(model: Any, config: FPSConfig) -> Any:
    model[0].model = get_peft_model(model[0].model, config)
    return model


WAYS = {"native": native, "inner": inner, "whole": get_peft_model}
EVERY_WAY = [pytest.param("native", marks=through_transformers), "inner", "whole"]


def selections(model: nn.Module) -> list[list[list[int]]]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [selected_columns(layer) for layer in layers_of(base).values()]


def features(*texts: str) -> dict[str, Tensor]:
    return dict(tokenizer()(list(texts), padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def expected(saved: Path) -> list[list[list[int]]]:
    """The selection of the plain encoder inside, from each text alone, so that nothing is padded."""
    model = get_peft_model(encoder(saved)[0].model, FPSConfig(per_neuron=2))
    model.calibrate([{"input_ids": features(text)["input_ids"]} for text in LINES], progress=False)
    return selections(model)


BATCHES: dict[str, Any] = {
    "a mapping": [features(*LINES[:6]), features(*LINES[6:])],
    "with labels": [(features(*LINES), torch.zeros(12))],
    "pairs with labels": [((features(*LINES[:6]), features(*LINES[6:])), torch.zeros(6))],
    "pairs in a list with labels": [[[features(*LINES[:6]), features(*LINES[6:])], torch.zeros(6)]],
    "pairs alone": [[features(*LINES[:6]), features(*LINES[6:])]],
    "names with prefixes": [
        {f"{column}_{name}": value for column, part in (("sentence_0", LINES[:6]), ("sentence_1", LINES[6:]))
         for name, value in features(*part).items()} | {"label": torch.zeros(6)}
    ],
}  # fmt: skip


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_calibration_by_hand_leaves_padding_out(way: str, batches: str, saved: Path, expected: Any) -> None:
    model = WAYS[way](encoder(saved), FPSConfig(per_neuron=2))
    report = peft_fps.calibrate(model, BATCHES[batches], progress=False)
    assert selections(model) == expected
    assert f"over {6 if batches.startswith(('pairs', 'names')) else 12} examples" in report.method


def test_names_with_prefixes_reach_models_that_are_called_by_name(saved: Path, expected: Any) -> None:
    model = get_peft_model(encoder(saved)[0].model, FPSConfig(per_neuron=2))
    model.calibrate(BATCHES["names with prefixes"], progress=False)
    assert selections(model) == expected


def trainer(folder: Path, model: Any, callbacks: list[Any], **options: Any) -> Any:
    defaults = QUIET | {"max_steps": 3, "learning_rate": 0.05}
    return sentence_transformers.SentenceTransformerTrainer(
        model,
        sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **(defaults | options)),
        train_dataset=Dataset.from_list(PAIRS),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("way", EVERY_WAY)
def test_the_trainer_calibrates_on_both_columns(way: str, saved: Path, tmp_path: Path, expected: Any) -> None:
    model = WAYS[way](encoder(saved), FPSConfig(per_neuron=2))
    before = base_bytes(model)
    with pytest.warns(UserWarning, match=r"1 of 13 modules .* got no gradient in all 3 steps .*pooler\.dense"):
        trainer(tmp_path, model, [FPSCallback()]).train()  # the mean of the tokens is taken past the pooler
    assert "over 12 examples" in peft_fps.selection_report(model).method
    assert selections(model) == expected
    assert base_bytes(model) == before


@pytest.mark.filterwarnings("ignore:.*got no gradient during calibration")  # the pooler
@pytest.mark.parametrize("way", EVERY_WAY)
def test_gradients_are_those_of_the_trainers_loss(way: str, saved: Path, tmp_path: Path) -> None:
    """Multiple negatives: each anchor's own positive among all of the batch, by 20 times the cosine."""
    model = WAYS[way](encoder(saved), FPSConfig(per_neuron=2, importance="gradient", bias="none"))
    run = trainer(tmp_path, model, [FPSCallback()])
    batches = list(run.get_train_dataloader())
    run.train()

    plain = encoder(saved)
    for batch in batches:
        unit = []
        for column in ("anchor", "positive"):
            ids, mask = batch[f"{column}_input_ids"], batch[f"{column}_attention_mask"]
            states = plain[0].model(input_ids=ids, attention_mask=mask).last_hidden_state
            unit.append(nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)))
        nn.functional.cross_entropy(20 * unit[0] @ unit[1].t(), torch.arange(len(unit[0]))).backward()
    inside = plain[0].model
    for path, layer in layers_of(model.get_base_model() if isinstance(model, PeftModel) else model).items():
        if "pooler" not in path:
            weight = inside.get_parameter(f"{path[path.index('encoder.') :]}.weight")
            assert selected_columns(layer) == weight.grad.abs().topk(2).indices.sort().values.tolist(), path


@pytest.mark.filterwarnings("ignore:1 of 13 modules of adapter 'default' got no gradient")  # the pooler
@pytest.mark.parametrize("way", EVERY_WAY[:2])
def test_what_was_trained_is_saved_and_loaded(way: str, saved: Path, tmp_path: Path) -> None:
    model = WAYS[way](encoder(saved), FPSConfig(per_neuron=2))
    start = model.encode(LINES, convert_to_tensor=True)
    trainer(tmp_path, model, [FPSCallback()]).train()
    model.save_pretrained(str(tmp_path / "saved"))
    trained = model.encode(LINES, convert_to_tensor=True)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert not torch.allclose(trained, start, atol=1e-3)
    assert torch.equal(loaded.encode(LINES, convert_to_tensor=True), trained)
