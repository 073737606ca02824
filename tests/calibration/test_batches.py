"""Whatever holds data becomes batches, and a batch a call."""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BatchEncoding, BatchFeature

from peft_fps.calibration import batches, feed, run_model, single_examples
from peft_fps.calibration.batches import count_examples, mask_beside
from tests.support.helpers import normal, tiny_llama, tokens


CPU = torch.device("cpu")


class Numbers(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index)]), "label": index}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"x": torch.tensor([float(i)])} for i in range(5))


def stack(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator of one's own."""
    return {"mine": torch.stack([torch.as_tensor(example["x"]) for example in examples])}


@pytest.mark.parametrize(
    "data",
    [
        Numbers(),
        Stream(),
        datasets.Dataset.from_dict({"x": [[float(i)] for i in range(5)]}),
        datasets.Dataset.from_dict({"x": [[float(i)] for i in range(5)]}).with_format("torch"),
        datasets.Dataset.from_dict({"x": [[float(i)] for i in range(5)]}).to_iterable_dataset(),
    ],
    ids=["torch", "torch-stream", "datasets", "datasets-torch", "datasets-stream"],
)
def test_datasets_are_batched_in_order(data: Any):
    found = list(batches(data, None, 2))
    assert [batch["x"].tolist() for batch in found] == [[[0.0], [1.0]], [[2.0], [3.0]], [[4.0]]]
    found = list(batches(data, stack, 3))
    assert [batch["mine"].flatten().tolist() for batch in found] == [[0.0, 1.0, 2.0], [3.0, 4.0]]


def test_the_default_collator_names_labels_as_transformers_does():
    assert set(next(iter(batches(Numbers(), None, 4)))) == {"x", "labels"}


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(Numbers(), batch_size=2),
        [torch.zeros(2)],
        ({"x": i} for i in range(2)),
        TensorDataset(torch.ones(1)),
    ],
    ids=["loader", "list", "generator", "tensors"],
)
def test_other_iterables_are_batches_already(data: Any):
    if isinstance(data, TensorDataset):  # examples are tuples, which need a collator
        assert [batch.tolist() for batch in batches(data, lambda tuples: torch.cat([t[0][None] for t in tuples]), 4)]
    else:
        assert batches(data, None, 2) is data


@pytest.mark.parametrize(
    "data",
    [
        {"x": torch.zeros(2)},
        BatchEncoding({"x": torch.zeros(2)}),
        BatchFeature({"x": torch.zeros(2)}),
        torch.zeros(2),
        "text",
        b"bytes",
    ],
    ids=lambda data: type(data).__name__,
)
def test_a_single_batch_is_refused_with_the_remedy(data: Any):
    with pytest.raises(TypeError, match=rf"single {type(data).__name__}.*Put a single batch into a list"):
        batches(data, None, 2)


@pytest.mark.parametrize("data", [3, None, nn.Linear(1, 1)], ids=["int", "None", "module"])
def test_what_cannot_be_iterated_is_refused(data: Any):
    with pytest.raises(TypeError, match=rf"of type {type(data).__name__}, expected a DataLoader"):
        batches(data, None, 2)


# --- feeding --------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.seen.append({"x": x, "mask": mask})


class Anything(Recorder):
    def forward(self, x: Tensor, **others: Any) -> None:
        self.seen.append({"x": x, **others})


X, Y = torch.arange(6.0).view(3, 2), torch.tensor([7, 8, 9])


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, Y],
        (X,),
        {"x": X},
        {"x": X, "unknown": Y, "labels": Y},
        ({"x": X}, Y),
        BatchEncoding({"x": X, "other": Y}),
    ],
    ids=["tensor", "tuple", "list", "only", "mapping", "more-names", "mapping-and-labels", "encoding"],
)
def test_feed(batch: Any):
    model = Recorder()
    assert feed(model, batch, CPU) == 3
    (seen,) = model.seen
    assert torch.equal(seen["x"], X)
    assert seen["mask"] is None


def test_a_model_that_takes_any_name_gets_all():
    model = Anything()
    assert feed(model, {"x": X, "labels": Y, "text": ["a", "b", "c"]}, CPU) == 3
    (seen,) = model.seen
    assert set(seen) == {"x", "labels", "text"}


def test_names_that_forward_takes_are_passed():
    model = Recorder()
    feed(model, {"mask": Y, "x": X}, CPU)
    assert torch.equal(model.seen[0]["mask"], Y)


class OneMapping(Recorder):
    """As sentence-transformers: one mapping, and options that are no inputs; it writes into the mapping."""

    def forward(self, input: "dict[str, Tensor]", **options: Any) -> None:
        assert not options
        self.seen.append(dict(input))
        input["states"] = X


class Unannotated(OneMapping):
    def forward(self, features):
        self.seen.append(features)


@pytest.mark.parametrize("kind", [OneMapping, Unannotated])
@pytest.mark.parametrize("labels", [(), (Y,)], ids=["alone", "with labels"])
def test_a_model_that_takes_one_mapping_gets_it(kind: type[Recorder], labels: tuple[Tensor, ...]):
    model, inputs = kind(), {"input_ids": X, "mask": Y}
    assert feed(model, (inputs, *labels) if labels else inputs, CPU) == 3
    (seen,) = model.seen
    assert set(seen) == {"input_ids", "mask"}
    assert set(inputs) == {"input_ids", "mask"}


LEFT, RIGHT = {"input_ids": X, "mask": Y}, {"input_ids": X + 1, "mask": Y + 1}
PREFIXED = {
    f"{column}_{name}": value for column, part in (("a", LEFT), ("a_b", RIGHT)) for name, value in part.items()
}


class ByName(Recorder):
    def forward(self, input_ids: Tensor | None = None, mask: Tensor | None = None, labels: Any = None) -> Tensor:
        assert input_ids is not None
        self.seen.append({"input_ids": input_ids, "mask": mask})
        return input_ids


@pytest.mark.parametrize("kind", [OneMapping, ByName])
@pytest.mark.parametrize(
    "batch",
    [(LEFT, RIGHT), [LEFT, RIGHT], ([LEFT, RIGHT], Y), [(LEFT, RIGHT), Y], {**PREFIXED, "label": Y, "labels": Y}],
    ids=["tuple", "list", "with-labels", "list-with-labels", "prefixes"],
)
def test_columns_are_a_call_each(kind: type[Recorder], batch: Any):
    model = kind()
    assert feed(model, batch, CPU) == 3
    assert [seen["input_ids"].tolist() for seen in model.seen] == [X.tolist(), (X + 1).tolist()]
    assert all(set(seen) == {"input_ids", "mask"} for seen in model.seen)
    assert [seen["mask"].tolist() for seen in model.seen] == [Y.tolist(), (Y + 1).tolist()]


def test_outputs_of_several_columns_are_listed():
    assert [out.tolist() for out in run_model(ByName(), (LEFT, RIGHT))] == [X.tolist(), (X + 1).tolist()]
    assert torch.equal(run_model(ByName(), LEFT), X)


def test_a_mapping_of_the_same_place_with_other_names_is_labels():
    model = Recorder()
    assert feed(model, ({"x": X}, {"boxes": Y}), CPU) == 3
    assert len(model.seen) == 1


@pytest.mark.parametrize(
    ("kind", "batch", "held", "takes"),
    [
        (Recorder, {"y": X}, "'y'", "x, mask"),
        (Recorder, {"mask": X}, "'mask'", "x, mask"),  # x is needed
        (ByName, {"labels": Y}, "'labels'", "input_ids, mask, labels"),
        (ByName, {"anchor": X}, "'anchor'", "input_ids, mask, labels"),
        (ByName, [{"prompt": "a"}, {"prompt": "b"}], "'prompt'", "input_ids, mask, labels"),
        (ByName, {}, "nothing", "input_ids, mask, labels"),
    ],
)
def test_a_batch_that_forward_takes_nothing_of_is_refused(kind: Any, batch: Any, held: str, takes: str):
    model = kind()
    with pytest.raises(TypeError, match=rf"holds {held}, but the forward of {kind.__name__} takes {takes}\. .*run="):
        feed(model, batch, CPU)
    assert not model.seen


def test_names_that_a_transformers_model_only_passes_on_are_no_input():
    with pytest.raises(TypeError, match="holds 'tokens', but the forward of LlamaForCausalLM takes input_ids"):
        run_model(tiny_llama(), {"tokens": tokens()})


@pytest.mark.parametrize("batch", ["text", 3, None, [3, X], [{"prompt": "a"}, {"prompt": "b"}]], ids=repr)
def test_batches_of_any_kind_go_to_a_run_of_ones_own(batch: Any):
    seen: list[Any] = []
    count = feed(Recorder(), batch, CPU, lambda model, given: seen.append((type(model), given)))
    assert seen == [(Recorder, batch)]
    assert count == (2 if isinstance(batch, list) else 1)


@pytest.mark.parametrize("batch", ["text", 3, None, [], (), ["text"], [3, X]], ids=repr)
def test_a_batch_of_another_kind_is_refused(batch: Any):
    model = Recorder()
    with pytest.raises(TypeError, match=rf"of type {type(batch).__name__}, expected a mapping of tensors"):
        feed(model, batch, CPU)
    assert not model.seen


# --- one example at a time, and how many there are -----------------------------------------------------------------


@pytest.mark.parametrize("batch", [X, (X, Y), {"x": X, "unknown": Y}, ({"x": X}, Y)], ids=["x", "xy", "map", "map-y"])
def test_run_model_returns_the_outputs(batch: Any):
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert torch.equal(run_model(Doubled(), batch), 2 * X)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 3),
        (torch.ones(()), 1),
        ((X, Y), 3),
        ({"x": X}, 3),
        ({"temperature": torch.ones(()), "flag": True, "x": X}, 3),
        ({"text": ["a", "b", "c"], "x": X}, 3),
        ({"text": ["a", "b", "c"]}, 3),
        ({"images": [torch.ones(3, 4, 4), torch.ones(3, 5, 4)]}, 2),
        ({"nested": {"x": X}, "flag": None}, 3),
        ({"flag": True}, 1),
        ({}, 1),
        (BatchFeature({"pixel_values": torch.ones(2, 3, 4, 4)}), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_count_examples(batch: Any, expected: int):
    assert count_examples(batch) == expected


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


SECOND, SEVERAL = X[1:2], [X, X + 1, X + 2]
SHARED = {"scale": torch.ones(()), "table": torch.ones(7), "flag": True}
BOXES = [{"boxes": torch.full((i + 1, 4), float(i)), "class": torch.arange(3)} for i in range(3)]


@pytest.mark.parametrize(
    ("batch", "second"),
    [
        pytest.param(X, SECOND, id="tensor"),
        pytest.param((X, Y), (SECOND, Y[1:2]), id="tuple"),
        pytest.param({"x": X, "labels": Y}, {"x": SECOND, "labels": Y[1:2]}, id="map"),
        pytest.param(({"x": X}, Y), ({"x": SECOND}, Y[1:2]), id="nested"),
        pytest.param({"x": X, **SHARED}, {"x": SECOND, **SHARED}, id="others"),
        pytest.param({"x": X, "text": ["a", "b", "c"]}, {"x": SECOND, "text": ["b"]}, id="texts"),
        pytest.param({"x": X, "labels": BOXES}, {"x": SECOND, "labels": [BOXES[1]]}, id="boxes"),
        pytest.param((X, BOXES), (SECOND, [BOXES[1]]), id="boxes-tuple"),
        pytest.param(
            {"x": X, "parts": SEVERAL}, {"x": SECOND, "parts": [part[1:2] for part in SEVERAL]}, id="several"
        ),
        pytest.param((X, Y, Y), (SECOND, Y[1:2], Y[1:2]), id="three"),  # as many parts as examples
        pytest.param(BatchEncoding({"x": X, "other": Y}), {"x": SECOND, "other": Y[1:2]}, id="encoding"),
        pytest.param([{"x": X}] * 3, [{"x": SECOND}] * 3, id="columns"),  # as many columns as examples
        pytest.param(([{"x": X}] * 3, ["a", "b", "c"]), ([{"x": SECOND}] * 3, ["b"]), id="columns-and-texts"),
    ],
)
def test_single_examples(batch: Any, second: Any):
    found = list(single_examples(batch))
    assert len(found) == 3
    assert equal(found[1], second)


def test_a_single_example_is_itself():
    (only,) = single_examples({"x": X[:1], "labels": [{"boxes": X}]})
    assert equal(only, {"x": X[:1], "labels": [{"boxes": X}]})


def test_examples_share_memory_with_their_batch():
    assert [example.data_ptr() for example in single_examples(X)] == [row.data_ptr() for row in X]


@pytest.mark.parametrize(
    ("batch", "is_mask"),
    [
        ((torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])), True),
        ((torch.tensor([[5, 0, 0], [7, 8, 9]]), torch.tensor([[True, False, False], [True, True, True]])), True),
        ((torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 0, 1], [0, 1, 1]])), False),  # labels of tokens
        ((torch.tensor([[5, 6, 0], [7, 0, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])), False),
        ((torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.ones(2, 3)), False),
        ((torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, -100, 0], [1, 1, 1]])), False),
        ((torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([1, 0])), False),
        ((normal(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])), False),
        (torch.tensor([[5, 6, 0], [7, 8, 9]]), False),
        ([torch.tensor([[5, 6, 0]])], False),
    ],
)
def test_what_is_a_mask_beside_tokens(batch: Any, is_mask: bool) -> None:
    assert (mask_beside(batch) is not None) == is_mask
