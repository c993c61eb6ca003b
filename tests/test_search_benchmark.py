"""The benchmark of searches compares like with like: surfaces, boxes and levels are what it says they are."""

import csv

import numpy as np
import pytest

from tests.benchmarks.search import LEVELS, SURFACES, TRIALS, WAYS, goal, needed, searched, spec
from tests.benchmarks.search_table import DECAYS, RATES, TABLE


def test_a_surface_that_is_looked_up_goes_through_the_trials_that_were_trained() -> None:
    with TABLE.open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == len(RATES) * len(DECAYS)
    lr, decay, error = (np.array([row[name] for row in rows]) for name in ("lr", "weight_decay", "error"))
    assert SURFACES["digits"](np.log10(lr), np.log10(decay)) == pytest.approx(error)


@pytest.mark.parametrize("name", ["ridge", "cliff"])
def test_neither_box_holds_more_of_what_is_looked_for(name: str) -> None:
    shares = goal(name).shares
    assert shares["intrinsic"] == pytest.approx(shares["decay"], rel=0.05)


def test_a_level_is_a_share_of_the_way_from_the_median_to_the_best() -> None:
    aim = goal("cliff")
    assert aim.value(0) == aim.median and aim.value(1) == aim.best and aim.best < aim.value(LEVELS[1]) < aim.value(LEVELS[0]) < aim.median


def test_trials_are_counted_until_a_curve_is_at_a_value() -> None:
    assert [needed(np.array([3.0, 2.0, 1.0]), value) for value in (3, 1.5, 0.5)] == [1, 3, 4]


@pytest.mark.parametrize("way", ["tpe", "tpe, intrinsic"])
def test_a_search_never_forgets_its_best_and_survives_trials_that_diverge(way: str) -> None:
    curve = searched(SURFACES["cliff"], spec(*WAYS[way], seed=0))
    assert len(curve) == TRIALS and (np.diff(curve[np.isfinite(curve)]) <= 0).all()
    assert curve[-1] < goal("cliff").median
