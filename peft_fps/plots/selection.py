"""Pictures of a selection: positions of its entries, the inputs that they read, and the sizes of bias deltas."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from torch import Tensor, nn

from peft_fps.layers.lookup import active_adapter, adapter_layers
from peft_fps.plots.grid import Grid, arrange, shortened
from peft_fps.plots.heat_map import CELL_HEIGHT, draw_grid, heat_map_size
from peft_fps.plots.looks import COLOURS, LINES, REFERENCE, SMALL, finish, new_figure
from peft_fps.plots.reading import chance_concentration, concentration, input_counts
from peft_fps.saved_selection import Selection
from peft_fps.selection.entries import ModuleEntries


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def plot_selection(model_or_selection: nn.Module | Selection, adapter_name: str | None = None) -> Figure:
    """Draw a selection in up to three panels.

    - The selected share of the weights in %, by transformer block and type of module. The type is the part of the
      module path behind the number of the block. A selection without entries lacks this panel if biases have moved.
    - The share of the entries that read the most-read inputs, by type of module, beside the same curve for as many
      entries at random positions. A selection without entries lacks this panel.
    - The sizes of bias deltas by type of module. Only a trained model has this panel.

    Args:
        model_or_selection: a model with an FPS adapter (a `PeftModel`, or a transformers model after `add_adapter`),
            or a `Selection`, which has no biases.
        adapter_name: name of the model's adapter to draw. Default: the active adapter.

    Raises:
        TypeError: `model_or_selection` is of another type.
        ValueError: there is no such adapter, its tensors are not loaded, or no module has weights to select from.
    """
    if isinstance(model_or_selection, Selection):
        return draw_selection(model_or_selection.modules, {})
    if not isinstance(model_or_selection, nn.Module):
        raise TypeError(
            f"model_or_selection is of type {type(model_or_selection).__name__}, expected a model with an FPS adapter "
            "or a Selection."
        )
    name = adapter_name or active_adapter(model_or_selection)
    selection = Selection.of(model_or_selection, name)
    layers = adapter_layers(model_or_selection, name)
    biases = {path: layer.fps_bias[name].detach() for path, layer in layers.items() if name in layer.fps_bias}
    return draw_selection(selection.modules, biases)


def draw_selection(modules: Mapping[str, ModuleEntries], biases: Mapping[str, Tensor]) -> Figure:
    """Draw entries and bias deltas in the panels of `plot_selection`.

    Args:
        modules: selected entries by module path.
        biases: bias deltas `(neurons,)` by module path, of these modules and of normalisations.

    Raises:
        ValueError: there are no modules.
    """
    if not modules:
        raise ValueError("The selection has no modules, expected one with weights at least. There is nothing to draw.")
    grid, entries = arrange(modules), sum(module.entries for module in modules.values())
    weights = sum(module.neurons * module.inputs for module in modules.values())
    moved = {path: delta.detach().float().cpu().abs() for path, delta in biases.items() if bool(delta.any())}
    width, height = heat_map_size(grid)
    above = ["shares"] if entries or not moved else []
    below = [panel for panel, drawn in (("reading", entries), ("biases", moved)) if drawn]
    rows = [(above, height)] if above else []
    rows += [(below, max(3.4, 1.0 + 0.7 * CELL_HEIGHT * len(arrange(moved).types)))] if below else []
    figure = new_figure(max(width, 11.0) if len(below) > 1 else width, sum(tall for _, tall in rows))
    parts = figure.subfigures(len(rows), 1, height_ratios=[tall for _, tall in rows], squeeze=False)
    axes: dict[str, Axes] = {}
    for (panels, _), (part,) in zip(rows, parts, strict=True):
        axes |= dict(zip(panels, part.subplots(1, len(panels), squeeze=False)[0], strict=True))
    figure.suptitle(
        f"{entries:,} selected entries in {len(modules):,} modules, {entries / weights:.3%} of their weights",
        fontsize=10,
    )
    if above:
        shares = grid.matrix(lambda paths: 100 * _share([modules[path] for path in paths]))
        highest = float(np.nanmax(shares)) or 1.0
        draw_grid(axes["shares"], grid, shares, "selected, % of the weights", "Where the entries lie", highest)
    if entries:
        _draw_reading(axes["reading"], grid, modules)
    if moved:
        _draw_biases(axes["biases"], moved)
    return figure


def _share(modules: list[ModuleEntries]) -> float:
    """Return the selected share of the weights of some modules."""
    return sum(module.entries for module in modules) / sum(module.neurons * module.inputs for module in modules)


def _draw_reading(axes: Axes, grid: Grid, modules: Mapping[str, ModuleEntries]) -> None:
    """Draw the curve of `concentration` for each type of module, at most `LINES` types, those with the most entries.

    Args:
        axes: axes to draw in.
        grid: types of the modules.
        modules: selected entries by module path.
    """
    by_type = {kind: [modules[path] for path in grid.of_type(kind)] for kind in grid.types}
    totals = {kind: sum(module.entries for module in of_kind) for kind, of_kind in by_type.items()}
    largest = sorted((kind for kind in totals if totals[kind]), key=lambda kind: -totals[kind])[: len(LINES)]
    shown = [kind for kind in grid.types if kind in largest]
    axes.plot([], [], color=REFERENCE, linestyle="dotted", label="the same at random places")
    for kind, (colour, dash) in zip(shown, LINES, strict=False):
        curve = concentration(torch.cat([input_counts(module) for module in by_type[kind]]))
        chance = chance_concentration(by_type[kind])
        axes.plot(*(100 * part for part in chance), color=colour, linestyle="dotted", linewidth=0.9)
        axes.plot(*(100 * part for part in curve), color=colour, linestyle=dash, linewidth=1.3, label=shortened(kind))
    axes.set(xlim=(0, 100), ylim=(0, 102))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(decimals=0))
    title = "Which inputs are read"
    if len(shown) < sum(map(bool, totals.values())):
        title += f" (the {len(shown)} types with the most entries)"
    finish(axes, title, "share of the inputs, most-read first", "share of the entries")
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_biases(axes: Axes, moved: Mapping[str, Tensor]) -> None:
    """Draw median, quartiles, and 5th to 95th percentile of |bias delta| for each type of module, without zeros.

    Args:
        axes: axes to draw in.
        moved: absolute bias deltas `(neurons,)` by module path. Each tensor has one that is not 0.
    """
    grid = arrange(moved)
    levels = torch.tensor(QUANTILES)
    for row, kind in enumerate(grid.types):
        sizes = torch.cat([moved[path] for path in grid.of_type(kind)])
        low, first, median, third, high = torch.quantile(sizes[sizes > 0], levels).tolist()
        axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=1)
        axes.plot([first, third], [row, row], color=COLOURS[0], linewidth=5, alpha=0.6, solid_capstyle="butt")
        axes.plot([median], [row], color="black", marker="|", markersize=9, markeredgewidth=1.6)
    axes.set_yticks(range(len(grid.types)), [shortened(kind) for kind in grid.types])
    axes.set_ylim(len(grid.types) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    smallest, largest = axes.get_xlim()
    if largest < 30 * smallest:  # over so few decades, powers of ten alone give hardly any label
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(axes, "How far biases have moved", "|bias delta|: median, 25–75 %, 5–95 %", "")
    axes.tick_params(axis="y", labelsize=SMALL)
