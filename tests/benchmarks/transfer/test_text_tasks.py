"""Tasks of texts, on made-up words and a tiny BERT."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from peft_fps.benchmarks.transfer.cell_run import run_cell
from peft_fps.benchmarks.transfer.cells import Cell, Setting
from peft_fps.benchmarks.transfer.selection_agreement import selected
from peft_fps.benchmarks.transfer.tasks import load_task
from peft_fps.benchmarks.transfer.text_tasks import holds_texts, load_text_model, load_texts


WORDS = [f"word{number}" for number in range(30)]
TOKENS = {word: row for row, word in enumerate(["[PAD]", "[UNK]", *WORDS])}


def text(row: int) -> str:
    """Words of which the first says the class, row modulo 2; with a number of its own as the last."""
    return " ".join([WORDS[row % 2], *(WORDS[2 + (row * step) % 28] for step in range(1, 3 + row % 4)), str(row)])


def write(folder: Path, sizes: dict[str, int], classes: list[str] | None = None) -> Path:
    """Write a task whose splits hold consecutive texts."""
    folder.mkdir(parents=True)
    first = 0
    for part, count in sizes.items():
        rows = range(first, first + count)
        table = Dataset.from_dict({"text": [text(row) for row in rows], "label": [row % 2 for row in rows]})
        table.to_parquet(str(folder / f"{part}.parquet"))
        first += count
    if classes is not None:
        (folder / "meta.json").write_text(json.dumps({"classes": classes, "group": "text"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(TOKENS, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("texts")
    write(root / "tasks" / "words", {"train": 1100, "test": 60}, ["even", "odd"])
    config = BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=160,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    yield Setting(
        str(root / "model"), str(root / "tasks"), epochs=2, batch_size=32, precision="fp32", tuned_share=0.05
    )
    load_task.cache_clear()


@pytest.mark.parametrize("validation", [0, 300])
def test_splits_have_the_sizes_of_vtab_and_share_no_text(tmp_path, validation):
    sizes = {"train": 1100, "test": 60} | ({"validation": validation} if validation else {})
    parts = load_texts(write(tmp_path / "task", sizes), 2)
    assert {part: len(texts) for part, (texts, _) in parts.items()} == {"train": 800, "validation": 200, "test": 60}
    numbers = {part: [int(words.split()[-1]) for words in texts] for part, (texts, _) in parts.items()}
    assert all(labels == [row % 2 for row in numbers[part]] for part, (_, labels) in parts.items())
    assert len({row for rows in numbers.values() for row in rows}) == 1060
    assert set(numbers["train"]) <= set(range(1100))
    assert numbers["test"] == list(range(1100, 1160))
    assert (min(numbers["validation"]) >= 1160) == bool(validation)
    assert numbers["train"] != sorted(numbers["train"])
    assert load_texts(tmp_path / "task", 2) == parts


@pytest.mark.parametrize(
    "sizes",
    [
        {"train": 999, "test": 9},
        {"train": 799, "validation": 200, "test": 9},
        {"train": 800, "validation": 199, "test": 9},
        {"train": 1000},
    ],
)
def test_a_task_that_lacks_texts(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"task holds the splits .*expected a split for tests, and at least 800"):
        load_texts(write(tmp_path / "task", sizes), 2)


@pytest.mark.parametrize("classes", [None, ["even"]])
def test_labels_of_classes_that_have_no_name(tmp_path, setting, classes):
    write(tmp_path / "task", {"train": 1000, "test": 9}, classes)
    with pytest.raises(ValueError, match=r"train.parquet has .* labels \[0, 1\], expected .* below [01], the number"):
        load_task("task", Setting(setting.model, str(tmp_path)))


def test_texts_without_labels(tmp_path):
    folder = write(tmp_path / "task", {"train": 1000})
    Dataset.from_dict({"text": ["word1"]}).to_parquet(str(folder / "test.parquet"))
    with pytest.raises(ValueError, match=r"test.parquet has the columns \['text'\] and the labels \[\], expected"):
        load_texts(folder, 2)


def test_names_of_classes_that_cannot_be_read(tmp_path, setting):
    (write(tmp_path / "task", {"train": 1000, "test": 9}) / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="meta.json is no JSON"):
        load_task("task", Setting(setting.model, str(tmp_path)))


def test_what_holds_texts(tmp_path):
    assert holds_texts(write(tmp_path / "texts", {"train": 3}))
    Dataset.from_dict({"image": [1], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    assert not holds_texts(tmp_path)
    assert not holds_texts(tmp_path / "nowhere")


def test_a_batch_is_padded_to_its_longest_text(setting):
    task = load_task("words", setting)
    assert (task.name, task.group, task.classes) == ("words", "text", ["even", "odd"])
    examples = [task.splits["test"][row] for row in range(4)]
    words = [text(row).split() for row in range(1100, 1104)]
    ids = [[TOKENS.get(word, 1) for word in line] for line in words]
    longest = max(map(len, ids))
    batch = task.collator(task.load_base(0))(examples)
    assert batch["input_ids"].tolist() == [line + [0] * (longest - len(line)) for line in ids]
    assert batch["attention_mask"].tolist() == [[1] * len(line) + [0] * (longest - len(line)) for line in ids]
    assert batch["labels"].tolist() == [0, 1, 0, 1]


def test_long_texts_are_cut(setting, tmp_path):
    folder = write(tmp_path / "long", {"train": 1000}, ["even", "odd"])
    Dataset.from_dict({"text": ["word1 " * 200], "label": [1]}).to_parquet(str(folder / "test.parquet"))
    task = load_task("long", Setting(setting.model, str(tmp_path)))
    assert task.splits["test"][0]["input_ids"] == [TOKENS["word1"]] * 128


def test_the_seed_gives_the_head_and_the_rest_is_the_models(setting):
    first, same, other = (load_text_model(setting.model, ["a", "b", "c"], seed) for seed in (0, 0, 1))
    heads = [model.classifier.weight for model in (first, same, other)]
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    trunk = BertForSequenceClassification.from_pretrained(setting.model).bert.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in first.bert.state_dict().items())


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--model is .*could not be loaded"):
        load_text_model(str(tmp_path), ["a", "b"], 0)


@pytest.mark.parametrize("method", ["fps-biases", "fps-default", "lora", "full", "gps-task-biases"])
def test_methods_learn_from_texts(setting, method):
    share = None if method == "full" else 0.3
    found = run_cell(Cell("words", method, share, 0, 3e-3 if method == "full" else 1e-2), setting)
    assert found.group == "text"
    assert found.test > 0.9, found  # half of the texts belong to each class
    assert found.validation > 0.9, found
    base = load_text_model(setting.model, ["even", "odd"], 0)
    assert (found.head, found.backbone) == (2 * 32 + 2, sum(p.numel() for p in base.bert.parameters()))
    assert found.trained <= 0.3 * found.backbone or method == "full"


def test_the_linear_head_reads_frozen_texts(setting):
    found = run_cell(Cell("words", "linear", None, 0, None), setting)
    assert (found.trained, found.loss) == (0, None)
    assert 0 <= found.test <= 1


@pytest.mark.parametrize("method", ["gps-biases", "fps-augmented"])
def test_texts_have_no_augmented_views(setting, method):
    with pytest.raises(ValueError, match=f"{method} sees augmented images, and the task 'words' holds texts"):
        selected(Cell("words", method, 0.3, 0, None), setting)
