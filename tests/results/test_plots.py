"""Figures of traces show every layer once, on logarithmic axes, and say so where there is nothing to show."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color

from study.measurement import LayerSample
from study.results.layers import BAND
from study.results.plots import (
    MOST_LABELS,
    MOST_POINTS,
    comparison_figure,
    effective_lr_figure,
    phase_figure,
    rotation_figure,
    save,
    trace_figure,
)
from study.traces import write_trace

LAYERS = ("stem.conv", "layer1.0.conv1", "head")
EXPECTED = 0.02

Traced = Callable[..., pd.DataFrame]


def sample(step: int, layer: str, *, expected: float | None = EXPECTED, effective_lr: float | None = None, **changes: object) -> LayerSample:
    """What a small net trained by sgd says of one layer: its norm grows, its rotation falls to 1.05 of what is expected."""
    invariant = layer != "head"
    fields: dict[str, object] = {
        "place": "inner" if invariant else "",
        "scale_invariant": invariant,
        "equilibrated": step >= 300,
        "weight_norm": 2 + step / 100,
        "effective_lr": 0.1 / (2 + step / 100) ** 2 if effective_lr is None else effective_lr,
        "rotation": EXPECTED * (1.05 + 2 / step),
        "rotation_expected": expected if invariant else None,
    }
    return LayerSample(step=step, layer=layer, role="weight", lr=0.1, weight_decay=5e-3, grad_norm=0.1, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    """Makes a trace as a trial leaves it: written by the recorder's own writer, read back by pandas."""

    def of(steps: Sequence[int] = range(10, 501, 10), layers: Sequence[str] = LAYERS, **changes: object) -> pd.DataFrame:
        write_trace(tmp_path / "trace.parquet", [sample(step, layer, **changes) for step in steps for layer in layers])  # type: ignore[arg-type]
        return pd.read_parquet(tmp_path / "trace.parquet")

    return of


def lines(axes: Axes) -> dict[str, object]:
    """The lines of layers by name, without those that stand for theory."""
    return {str(line.get_label()): line for line in axes.lines if line.get_label() not in ("expected", "equilibrated")}


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_layer_has_one_line_of_its_effective_learning_rate(traced: Traced) -> None:
    trace = traced()
    axes = effective_lr_figure(trace).axes[0]
    assert [line.get_label() for line in axes.lines] == list(LAYERS)
    for line in axes.lines:
        rows = trace[trace["layer"] == line.get_label()]
        assert list(line.get_xdata()) == list(rows["step"])
        assert list(line.get_ydata()) == list(rows["effective_lr"])
    assert (axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "optimizer steps", "effective learning rate")


def test_layers_that_are_not_scale_invariant_are_dashed(traced: Traced) -> None:
    axes = effective_lr_figure(traced()).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]


def test_the_legend_names_the_layers_in_the_order_of_the_network(traced: Traced) -> None:
    figure = effective_lr_figure(traced())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(LAYERS)


def test_a_layer_has_the_same_color_in_every_panel(traced: Traced) -> None:
    first, *others = trace_figure(traced(), "net-0001").axes
    colors = {line.get_label(): line.get_color() for line in first.lines}
    assert len({str(color) for color in colors.values()}) == len(LAYERS)
    for axes in others:
        shown = [line for line in axes.lines if line.get_label() in LAYERS]
        assert len(shown) == 2
        assert all(same_color(line.get_color(), colors[line.get_label()]) for line in shown)


def test_rotation_is_drawn_over_its_expectation_for_the_layers_that_have_one(traced: Traced) -> None:
    axes = rotation_figure(traced()).axes[0]
    assert list(lines(axes)) == ["stem.conv", "layer1.0.conv1"]
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(1.054, abs=1e-3)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "rotation / expected rotation"


def test_one_and_a_band_around_it_stand_for_equilibrium(traced: Traced) -> None:
    axes = rotation_figure(traced()).axes[0]
    (one,) = (line for line in axes.lines if line.get_label() == "expected")
    assert list(one.get_ydata()) == [1, 1]
    (band,) = axes.patches
    assert tuple(band.get_extents().transformed(axes.transData.inverted()).intervaly) == pytest.approx(BAND)


def test_a_dotted_line_marks_where_layers_begin_to_count_as_equilibrated(traced: Traced) -> None:
    axes = rotation_figure(traced()).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "equilibrated"] == [300]
    assert texts(axes) == ["equilibrated"]


def test_nothing_is_marked_where_no_layer_equilibrates(traced: Traced) -> None:
    axes = rotation_figure(traced(equilibrated=False)).axes[0]
    assert not [line for line in axes.lines if line.get_label() == "equilibrated"]
    assert not texts(axes)


def test_rotations_are_running_root_mean_squares(traced: Traced) -> None:
    trace = traced(steps=range(1, 41))
    trace["rotation"] = [EXPECTED * (0.6 if step % 2 else 0.8) for step in trace["step"]]
    axes = rotation_figure(trace).axes[0]
    assert list(axes.lines[0].get_ydata())[1:] == pytest.approx([((0.6**2 + 0.8**2) / 2) ** 0.5] * 39)


def test_a_path_leads_from_a_hollow_dot_to_a_filled_one(traced: Traced) -> None:
    trace = traced()
    axes = phase_figure(trace).axes[0]
    path, start, end = axes.lines[:3]
    rows = trace[trace["layer"] == path.get_label()]
    assert path.get_label() == "stem.conv"
    assert list(path.get_xdata()) == pytest.approx(list(rows["weight_norm"]), rel=0.05)
    assert list(path.get_ydata()) == pytest.approx(list(rows["weight_norm"] * rows["grad_norm"]), rel=0.05)
    assert (start.get_xydata()[0] == path.get_xydata()[0]).all() and same_color(start.get_markerfacecolor(), "white")
    assert (end.get_xydata()[0] == path.get_xydata()[-1]).all() and same_color(end.get_markerfacecolor(), path.get_color())
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight norm |w|", "unit gradient |w| |g|")


def test_unit_gradients_are_running_root_mean_squares(traced: Traced) -> None:
    trace = traced(steps=range(1, 41), weight_norm=2.0)
    trace["grad_norm"] = [0.3 if step % 2 else 0.4 for step in trace["step"]]
    axes = phase_figure(trace).axes[0]
    assert list(axes.lines[0].get_ydata())[1:] == pytest.approx([2 * ((0.3**2 + 0.4**2) / 2) ** 0.5] * 39)


def test_paths_are_of_scale_invariant_layers_or_of_all_where_there_is_none(traced: Traced) -> None:
    def shown(trace: pd.DataFrame) -> list[str]:
        return [label for label in lines(phase_figure(trace).axes[0]) if not label.startswith("_")]

    assert shown(traced()) == ["stem.conv", "layer1.0.conv1"]
    assert shown(traced(scale_invariant=False)) == list(LAYERS)


def test_a_layer_without_a_gradient_has_no_path(traced: Traced, tmp_path: Path) -> None:
    figure = phase_figure(traced().assign(grad_norm=0.0))
    assert texts(figure.axes[0]) == ["no layer has a gradient"]
    save(figure, tmp_path / "none.png")


def test_the_legend_names_only_layers_that_are_drawn(traced: Traced) -> None:
    for figure in (phase_figure(traced()), rotation_figure(traced())):
        assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["stem.conv", "layer1.0.conv1"]
        assert "head" not in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("high", [3.3, 3.9, 8.0, 39.0, 290.0])
def test_a_short_axis_has_several_numbers(traced: Traced, high: float, tmp_path: Path) -> None:
    trace = traced()
    trace["effective_lr"] = [3.0 if step == 10 else high for step in trace["step"]]
    figure = effective_lr_figure(trace)
    save(figure, tmp_path / "drawn.png")
    low, top = figure.axes[0].get_ylim()
    assert len([tick for tick in figure.axes[0].get_yticks() if low <= tick <= top]) >= 3


def test_the_three_panels_stand_under_the_title(traced: Traced) -> None:
    figure = trace_figure(traced(), "net-0001")
    assert [axes.get_ylabel() for axes in figure.axes] == ["effective learning rate", "rotation / expected rotation", "unit gradient |w| |g|"]
    assert figure.get_suptitle() == "net-0001"


def test_a_comparison_has_a_column_for_each_trace_on_common_axes(traced: Traced) -> None:
    figure = comparison_figure({"decay 0": traced(expected=None), "decay 0.005": traced()})
    first, second, below_first, below_second = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["decay 0", "decay 0.005"]
    assert (first.get_ylim(), below_first.get_ylim()) == (second.get_ylim(), below_second.get_ylim())
    assert list(lines(below_second)) == ["stem.conv", "layer1.0.conv1"]
    assert "expected" not in [line.get_label() for line in below_first.lines]
    (expected,) = (line for line in below_second.lines if line.get_label() == "expected")
    assert set(expected.get_ydata()) == {EXPECTED}
    assert figure.legends[0].get_texts()[-1].get_text() == "expected, ±10%"


def test_a_trace_without_samples_gives_an_empty_figure_that_says_so(traced: Traced, tmp_path: Path) -> None:
    figure = trace_figure(traced(steps=()), "net-0001")
    assert [texts(axes) for axes in figure.axes] == [
        ["no effective learning rate is known for this rule"],
        ["theory expects no rotation here"],
        ["no layer has a gradient"],
    ]
    save(figure, tmp_path / "empty.png")


def test_a_trace_without_expectations_has_no_ratio_to_show(traced: Traced, tmp_path: Path) -> None:
    figure = trace_figure(traced(expected=None), "net-0001")
    assert [len(axes.lines) for axes in figure.axes[:2]] == [3, 0]
    assert texts(figure.axes[1]) == ["theory expects no rotation here"]
    save(figure, tmp_path / "none.png")


def test_one_sample_is_a_dot(traced: Traced, tmp_path: Path) -> None:
    figure = trace_figure(traced(steps=(10,)), "net-0001")
    assert {line.get_marker() for line in figure.axes[0].lines} == {"o"}
    save(figure, tmp_path / "one.png")


def test_a_constant_trace_is_drawn_like_any_other(traced: Traced, tmp_path: Path) -> None:
    figure = trace_figure(traced(effective_lr=0.01, rotation=EXPECTED), "net-0001")
    assert set(figure.axes[0].lines[0].get_ydata()) == {0.01}
    assert figure.axes[0].get_ylim()[0] < 0.01 < figure.axes[0].get_ylim()[1]
    save(figure, tmp_path / "constant.png")


def test_a_rotation_of_zero_leaves_a_gap(traced: Traced, tmp_path: Path) -> None:
    figure = trace_figure(traced(rotation=0.0), "net-0001")
    assert all(value != value for value in figure.axes[1].lines[0].get_ydata())
    save(figure, tmp_path / "zero.png")


def test_a_long_trace_is_thinned(traced: Traced) -> None:
    axes = effective_lr_figure(traced(steps=range(1, 2000), layers=("head",))).axes[0]
    assert MOST_POINTS / 2 < len(axes.lines[0].get_xdata()) <= MOST_POINTS


def test_a_legend_of_many_layers_names_an_even_selection_from_first_to_last(traced: Traced) -> None:
    figure = effective_lr_figure(traced(steps=(10, 20), layers=[f"layer{index}" for index in range(40)]))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(figure.axes[0].lines) == 40
    assert len(named) == MOST_LABELS
    assert (named[0], named[-1]) == ("layer0", "layer39")


def test_an_svg_is_small_text_on_white_and_the_same_each_time(traced: Traced, tmp_path: Path) -> None:
    for name in ("once.svg", "again.svg"):
        save(trace_figure(traced(), "net-0001"), tmp_path / name)
    text = (tmp_path / "once.svg").read_text("utf-8")
    assert text == (tmp_path / "again.svg").read_text("utf-8")
    assert ">effective learning rate</text>" in text
    assert "fill: #ffffff" in text
    assert len(text) < 50_000


def test_drawing_leaves_matplotlib_as_it_was(traced: Traced) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    trace_figure(traced(), "net-0001")
    assert dict(mpl.rcParams) == before


def test_plots_need_no_window_and_none_of_the_heavy_libraries() -> None:
    probe = (
        "import sys, study.results.plots; print([name for name in ('torch', 'ray', 'mlflow', 'optuna', 'matplotlib.pyplot') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"
