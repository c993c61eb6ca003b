"""Planes: a study's trials in the plane of learning rate and weight decay, whose product is what scale-invariant weights feel most.

weight decay │╲  o ╲ ●  ╲      ● completed, colored by its value; the best is ringed
             │ ╲  ● ╲    ╲     o stopped, colored likewise      × diverged
             │  ╲    ╲ ×  ╲    ╲ lr x weight decay is constant
           0 ├────●───o─────   without decay
             └───────────── learning rate
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from study.optimizer import PRODUCT
from study.results.plots import STYLE

if TYPE_CHECKING:
    import pandas as pd

Span: TypeAlias = tuple[float, float]

LR, DECAY, _ = PRODUCT

MOST_PANELS = 8
"""Arms that have a panel: of more, those with the best values."""

COLUMNS = 4
"""Panels beside each other."""

MOST_DIAGONALS = 8
"""Lines of constant product; where there would be more, only every second, third, ... power of ten has one."""

SHORT = 0.2
"""A line of constant product that crosses less of the panel is not drawn: there is no room for its value."""

WIDE = 10
"""Largest over smallest value from which on colors stand for logarithms."""

STRIP = 0.1
"""Height of the strip of trials without decay, over that of the axis."""

_MARKERS: dict[str, dict[str, Any]] = {
    "completed": {"marker": "o", "s": 42, "linewidths": 0.6},
    "stopped": {"marker": "o", "s": 20, "linewidths": 1.1},
    "diverged": {"marker": "x", "s": 26, "linewidths": 1.1},
}
"""The outcomes that are drawn; areas in square points."""

_NEUTRAL = "#999999"


def plane_figure(trials: "pd.DataFrame", metric: str, direction: str) -> Figure:
    """One dot for each trial at its learning rate and weight decay, colored by its value: dark is good. One panel for each arm.

    Trials without decay stand on a strip below the others. Failed and interrupted trials are left out, and so are replicates, which
    stand where their trial does. Arms that differ in nothing but their place in the plane share one panel.

    Args:
        trials: The study's table, one row for each trial. A trial's value is its `value`, or its `metric` where there is none.
        metric: What the values are.
        direction: `minimize` or `maximize`.
    """
    shown = _shown(trials, metric, direction)
    panels = _panels(shown)
    with mpl.rc_context(STYLE):
        figure, grid = _grid(len(panels))
        colors = _colors(shown["value"].dropna(), direction)
        across, up, strip = _spans(shown)
        for axes, (title, rows) in zip(grid, panels, strict=True):
            _frame(axes, across, up, strip)
            _draw_diagonals(axes, across, up, shown[LR] * shown[DECAY])
            _draw_trials(axes, rows, colors, strip)
            axes.set_title(title.replace(",", "\n"), fontsize=8)
        _ring(grid, panels, strip)
        if colors is not None:
            _color_bar(figure, grid, colors, metric)
        _legend(figure, shown)
        arms = shown["arm"].nunique()
        if len(panels) < arms and len(panels) > 1:
            figure.suptitle(f"the best {len(panels)} of {arms} arms", fontsize=10)
    return figure


def _shown(trials: "pd.DataFrame", metric: str, direction: str) -> "pd.DataFrame":
    """The rows that are drawn, with `value` finite or missing, and `loss`: the same, smaller is better, of completed trials alone."""
    drawn = trials["outcome"].isin(list(_MARKERS)) & (trials[LR] > 0)
    rows = trials[drawn & (trials["replicate_of"].fillna("") == "")] if "replicate_of" in trials else trials[drawn]
    value = rows["value" if "value" in rows else metric].astype(float)
    value = value.where(value.abs() < math.inf)
    return rows.assign(value=value, loss=(value if direction == "minimize" else -value).where(rows["outcome"] == "completed"))


def _panels(trials: "pd.DataFrame") -> list[tuple[str, "pd.DataFrame"]]:
    """Title and trials of every panel, in the order of the table."""
    arms = list(dict.fromkeys(trials["arm"]))
    if len(arms) < 2 or all(part.partition("=")[0] in PRODUCT for arm in arms for part in arm.split(",")):
        return [("", trials)]
    best = trials.groupby("arm")["loss"].min().fillna(math.inf)
    kept = sorted(arms, key=lambda arm: float(best[arm]))[:MOST_PANELS]
    return [(arm, trials[trials["arm"] == arm]) for arm in arms if arm in kept]


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, row by row, on common axes; the outer ones carry names and numbers."""
    rows = math.ceil(panels / COLUMNS)
    columns = math.ceil(panels / rows)
    size = (6.2, 4.2) if panels == 1 else (1.6 + 2.5 * columns, 1.0 + 2.5 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for unused in grid[panels:]:
        unused.remove()
    for position, axes in enumerate(grid[:panels]):
        if position % columns == 0:
            axes.set_ylabel("weight decay")
        if position + columns >= panels:
            axes.set_xlabel("learning rate")
            axes.tick_params(labelbottom=True)
    return figure, grid[:panels]


def _colors(values: "pd.Series", direction: str) -> ScalarMappable | None:
    """Value to color, dark for good ones; None where there is no value."""
    if values.empty:
        return None
    # The end of the map is too pale for a white page.
    shades = [colormaps["viridis"](0.9 * position / 63) for position in range(64)]
    ordered = shades if direction == "minimize" else shades[::-1]
    low, high = float(values.min()), float(values.max())
    norm = LogNorm(low, high) if low > 0 and high > WIDE * low else Normalize(low, high)
    return ScalarMappable(norm, LinearSegmentedColormap.from_list("dark is good", ordered).with_extremes(bad=_NEUTRAL))


def _color_bar(figure: Figure, grid: Sequence[Axes], colors: ScalarMappable, metric: str) -> None:
    bar = figure.colorbar(colors, ax=grid, label=metric, pad=0.02, aspect=20 if len(grid) <= COLUMNS else 40)
    if isinstance(colors.norm, LogNorm):
        _mark(bar.ax.yaxis, _marks(*colors.get_clim()))


def _spans(trials: "pd.DataFrame") -> tuple[Span, Span, Span | None]:
    """What the axes show of learning rates and of decays above 0, and below these the strip for decay 0, if it is needed."""
    across, up = _span(trials[LR]), _span(trials.loc[trials[DECAY] > 0, DECAY])
    bottom, top = up
    strip = (bottom / (top / bottom) ** STRIP, bottom) if (trials[DECAY] == 0).any() else None
    return across, up, strip


def _span(values: "pd.Series") -> Span:
    low, high = (1e-4, 1e-2) if values.empty else (float(values.min()), float(values.max()))
    margin = max((high / low) ** 0.06, 1.3)
    return low / margin, high * margin


def _frame(axes: Axes, across: Span, up: Span, strip: Span | None) -> None:
    axes.set(xscale="log", yscale="log", xlim=across, ylim=(strip[0] if strip else up[0], up[1]))
    axes.grid(visible=False)
    zero = [_middle(strip)] if strip else []
    if strip:
        axes.axhspan(*strip, color="#f2f2f2", linewidth=0, zorder=0)
    _mark(axes.xaxis, _marks(*across))
    _mark(axes.yaxis, [*zero, *_marks(*up)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value in zero else _short(value)))


def _mark(axis: Axis, marks: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(marks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())


def _marks(low: float, high: float) -> list[float]:
    """Round numbers between two others, with powers of ten alone where these are enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        marks = [float(f"{digit}e{decade}") for decade in decades for digit in digits if low <= float(f"{digit}e{decade}") <= high]
        if len(marks) > 2:
            break
    return marks


def _draw_diagonals(axes: Axes, across: Span, up: Span, products: "pd.Series") -> None:
    """Lines on which lr x weight_decay is a power of ten, from edge to edge, with their values."""
    products = products[products > 0]
    if products.empty:
        return
    exponents = range(math.floor(math.log10(products.min())), math.ceil(math.log10(products.max())) + 1)
    for exponent in exponents[:: -(-len(exponents) // MOST_DIAGONALS)]:
        product = 10.0**exponent
        begin, end = max(across[0], product / up[1]), min(across[1], product / up[0])
        if end > begin * (across[1] / across[0]) ** SHORT:
            axes.plot((begin, end), (product / begin, product / end), color="#cccccc", linewidth=0.7, zorder=1, label=_short(product))
            place = begin * (end / begin) ** 0.08
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(place, product / place, _short(product), fontsize=6.5, color="#888888", ha="center", va="center", bbox=box, zorder=1)


def _draw_trials(axes: Axes, trials: "pd.DataFrame", colors: ScalarMappable | None, strip: Span | None) -> None:
    for outcome, style in _MARKERS.items():
        rows = trials[trials["outcome"] == outcome]
        if rows.empty:
            continue
        shades = colors.to_rgba(rows["value"].to_numpy()) if colors is not None else _NEUTRAL
        fills: dict[str, Any] = {"completed": {"facecolors": shades, "edgecolors": "white"}, "stopped": {"facecolors": "none", "edgecolors": shades}}
        paint: dict[str, Any] = fills.get(outcome, {"color": "#444444"})
        axes.scatter(rows[LR], _heights(rows, strip), label=outcome, zorder=2, **style, **paint)


def _ring(grid: Iterable[Axes], panels: Sequence[tuple[str, "pd.DataFrame"]], strip: Span | None) -> None:
    """A ring around the best of all completed trials, the earlier one of equals."""
    best = min((float(rows["loss"].min()) for _, rows in panels if rows["loss"].notna().any()), default=None)
    for axes, (_, rows) in zip(grid, panels, strict=True):
        ringed = rows[rows["loss"] == best].head(1)
        if len(ringed):
            axes.plot(ringed[LR], _heights(ringed, strip), label="best", zorder=3, **_RING)
            return


_RING: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "#000000"}


def _heights(trials: "pd.DataFrame", strip: Span | None) -> "pd.Series":
    """Where trials stand on the axis of decay."""
    return trials[DECAY] if strip is None else trials[DECAY].where(trials[DECAY] > 0, _middle(strip))


def _middle(strip: Span) -> float:
    return math.sqrt(strip[0] * strip[1])


def _legend(figure: Figure, trials: "pd.DataFrame") -> None:
    looks: dict[str, dict[str, Any]] = {
        "completed": {"marker": "o", "color": _NEUTRAL, "markersize": 6},
        "stopped": {"marker": "o", "color": _NEUTRAL, "markersize": 4.5, "markerfacecolor": "none"},
        "diverged": {"marker": "x", "color": "#444444", "markersize": 5},
    }
    lines = [Line2D([], [], linestyle="", label=outcome, **look) for outcome, look in looks.items() if (trials["outcome"] == outcome).any()]
    if trials["loss"].notna().any():
        lines.append(Line2D([], [], label="best", **_RING))
    if (trials[DECAY] > 0).any():
        lines.append(Line2D([], [], color="#cccccc", linewidth=0.7, label="constant lr x weight decay"))
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))


def _short(value: float) -> str:
    """`1e-5` for 0.00001, `0.01` for 0.01."""
    return f"{value:g}".replace("e-0", "e-")
