"""Pictures of overlap, against Python sets."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from peft_fps import Selection
from peft_fps.plots import plot_overlap
from peft_fps.plots.overlap import plot_module_overlap
from tests.support.helpers import adapted, layers_of, selected_columns, tiny_mlp, tiny_vit


def entries(model) -> set[tuple[str, int, int]]:
    return {
        (path, neuron, column)
        for path, layer in layers_of(model).items()
        for neuron, columns in enumerate(selected_columns(layer))
        for column in columns
    }


def matrix(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_cells_are_jaccard_indices_of_all_entries() -> None:
    models = {
        "magnitude": adapted(tiny_vit(), filled=False),
        "three times as many": adapted(tiny_vit(), filled=False, per_neuron=6),
        "chance": adapted(tiny_vit(), filled=False, importance="random"),
    }
    figure = plot_overlap({name: Selection.of(model) for name, model in models.items()})
    sets = [entries(model) for model in models.values()]
    expected = [[len(one & other) / len(one | other) for other in sets] for one in sets]
    np.testing.assert_allclose(matrix(figure), expected, rtol=1e-12)
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(models)
    assert sorted(text.get_text() for text in axes.texts) == sorted(f"{cell:.2f}" for row in expected for cell in row)
    assert "Jaccard" in axes.images[0].colorbar.ax.get_ylabel()


def test_selections_that_cannot_be_compared_are_named() -> None:
    one = Selection.of(adapted(tiny_mlp(), filled=False, target_modules=["first"]))
    other = Selection.of(adapted(tiny_mlp(), filled=False, target_modules=["last"]))
    with pytest.raises(ValueError, match=r"'a' and 'b' cannot be compared: first"):
        plot_overlap({"a": one, "b": other})
    with pytest.raises(ValueError, match="1 items, expected two or more"):
        plot_overlap({"a": one})


def test_modules_of_one_cell_are_counted_together() -> None:
    counts = {"h.0.experts.0.w": (1, 4), "h.0.experts.1.w": (2, 2), "h.1.experts.0.w": (0, 0), "head": (0, 5)}
    figure = plot_module_overlap(counts, "a title")
    cells = np.ma.filled(figure.axes[0].images[0].get_array(), -1)
    assert cells.tolist() == [[0.0, -1.0, -1.0], [-1.0, 50.0, 100.0]]
    assert figure.axes[0].get_title(loc="left") == "a title"
    with pytest.raises(ValueError, match="no modules"):
        plot_module_overlap({}, "")
