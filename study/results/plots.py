"""Plots: what a trial's traces look like. No window, no global state, every function returns a Figure.

trace.parquet ──> effective_lr_figure   lr over |w|^2 of every layer
              ──> rotation_figure       rotation over what theory expects: 1 at equilibrium
              ──> phase_figure          weight norm and unit gradient, a path for every layer
              ──> trace_figure          all three
{title: trace} ─> comparison_figure     effective lr above rotation, one column for each trace

One step is noisy, and theory speaks of the mean of its square: rotations and unit gradients are drawn as running root mean squares.
"""

from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from study.results.layers import BAND

if TYPE_CHECKING:
    import pandas as pd

Color: TypeAlias = tuple[float, float, float, float]

MOST_POINTS = 400
"""Points that one line is drawn with; a longer trace is thinned evenly."""

MOST_LABELS = 12
"""Layers that a legend names; of more, it names an even selection from first to last."""

SMOOTHED = 20
"""A running root mean square is over one such part of a trace."""

NARROW = 300
"""Highest over lowest value up to which an axis is marked at 1, 2 and 5 times powers of ten."""

TIGHT = 10, 2
"""The same for more marks, and for marks at equal distances."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "savefig.facecolor": "white",
    "path.simplify_threshold": 0.5,  # pixels; no eye sees it, and files are a quarter smaller
    "svg.fonttype": "none",  # text stays text: small files, and readers can search them
    "svg.hashsalt": "study",  # the same figure gives the same file
    "text.color": "#333333",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
}
"""How every figure of this package looks, in matplotlib's terms."""


def effective_lr_figure(trace: "pd.DataFrame") -> Figure:
    """The effective learning rate of each layer over optimizer steps; layers that are not scale-invariant are dashed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        _draw_effective_lr(axes, trace)
        _legend(figure, trace)
    return figure


def rotation_figure(trace: "pd.DataFrame") -> Figure:
    """Rotation over expected rotation of each layer that theory speaks of; a dotted line marks where layers begin to count as equilibrated."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        _draw_ratio(axes, trace)
        _legend(figure, trace)
    return figure


def phase_figure(trace: "pd.DataFrame") -> Figure:
    """The path of each scale-invariant layer, or of every layer where there is none, in the plane of weight norm and unit gradient.

    The unit gradient |w| |g| is the gradient's size at w/|w|. A path begins at a hollow dot and ends at a filled one.

    Source: Lobacheva et al., On the Periodic Behavior of Neural Network Training with Batch Normalization and Weight Decay,
    arXiv:2106.15739.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        _draw_phase(axes, trace)
        _legend(figure, trace)
    return figure


def trace_figure(trace: "pd.DataFrame", title: str) -> Figure:
    """Effective learning rate, rotation ratio and phase diagram of one trial, side by side."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw_effective_lr(left, trace)
        _draw_ratio(middle, trace)
        _draw_phase(right, trace)
        figure.suptitle(title, fontsize=11)
        _legend(figure, trace)
    return figure


def comparison_figure(traces: Mapping[str, "pd.DataFrame"]) -> Figure:
    """Trials beside each other on common axes: effective learning rates above, rotations with their expectation below.

    Args:
        traces: Title of a column to its trace; all of the same network.
    """
    assert traces, "nothing to compare"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 2.9 * len(traces), 5.4), layout="constrained")
        grid = figure.subplots(2, len(traces), sharex=True, sharey="row", squeeze=False)
        for column, (title, trace) in enumerate(traces.items()):
            above, below = grid[:, column]
            _draw_effective_lr(above, trace)
            _draw_rotation(below, trace)
            above.set_title(title)
            above.set_xlabel("")
            if column:
                above.set_ylabel("")
                below.set_ylabel("")
        _legend(figure, next(iter(traces.values())))
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as what the suffix says (.svg, .png, ...); an unchanged figure gives the same SVG again."""
    metadata: dict[str, Any] = {"Date": None} if Path(path).suffix == ".svg" else {}
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata=metadata, dpi=150)


def svg_text(figure: Figure) -> str:
    """A figure as an SVG document; an unchanged figure gives the same text again."""
    text = StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw_effective_lr(axes: Axes, trace: "pd.DataFrame") -> None:
    for layer, rows, color in _layers(trace):
        rows = rows[rows["effective_lr"] > 0]
        if len(rows):
            axes.plot(rows["step"], rows["effective_lr"], label=layer, color=color, **_line(rows))
    _finish(axes, "effective learning rate", "no effective learning rate is known for this rule")


def _draw_ratio(axes: Axes, trace: "pd.DataFrame") -> None:
    for layer, rows, color in _layers(trace):
        rows = rows[rows["rotation_expected"] > 0]
        if len(rows):
            axes.plot(rows["step"], _running_rms(rows["rotation"] / rows["rotation_expected"]), label=layer, color=color, **_line(rows))
    if axes.lines:
        axes.axhspan(*BAND, color="#000000", alpha=0.1, linewidth=0, zorder=0)
        axes.axhline(1, color="#000000", linewidth=1, label="expected", zorder=1)
        _mark_equilibrium(axes, trace)
    _finish(axes, "rotation / expected rotation", "theory expects no rotation here")


def _draw_rotation(axes: Axes, trace: "pd.DataFrame") -> None:
    for layer, rows, color in _layers(trace):
        if rows["scale_invariant"].iloc[0]:
            axes.plot(rows["step"], _running_rms(rows["rotation"]), label=layer, color=color, **_line(rows))
    expected = trace[trace["rotation_expected"] > 0].groupby("step")["rotation_expected"].median()
    if len(expected):
        low, high = BAND
        axes.fill_between(expected.index, low * expected, high * expected, color="#000000", alpha=0.15, linewidth=0, zorder=0)
        axes.plot(expected.index, expected, color="#000000", linewidth=1, label="expected")
        _mark_equilibrium(axes, trace)
    _finish(axes, "rotation per step (rad)", "no layer is scale-invariant")


def _draw_phase(axes: Axes, trace: "pd.DataFrame") -> None:
    layers = _layers(trace)
    shown = [layer for layer in layers if layer[1]["scale_invariant"].iloc[0]] or layers
    for layer, rows, color in shown:
        path = _phase_path(rows)
        if len(path):
            axes.plot(path["norm"], path["gradient"], label=layer, color=color, linestyle=_line(rows)["linestyle"], alpha=0.8)
            for end, fill in ((path.iloc[0], "white"), (path.iloc[-1], color)):
                axes.plot(*end, marker="o", markersize=5, color=color, markerfacecolor=fill, label=f"_{layer}", zorder=3)
    axes.set_xscale("log")
    _finish(axes, "unit gradient |w| |g|", "no layer has a gradient", along="weight norm |w|")
    if axes.lines:
        axes.margins(0.05)
        axes.grid(visible=True, axis="x")
        _mark(axes.xaxis)


def _phase_path(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Columns norm and gradient: a smoothed path through the samples at which both are positive."""
    gradient = rows["weight_norm"] * rows["grad_norm"]
    path = rows.assign(norm=_running_rms(rows["weight_norm"]), gradient=_running_rms(gradient))[["norm", "gradient"]]
    return path.dropna()


def _running_rms(values: "pd.Series") -> "pd.Series":
    """The root mean square around each sample; nothing where it is 0, which a logarithmic axis cannot show."""
    window = max(1, len(values) // SMOOTHED)
    rms = (values**2).rolling(window, center=True, min_periods=1).mean() ** 0.5
    return rms.where(rms > 0)


def _mark_equilibrium(axes: Axes, trace: "pd.DataFrame") -> None:
    """Dotted lines where scale-invariant layers begin to count as equilibrated: once, or again after each change of lr x decay."""
    invariant = [rows for _, rows, _ in _layers(trace) if rows["scale_invariant"].iloc[0]]
    arrivals = sorted({step for rows in invariant for step in rows["step"].iloc[_arrivals(rows)]})
    for step in arrivals:
        axes.axvline(step, color="#666666", linewidth=1, linestyle=":", label="equilibrated", zorder=1)
    if arrivals:
        axes.annotate("equilibrated", (arrivals[0], 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=7)


def _layers(trace: "pd.DataFrame") -> list[tuple[str, "pd.DataFrame", Color]]:
    """Every layer in the network's order, its rows in the order of steps, and its color: from the input (dark) to the output (light)."""
    names = list(dict.fromkeys(trace["layer"]))
    found = []
    for position, name in enumerate(names):
        rows = trace[trace["layer"] == name].sort_values("step")
        found.append((name, rows.iloc[:: -(-len(rows) // MOST_POINTS)], _color(position, len(names))))
    return found


def _color(position: int, count: int) -> Color:
    # The end of the map is too pale for a white page.
    return colormaps["viridis"](0.88 * position / max(count - 1, 1))


def _line(rows: "pd.DataFrame") -> dict[str, Any]:
    """Solid for scale-invariant layers, dashed for the others; a single sample is a dot, as no line can show it."""
    style: dict[str, Any] = {"linestyle": "-" if rows["scale_invariant"].iloc[0] else "--"}
    return {**style, "marker": "o"} if len(rows) == 1 else style


def _arrivals(rows: "pd.DataFrame") -> list[int]:
    """Positions at which the layer begins to count as equilibrated."""
    states = [False, *rows["equilibrated"].astype(bool)]
    return [position for position, (before, now) in enumerate(pairwise(states)) if now and not before]


def _finish(axes: Axes, quantity: str, why_empty: str, along: str = "optimizer steps") -> None:
    axes.set_xlabel(along)
    axes.set_ylabel(quantity)
    axes.set_yscale("log")
    axes.grid(visible=False, axis="x" if axes.lines else "both")
    if not axes.lines:
        # Not by set_ticks: panels beside this one may share its axes.
        axes.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
        axes.text(0.5, 0.5, why_empty, transform=axes.transAxes, ha="center", va="center", color="#666666")
        return
    axes.margins(x=0.01)
    _mark(axes.yaxis)


def _mark(axis: Axis) -> None:
    """Numbers at a logarithmic axis that is too short for powers of ten."""
    low, high = axis.get_view_interval()
    if high >= NARROW * low:
        return
    several, few = TIGHT
    subs = (1, 2, 3, 4, 6) if high < several * low else (1, 2, 5)
    axis.set_major_locator(MaxNLocator(5) if high < few * low else LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, trace: "pd.DataFrame") -> None:
    """One legend for all panels, of the layers that are drawn in any, in the network's order."""
    drawn = {line.get_label() for axes in figure.axes for line in axes.lines}
    layers = [(name, rows, color) for name, rows, color in _layers(trace) if name in drawn]
    lines = _selected([Line2D([], [], color=color, label=name, linestyle=_line(rows)["linestyle"]) for name, rows, color in layers])
    if "expected" in drawn:
        lines.append(Line2D([], [], color="#000000", linewidth=1, label="expected, ±10%"))
    if lines:
        figure.legend(handles=lines, loc="outside right upper")


def _selected(lines: Sequence[Line2D]) -> list[Line2D]:
    if len(lines) <= MOST_LABELS:
        return list(lines)
    return [lines[round(position * (len(lines) - 1) / (MOST_LABELS - 1))] for position in range(MOST_LABELS)]
