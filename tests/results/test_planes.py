"""The plane of learning rate and decay shows every trial where it stands, in the color of its value."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from study.results.planes import MOST_PANELS, plane_figure
from study.results.plots import save

Row = tuple[float, float, str, float | None]
"""Learning rate, decay, outcome and value of a trial."""

ROWS: list[Row] = [
    (0.01, 1e-4, "completed", 0.3),
    (0.1, 1e-3, "completed", 0.1),
    (0.1, 1e-2, "stopped", 0.05),
    (1.0, 1e-1, "diverged", None),
    (0.5, 1e-3, "failed", None),
]


def table(rows: list[Row], arm: str = "all", **columns: Any) -> pd.DataFrame:
    """What a study's table says of these trials."""
    names = ["optimizer.lr", "optimizer.weight_decay", "outcome", "value"]
    return pd.DataFrame(rows, columns=names).assign(arm=arm, replicate_of="", **columns)


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def dots(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Outcome to the places of its trials."""
    return {str(drawn.get_label()): [tuple(place) for place in drawn.get_offsets().tolist()] for drawn in axes.collections}


def ring(axes: Axes) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0].tolist()) for line in axes.lines if line.get_label() == "best"]


def diagonals(axes: Axes) -> dict[str, np.ndarray[Any, Any]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines if line.get_label() != "best"}


def test_every_trial_stands_at_its_learning_rate_and_decay() -> None:
    (axes,) = panels(plane_figure(table(ROWS), "val/error", "minimize"))
    assert dots(axes) == {"completed": [(0.01, 1e-4), (0.1, 1e-3)], "stopped": [(0.1, 1e-2)], "diverged": [(1.0, 0.1)]}
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "log", "learning rate", "weight decay")


def test_completed_trials_are_filled_and_stopped_ones_smaller_and_hollow() -> None:
    (axes,) = panels(plane_figure(table(ROWS), "val/error", "minimize"))
    completed, stopped, _ = axes.collections
    assert len(completed.get_facecolors()) == 2
    assert len(stopped.get_facecolors()) == 0
    assert stopped.get_sizes()[0] < completed.get_sizes()[0]


@pytest.mark.parametrize(("direction", "best"), [("minimize", (0.1, 1e-3)), ("maximize", (0.01, 1e-4))])
def test_the_best_completed_trial_is_ringed_and_dark(direction: str, best: tuple[float, float]) -> None:
    (axes,) = panels(plane_figure(table(ROWS), "val/error", direction))
    assert ring(axes) == [best]
    completed = axes.collections[0]
    brightness = dict(zip(dots(axes)["completed"], np.asarray(completed.get_facecolors())[:, :3].sum(axis=1), strict=True))
    assert brightness[best] == min(brightness.values())


def test_the_color_bar_has_the_name_of_the_objective() -> None:
    figure = plane_figure(table(ROWS), "val/error", "minimize")
    assert figure.axes[-1].get_ylabel() == "val/error"


@pytest.mark.parametrize(("highest", "logarithmic"), [(0.2, False), (0.9, True)])
def test_colors_of_values_far_apart_stand_for_logarithms(highest: float, logarithmic: bool) -> None:
    figure = plane_figure(table([(0.1, 1e-3, "completed", 0.03), (0.1, 1e-2, "completed", highest)]), "val/error", "minimize")
    bar = figure.axes[-1]
    assert isinstance(bar._colorbar.norm, LogNorm) == logarithmic  # type: ignore[attr-defined]


def test_diagonals_are_lines_of_constant_product_with_its_value() -> None:
    (axes,) = panels(plane_figure(table(ROWS), "val/error", "minimize"))
    drawn = diagonals(axes)
    assert {"1e-5", "0.0001", "0.001", "0.01"} <= set(drawn)
    for value, ends in drawn.items():
        assert ends[:, 0] * ends[:, 1] == pytest.approx(float(value))
    assert [text.get_text() for text in axes.texts] == list(drawn)


def test_trials_without_decay_stand_on_a_strip_of_their_own() -> None:
    (axes,) = panels(plane_figure(table([*ROWS, (0.3, 0.0, "completed", 0.01)]), "val/error", "minimize"))
    (lr, height) = dots(axes)["completed"][-1]
    (strip,) = axes.patches
    low, high = strip.get_extents().transformed(axes.transData.inverted()).intervaly
    assert lr == 0.3
    assert low < height < high < 1e-4
    assert ring(axes) == [(lr, height)]
    assert "0" in [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()]


def test_a_study_without_any_decay_has_a_plane(tmp_path: Path) -> None:
    figure = plane_figure(table([(0.1, 0.0, "completed", 0.1), (0.2, 0.0, "completed", 0.2)]), "val/error", "minimize")
    (axes,) = panels(figure)
    assert len(dots(axes)["completed"]) == 2
    assert not diagonals(axes)
    save(figure, tmp_path / "plane.png")


def test_each_arm_has_a_panel_on_common_axes_and_colors(tmp_path: Path) -> None:
    trials = pd.concat([table(ROWS, "optimizer.gamma=none"), table([(0.3, 1e-2, "completed", 0.05)], "optimizer.gamma=last")], ignore_index=True)
    figure = plane_figure(trials, "val/error", "minimize")
    first, second = panels(figure)
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["optimizer.gamma=none", "optimizer.gamma=last"]
    assert (first.get_xlim(), first.get_ylim()) == (second.get_xlim(), second.get_ylim())
    assert (ring(first), ring(second)) == ([], [(0.3, 1e-2)])
    save(figure, tmp_path / "plane.svg")


def test_of_many_arms_the_best_have_panels() -> None:
    arms = [table([(0.1, 1e-3, "completed", 1 / (number + 1))], f"optimizer.gamma=g{number}") for number in range(11)]
    figure = plane_figure(pd.concat(arms, ignore_index=True), "val/error", "minimize")
    assert [axes.get_title(loc="left") for axes in panels(figure)] == [f"optimizer.gamma=g{number}" for number in range(3, 11)]
    assert figure.get_suptitle() == f"the best {MOST_PANELS} of 11 arms"


def test_arms_that_differ_in_their_place_alone_share_a_panel() -> None:
    arms = [table([(0.1, decay, "completed", decay)], f"optimizer.weight_decay={decay}") for decay in (1e-3, 1e-2)]
    (axes,) = panels(plane_figure(pd.concat(arms, ignore_index=True), "val/error", "minimize"))
    assert len(dots(axes)["completed"]) == 2


def test_replicates_stand_where_their_trial_does_and_are_left_out() -> None:
    trials = pd.concat([table(ROWS), table([(0.7, 1e-3, "completed", 0.0)]).assign(replicate_of="gains-0001")], ignore_index=True)
    (axes,) = panels(plane_figure(trials, "val/error", "minimize"))
    assert len(dots(axes)["completed"]) == 2
    assert ring(axes) == [(0.1, 1e-3)]


def test_the_objectives_own_column_serves_where_there_is_no_value() -> None:
    (axes,) = panels(plane_figure(table(ROWS).rename(columns={"value": "val/error"}), "val/error", "minimize"))
    assert ring(axes) == [(0.1, 1e-3)]


@pytest.mark.parametrize("rows", [[], [(0.1, 1e-3, "failed", None)], [(0.1, 1e-3, "diverged", None)], [(0.1, 1e-3, "stopped", math.inf)]])
def test_a_study_without_values_is_drawn_without_colors(rows: list[Row], tmp_path: Path) -> None:
    figure = plane_figure(table(rows), "val/error", "minimize")
    assert [axes.get_ylabel() for axes in figure.axes] == ["weight decay"]
    save(figure, tmp_path / "plane.png")


def test_one_trial_is_drawn_like_any_other(tmp_path: Path) -> None:
    figure = plane_figure(table([(0.1, 1e-3, "completed", 0.1)]), "val/error", "minimize")
    assert ring(panels(figure)[0]) == [(0.1, 1e-3)]
    save(figure, tmp_path / "plane.png")
