"""What the picture of a selection shows, against counts entry by entry."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from peft_fps import Selection
from peft_fps.plots import plot_selection
from tests.support.helpers import (
    adapted,
    config,
    layers_of,
    selected_columns,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
)


SHARES, READING, BIASES = "Where the entries lie", "Which inputs are read", "How far biases have moved"


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def share_of(model: nn.Module, path: str) -> float:
    """Selected share of a layer's weights in %, entry by entry."""
    layer = layers_of(model)[path]
    return 100 * sum(map(len, selected_columns(layer))) / layer.base_layer.weight.numel()


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model", "row", "column"])
def test_cells_are_selected_shares_by_block_and_type(granularity: str) -> None:
    types = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    types += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    model = adapted(tiny_llama(), filled=False, granularity=granularity, per_neuron=3)
    axes = panels(plot_selection(model))[SHARES]
    expected = np.array([[share_of(model, f"model.layers.{block}.{kind}") for block in range(2)] for kind in types])
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), expected, rtol=1e-12)
    assert texts(axes.get_yticklabels()) == types
    assert texts(axes.get_xticklabels()) == ["0", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("block (model.layers)", "type of module")
    decimals = 1 if expected.max() >= 10 else 2
    assert sorted(texts(axes.texts)) == sorted(f"{share:.{decimals}f}" for share in expected.flatten())
    assert "% of the weights" in axes.images[0].colorbar.ax.get_ylabel()


def test_a_patch_embedding_stands_beside_the_blocks() -> None:
    model = adapted(tiny_vit(), filled=False)
    axes = panels(plot_selection(model))[SHARES]
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert cells[0, 0] == pytest.approx(share_of(model, "vit.embeddings.patch_embeddings.projection"))
    assert np.isnan(cells[0, 1:]).all()
    assert np.isnan(cells[1:, 0]).all()
    assert texts(axes.get_xticklabels()) == ["none", "0", "1"]


def test_curves_are_the_shares_of_the_most_read_inputs() -> None:
    model = adapted(tiny_gpt2(), filled=False, granularity="model")
    axes = panels(plot_selection(model))[READING]
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        counts = []
        for block in range(2):
            layer = layers_of(model)[f"transformer.h.{block}.{kind}"]
            columns = [column for row in selected_columns(layer) for column in row]
            counts += [columns.count(column) for column in range(layer.shape.inputs)]
        if not any(counts):
            assert kind not in curves
            continue
        counts.sort(reverse=True)
        held = [100 * sum(counts[:n]) / sum(counts) for n in range(len(counts) + 1)]
        np.testing.assert_allclose(curves[kind][:, 1], held, rtol=1e-9)
        np.testing.assert_allclose(curves[kind][:, 0], np.linspace(0, 100, len(held)), rtol=1e-9)
    assert "share of the inputs" in axes.get_xlabel()
    assert axes.get_ylabel() == "share of the entries"
    legend = axes.get_legend()
    assert legend is not None
    assert texts(legend.get_texts())[0] == "the same at random places"


def test_biases_are_drawn_after_training_only() -> None:
    model = adapted(tiny_vit(), filled=False)
    assert BIASES not in panels(plot_selection(model))
    biased = {path: layer for path, layer in layers_of(model).items() if "default" in layer.fps_bias}
    deltas = {path: torch.linspace(-0.5, 0.1, layer.shape.neurons) for path, layer in biased.items()}
    for path, layer in biased.items():
        layer.fps_bias["default"].data.copy_(deltas[path])
    axes = panels(plot_selection(model))[BIASES]
    medians = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"}
    labels = texts(axes.get_yticklabels())
    for row, label in enumerate(labels):
        sizes = np.concatenate([deltas[path].abs().numpy() for path in deltas if path.endswith(label.lstrip("…"))])
        assert medians[row] == pytest.approx(np.median(sizes[sizes > 0]), rel=1e-5)
    assert len(labels) == 6  # all but keys
    assert "|bias delta|" in axes.get_xlabel()
    assert axes.get_xscale() == "log"


def test_norms_are_among_the_biases_alone() -> None:
    model = adapted(tiny_vit(), per_neuron=1, bias="with_norms")
    drawn = panels(plot_selection(model))
    assert "layernorm_before" in texts(drawn[BIASES].get_yticklabels())
    assert "layernorm_before" not in texts(drawn[SHARES].get_yticklabels())


def test_biases_alone_are_drawn_alone() -> None:
    model = adapted(tiny_vit(), filled=False, budget=0)
    assert list(panels(plot_selection(model))) == [SHARES]
    for layer in layers_of(model).values():
        for delta in layer.fps_bias.values():
            delta.data.fill_(0.1)
    assert list(panels(plot_selection(model))) == [BIASES]


def test_a_selection_gives_the_same_picture_without_biases() -> None:
    model = adapted(tiny_vit())
    of_model, of_selection = panels(plot_selection(model)), panels(plot_selection(Selection.of(model)))
    assert list(of_model) == [SHARES, READING, BIASES]
    assert list(of_selection) == [SHARES, READING]
    one, other = (np.ma.filled(drawn[SHARES].images[0].get_array(), -1) for drawn in (of_model, of_selection))
    np.testing.assert_array_equal(one, other)


def test_the_adapter_is_the_one_named() -> None:
    model = adapted(tiny_mlp(), filled=False, target_modules=["first"])
    model.add_adapter("second", config(target_modules=["last"]))
    axes = panels(plot_selection(model, "second"))[SHARES]
    assert texts(axes.get_yticklabels()) == ["last"]


def test_a_model_without_blocks_and_one_with_many_can_be_drawn_and_saved(tmp_path: Path) -> None:
    few = adapted(tiny_mlp(), filled=False, target_modules=["first", "last"])
    plot_selection(few).savefig(tmp_path / "few.png")
    one = Selection.of(few).modules["first"]
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    many = Selection({f"model.layers.{block}.{kind}": one for block in range(80) for kind in kinds})
    figure = plot_selection(many)
    figure.savefig(tmp_path / "many.png")
    axes = panels(figure)[SHARES]
    assert axes.images[0].get_array().shape == (7, 80)
    assert texts(axes.get_xticklabels()) == [str(block) for block in range(0, 80, 2)]
    assert not axes.texts  # no room for numbers
    assert figure.get_size_inches()[0] <= 15
    assert (tmp_path / "few.png").stat().st_size > 10_000


def test_of_very_many_types_the_largest_have_curves() -> None:
    source = adapted(tiny_mlp(), filled=False, target_modules=["first"], per_neuron=5)
    entries = Selection.of(source).modules["first"]
    axes = panels(plot_selection(Selection({f"part{number}": entries for number in range(30)})))
    drawn = next(panel for title, panel in axes.items() if title.startswith(READING))
    assert "the 12 types with the most entries" in drawn.get_title(loc="left")
    assert sum(line.get_label().startswith("part") for line in drawn.lines) == 12


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(TypeError, match="model_or_selection is of type str"):
        plot_selection("runs/adapter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no modules"):
        plot_selection(Selection({}))
    with pytest.raises(ValueError, match="no active FPS adapter"):
        plot_selection(tiny_mlp())


def test_pyplot_knows_nothing_of_the_figures() -> None:
    before = dict(Gcf.figs)
    plot_selection(adapted(tiny_mlp(), filled=False, target_modules=["first"]))
    assert before == Gcf.figs


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("peft_fps.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "peft-fps\[plots\]"'):
        import peft_fps.plots  # noqa: F401
