"""Which selections are compared, and how far they agree."""

import re
from itertools import product

import pytest
import torch
from peft import get_peft_model

from peft_fps import FPSConfig, Selection
from peft_fps.benchmarks.transfer import selection_agreement
from peft_fps.benchmarks.transfer.cells import Cell
from peft_fps.benchmarks.transfer.selection_agreement import Agreement, measure, overlap_table, selected
from peft_fps.selection.entries import ModuleEntries
from peft_fps.vision.classifiers import load_model
from tests.benchmarks.transfer.conftest import picture


SHARE, SEED = 0.05, 3


def manually(setting, **options) -> Selection:
    base = load_model(setting.model, ["x", "y", "z"], SEED)
    model = get_peft_model(base, FPSConfig(budget=SHARE, bias="none", **options))
    labels = [label for label in range(3) for _ in range(5)]
    levels = torch.stack([torch.from_numpy(picture("bright", label, i % 5)) for i, label in enumerate(labels)])
    pixels = levels.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    if options.get("importance") not in ("magnitude", "random"):
        # one image after the other: what is summed up does not depend on batches
        model.calibrate(
            [{"pixel_values": p[None], "labels": torch.tensor([y])} for p, y in zip(pixels, labels, strict=True)],
            progress=False,
        )
    return Selection.of(model)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fps", {}),
        ("fps-l2", {"norm": "l2"}),
        ("fps-layer", {"granularity": "layer"}),
        ("fish-mask", {"importance": "fisher", "granularity": "model"}),
        ("magnitude", {"importance": "magnitude"}),
        ("random", {"importance": "random", "seed": SEED}),
    ],
)
def test_what_a_cell_would_train_is_what_a_calibration_selects(method, options, setting):
    found = selected(Cell("bright", method, SHARE, SEED, None), setting)
    # sums in another order may swap neighbours among the scores
    assert found.overlap(manually(setting, **options)).total > 0.995


@pytest.mark.parametrize("method", ["linear", "full", "bitfit", "lora", "shira", "supertuning"])
def test_a_method_without_a_selection_is_refused(method, setting):
    with pytest.raises(ValueError, match=re.escape(f"--methods has {method!r}, which selects no entries")):
        selected(Cell("bright", method, SHARE, 0, None), setting)


def test_more_images_than_a_task_has_are_refused(setting):
    with pytest.raises(ValueError, match="fps-128-images selects from 128 images"):
        selected(Cell("stripes", "fps-128-images", SHARE, 0, None), setting)


def chosen_columns(method: str, task: str, seed: int) -> list[int]:
    """Columns of one neuron of ten: fps moves with the task, gps with the seed, random is apart from both."""
    first = {"fps": {"a": 0, "b": 2}[task], "gps": seed, "random": 6}[method]
    return list(range(first, first + 4))


@pytest.fixture
def by_hand(monkeypatch):
    asked = []

    def found(cell: Cell, setting) -> Selection:
        asked.append(cell)
        columns = torch.tensor(chosen_columns(cell.method, cell.task, cell.seed))
        return Selection({"only": ModuleEntries(columns, torch.tensor([4]), 10)})

    monkeypatch.setattr(selection_agreement, "selected", found)
    return asked


def jaccard(one: list[int], other: list[int]) -> float:
    return len(set(one) & set(other)) / len(set(one) | set(other))


@pytest.mark.parametrize("reference", ["fps", "gps"])
def test_agreements_are_means_over_tasks_and_seeds(by_hand, setting, reference):
    other = {"fps": "gps", "gps": "fps"}[reference]
    methods = (reference, other, "random")
    expected = []
    for method in methods:
        places = list(product("ab", range(3)))
        with_reference = [jaccard(chosen_columns(method, *at), chosen_columns(reference, *at)) for at in places]
        seeds = [
            jaccard(chosen_columns(method, task, one), chosen_columns(method, task, two))
            for task in "ab"
            for one, two in [(0, 1), (0, 2), (1, 2)]
        ]
        tasks = jaccard(chosen_columns(method, "a", 0), chosen_columns(method, "b", 0))
        means = (sum(with_reference) / 6, sum(seeds) / 6, tasks)
        expected.append(Agreement(method, *map(pytest.approx, means)))
    found = measure(setting, ["a", "b"], [other, "random"], reference, SHARE, 3)
    assert found == expected
    # worked out: fps of two tasks shares 2 of 6; seeds of gps share 3 of 5 twice and 2 of 6
    by_method = {agreement.method: agreement for agreement in found}
    assert by_method["fps"].tasks == pytest.approx(1 / 3)
    assert by_method["gps"].seeds == pytest.approx((3 / 5 + 2 / 6 + 3 / 5) / 3)
    assert by_method[reference].reference == 1
    assert set(by_hand) == {Cell(t, m, SHARE, s, None) for t in "ab" for m in methods for s in range(3)}
    assert len(by_hand) == 18


def test_one_seed_and_one_task_have_nothing_to_be_compared_with(by_hand, setting):
    assert measure(setting, ["a"], ["gps", "fps"], "fps", SHARE, 1) == [
        Agreement("fps", 1.0, None, None),
        Agreement("gps", 1.0, None, None),
    ]


def test_the_table_names_the_reference():
    table = overlap_table([Agreement("gps", 1.0, 0.5, None), Agreement("fps", 0.12345, None, 0.25)], 0.0077)
    assert table.title == "Jaccard index of selected entries, 0.77% of the backbone"
    assert table.header == ("method", "with GPS, contrastive", "between seeds", "between tasks")
    assert table.lines == (("GPS, contrastive", "1.000", "0.500", ""), ("FPS", "0.123", "", "0.250"))
    assert Agreement("gps", 1.0, 0.5, None).to_dict() == {
        "method": "gps",
        "reference": 1.0,
        "seeds": 0.5,
        "tasks": None,
    }
