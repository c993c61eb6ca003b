"""Intervals: as wide as they say, and the bootstrap from 30 values on."""

import math

import numpy as np
import pytest
from scipy import stats

from study.results.intervals import MANY, interval

REPETITIONS = 2_000


def test_a_mean_is_covered_as_often_as_it_should_be() -> None:
    """5 values from a normal distribution: of 2,000 intervals 95% hold the mean, within 4 standard errors."""
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (REPETITIONS, 5))
    covered = np.mean([low <= 3.0 <= high for low, high in (interval((row,)) or (math.nan, math.nan) for row in drawn)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / REPETITIONS)


def test_a_difference_of_unequal_variances_is_covered_too() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.normal(1.0, 3.0, (REPETITIONS, 8)), draw.normal(0.0, 1.0, (REPETITIONS, 12))
    found = [interval(pair) or (math.nan, math.nan) for pair in zip(first, second, strict=True)]
    assert abs(np.mean([low <= 1.0 <= high for low, high in found]) - 0.95) < 0.025


def test_they_are_those_of_scipy() -> None:
    draw = np.random.default_rng(2)
    first, second = draw.normal(size=7), draw.normal(size=9)
    assert interval((first,)) == pytest.approx(tuple(stats.ttest_1samp(first, 0).confidence_interval(0.95)))
    assert interval((first, second)) == pytest.approx(tuple(stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)))


def test_the_bootstrap_takes_over_at_thirty_values() -> None:
    """Of a skewed distribution Student's interval is symmetric about the mean, that of the bootstrap is not; it is the same every time."""
    values = np.random.default_rng(3).lognormal(0, 1, MANY)
    low, high = interval((values[:-1],)) or (0, 0)
    assert high - values[:-1].mean() == pytest.approx(values[:-1].mean() - low)
    low, high = interval((values,)) or (0, 0)
    assert high - values.mean() > 1.2 * (values.mean() - low)
    assert interval((values,)) == (low, high)
    assert interval((values, values[:-1])) == pytest.approx(tuple(stats.ttest_ind(values, values[:-1], equal_var=False).confidence_interval(0.95)))
    shifted = interval((values + 1, values)) or (0, 0)
    assert shifted[0] < 1 < shifted[1]


def test_values_that_are_all_the_same_have_an_interval_without_width() -> None:
    assert interval((np.full(5, 2.0),)) == (2.0, 2.0)
    assert interval((np.full(40, 2.0), np.full(40, 0.5))) == (1.5, 1.5)


def test_one_value_has_no_interval() -> None:
    assert interval((np.array([1.0]),)) is None
    assert interval((np.array([1.0, 2.0]), np.array([1.0]))) is None
