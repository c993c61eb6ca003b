"""Quantities: what a claim speaks of, measured on the table of trials, with seeds as units.

    where ─> rows ─┬─ level       the mean of each seed's trials
                   ├─ slope       a line through each seed's trials
                   ├─ spread      each seed's groups
                   ├─ contrast    two arms: the mean of each seed in either, or of each seed's pairs
                   └─ rank        contrasts of all arms that the order speaks of

A seed is a pair of `seed` and `data.seed`: several trials of one seed count once, and never a layer or a step.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from itertools import pairwise
from operator import mul
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from study.claimspec import REPLICATE, ClaimSpec, Condition, Contrast, Level, Rank, Slope, Spread
from study.errors import Problem, SpecError
from study.results.arms import replicate_number
from study.results.intervals import CONFIDENCE, Interval, Values, difference, interval
from study.space import arm_label, word

SEEDS = ("seed", "data.seed")
"""The fields that make a unit."""

LEAST_POINTS = 3
"""Different values of x that a line through one seed's trials needs."""

DIGITS = 9
"""Significant digits up to which two numbers count as one, such as products of learning rate and decay."""

Samples: TypeAlias = tuple[Values] | tuple[Values, Values]
"""One value for each unit; of an unpaired comparison, for each unit of either arm."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A number with its interval."""

    estimate: float | None
    interval: Interval | None
    n: int


def measured(claim: ClaimSpec, table: pd.DataFrame) -> Measured:
    """The number that a claim is about, on the trials that it is about.

    Raises:
        SpecError: if the claim does not fit the table.
    """
    # What `study best --confirm` trained belongs to a few of the best trials, not to every arm.
    table = table[[replicate_number(str(trial_id), "c") is None for trial_id in table["trial_id"]]].reset_index(drop=True)
    chosen = table[_selected(claim, table, claim.where)]
    rows = chosen[chosen["outcome"] == "completed"]
    match claim.form:
        case Level() as form:
            return _summary((_levels(claim, form, rows),))
        case Slope() as form:
            return _summary((_slopes(claim, form, rows),))
        case Spread() as form:
            logs = form.statistic == "max_over_min"
            spreads = _spreads(claim, form, rows)
            if form.against:
                others = table[_selected(claim, table, form.against) & (table["outcome"] == "completed")]
                spreads, logs = _log_ratios(claim, spreads, _spreads(claim, form, others)), True
            return _summary((np.asarray(spreads, dtype=np.float64),), logs)
        case Contrast() as form:
            logs = form.statistic == "ratio"
            return _summary(_compared(claim, form, rows, form.a, form.b, logs), logs)
        case Rank() as form:
            return _margin(claim, form, rows, list(dict.fromkeys(_plain(value) for value in _column(claim, chosen, form.arm))))


def _summary(samples: Samples, logs: bool = False, confidence: float = CONFIDENCE) -> Measured:
    """Mean, or difference of means, with its interval; of logarithms, those of the numbers themselves."""
    n = min(map(len, samples))
    if n == 0:
        return Measured(None, None, 0)
    center, found = difference(*samples), interval(samples, confidence)
    if logs:
        center, found = _exp(center), found and (_exp(found[0]), _exp(found[1]))
    return Measured(center, found, n)


def _levels(claim: ClaimSpec, form: Level, rows: pd.DataFrame) -> Values:
    """The mean of each seed's trials; a trial without all of the metrics does not count."""
    metrics = pd.DataFrame({column: _numbers(claim, rows, column, positive=False) for column in form.metric}).dropna()
    values = getattr(metrics, form.statistic)(axis=1)
    return _means(_keys(rows, _seeds(rows))[metrics.index], values)


def _slopes(claim: ClaimSpec, form: Slope, rows: pd.DataFrame) -> Values:
    """The slope of each seed whose trials have enough different x."""
    y = sum(_scaled(_numbers(claim, rows, column, positive=form.log), form.log) for column in form.y) / len(form.y)
    x = reduce(mul, (_numbers(claim, rows, column, positive=form.log) for column in form.x))
    points = pd.DataFrame({"unit": _keys(rows, _seeds(rows)), "x": x, "y": y}).dropna()
    groups = [part for _, part in points.groupby("unit", sort=False) if part["x"].map(_plain).nunique() >= LEAST_POINTS]
    return np.array([_slope(_scaled(part["x"], form.log), part["y"]) for part in groups], dtype=np.float64)


def _scaled(values: "pd.Series", log: bool) -> "pd.Series":
    return np.log(values) if log else values


def _slope(x: "pd.Series", y: "pd.Series") -> float:
    """By least squares."""
    away = x - x.mean()
    return float((away * y).sum() / (away * away).sum())


def _spreads(claim: ClaimSpec, form: Spread, rows: pd.DataFrame) -> "pd.Series":
    """The mean spread of the groups of each seed, by seed; a group needs two values."""
    logs = form.statistic == "max_over_min"
    for column in (*form.over, *form.by):
        _column(claim, rows, column)
    over, unit, group = _keys(rows, form.over), _keys(rows, _seeds(rows)), _keys(rows, form.by)
    parts = [
        pd.DataFrame({"unit": unit, "group": group, "over": over, "metric": metric, "value": _numbers(claim, rows, metric, positive=logs)})
        for metric in form.metric
    ]
    values = pd.concat(parts).dropna(subset="value").groupby(["unit", "group", "over", "metric"], sort=False)["value"].mean()
    groups = values.groupby(["unit", "group"], sort=False)
    spreads = groups.agg(lambda group: _spread(claim, group, form.statistic)).where(groups.size() > 1).dropna()
    return spreads.groupby("unit", sort=False).mean()


def _log_ratios(claim: ClaimSpec, spreads: "pd.Series", others: "pd.Series") -> "pd.Series":
    """The logarithm of each seed's spread over its other spread (of largest over smallest value, of their logarithms' ratio)."""
    pairs = pd.DataFrame({"first": spreads, "second": others}).dropna()
    if (none := pairs[(pairs <= 0).any(axis=1)]).size:
        raise _misfit(claim, f"a spread is 0, which has no ratio to another ({none.index[0]})", "leave this seed out by `where`")
    return np.log(pairs["first"] / pairs["second"])


def _spread(claim: ClaimSpec, values: "pd.Series", statistic: str) -> float:
    """The spread of one group; of largest over smallest value the logarithm."""
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    if statistic == "max_over_min":
        return math.log(high / low)
    if statistic == "std":
        return float(values.std(ddof=1))
    if mean == 0:
        raise _misfit(claim, "a relative range needs a mean other than 0", "use the statistic std")
    return (high - low) / abs(mean)


def _margin(claim: ClaimSpec, form: Rank, rows: pd.DataFrame, arms: Sequence[Hashable]) -> Measured:
    """By how much an arm is ahead of one that it should be ahead of, where that is least.

    The interval holds the least margin with 95% confidence, however many there are: its lower end is the lowest of theirs; its upper
    end is the lowest of their upper ends, each at a level that is divided by their number.
    """
    given, first = claim.expect.given, _plain(claim.expect.first)
    order = given.get("order", ())
    pairs = list(pairwise(map(_plain, order))) or [(first, other) for other in arms if other != first]
    samples = [_compared(claim, form, rows, *(pair if form.direction == "maximize" else pair[::-1]), logs=False) for pair in pairs]
    margins = [_summary(sample) for sample in samples]
    n = min((margin.n for margin in margins), default=0)
    if n == 0:
        return Measured(None, None, 0)
    corrected = [_summary(sample, confidence=1 - (1 - CONFIDENCE) / len(samples)) for sample in samples]
    lows, highs = ([found.interval[end] for found in each if found.interval] for end, each in enumerate((margins, corrected)))
    least = min(margin.estimate for margin in margins if margin.estimate is not None)
    return Measured(least, (min(lows), min(highs)) if len(lows) == len(samples) else None, n)


def _compared(claim: ClaimSpec, form: Contrast | Rank, rows: pd.DataFrame, a: Hashable, b: Hashable, logs: bool) -> Samples:
    """The metric of each seed in arm a and in arm b; where trials are paired, the differences of each seed."""
    arms = _column(claim, rows, form.arm).map(_plain)
    values = _numbers(claim, rows, form.metric, positive=logs)
    known = pd.DataFrame({"unit": _keys(rows, _seeds(rows)), "value": np.log(values) if logs else values, "trial": rows["trial_id"]})
    for column in form.paired_by:
        _column(claim, rows, column)
    known = known.assign(key=_keys(rows, form.paired_by)).dropna(subset="value")
    first, second = (known[arms[known.index] == _plain(arm)] for arm in (a, b))
    if form.paired_by and len(first) and len(second):
        return (_paired(claim, form, {a: first, b: second}),)
    return _means(first["unit"], first["value"]), _means(second["unit"], second["value"])


def _paired(claim: ClaimSpec, form: Contrast | Rank, arms: Mapping[Any, pd.DataFrame]) -> Values:
    """The mean difference of each seed's pairs.

    Raises:
        SpecError: if a trial has no partner, or several.
    """
    for arm, own in arms.items():
        if (twice := own[own["key"].duplicated(keep=False)]).empty:
            continue
        key = twice["key"].iloc[0]
        named = ", ".join(twice.loc[twice["key"] == key, "trial"])
        pair = f"{key} stands more than once in {arm_label({form.arm: arm})}: {named}"
        raise _misfit(claim, f"pairing is not one-to-one ({pair})", "narrow `where`, for example to `replicate: true`, or add fields to `paired_by`")
    first, second = (own.set_index("key") for own in arms.values())
    for (arm, own), other in zip(arms.items(), (second, first), strict=True):
        if not (alone := own[~own["key"].isin(other.index)]).empty:
            lonely = alone.iloc[0]
            pair = f"{lonely['trial']} of {arm_label({form.arm: arm})} has no partner with {lonely['key']}"
            raise _misfit(claim, f"pairing is not one-to-one ({pair})", "leave it out by `where`, or compare unpaired")
    second = second.loc[first.index]
    if (mixed := first["unit"] != second["unit"]).any():
        lonely = first[mixed].iloc[0]
        raise _misfit(claim, f"a pair is of two seeds (the one of {lonely['trial']})", f"add {' and '.join(SEEDS)} to `paired_by`")
    return _means(first["unit"], first["value"] - second["value"])


def _means(units: "pd.Series", values: "pd.Series") -> Values:
    """The mean of each unit's values."""
    return np.asarray(values.groupby(units, sort=False).mean(), dtype=np.float64)


def _selected(claim: ClaimSpec, table: pd.DataFrame, conditions: Mapping[str, Condition]) -> "pd.Series":
    """Which rows meet every condition, whatever their outcome."""
    fits = pd.Series(True, table.index)
    for name, condition in conditions.items():
        column = table["replicate_of"].fillna("") != "" if name == REPLICATE else _column(claim, table, name)
        fits &= _fits(column, condition)
    return fits


def _fits(column: "pd.Series", condition: Condition) -> "pd.Series":
    wanted = set(map(_plain, condition.values()))
    fits = column.map(lambda value: _plain(value) in wanted) if wanted else pd.Series(True, column.index)
    numbers = pd.to_numeric(column, errors="coerce")
    if condition.above is not None:
        fits &= numbers > condition.above
    if condition.below is not None:
        fits &= numbers < condition.below
    if condition.between is not None:
        fits &= numbers.between(*condition.between)
    return fits.astype(bool)


def _column(claim: ClaimSpec, table: pd.DataFrame, name: str) -> "pd.Series":
    if name not in table:
        near = get_close_matches(name, list(map(str, table.columns)), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "was any trial trained to its end?"
        raise _misfit(claim, f"the table of trials has no such column (got {name!r})", remedy)
    return table[name]


def _numbers(claim: ClaimSpec, rows: pd.DataFrame, name: str, positive: bool) -> "pd.Series":
    """A column as numbers; NaN where a trial has none.

    Raises:
        SpecError: if it holds something else, or what has no logarithm where one is needed.
    """
    column = _column(claim, rows, name)
    numbers = pd.to_numeric(column, errors="coerce").astype(float).replace([math.inf, -math.inf], math.nan)
    if len(wrong := rows[numbers.isna() & column.map(lambda value: isinstance(value, str))]):
        raise _misfit(claim, f"{name} is no number in {wrong['trial_id'].iloc[0]} (got {wrong[name].iloc[0]!r})", "name a column of numbers")
    if positive and len(wrong := rows[numbers <= 0]):
        got = f"got {wrong[name].iloc[0]:g} in {wrong['trial_id'].iloc[0]}"
        raise _misfit(claim, f"ratios and logarithms need {name} above 0 ({got})", f"narrow `where` with {name}: {{above: 0}}")
    return numbers


def _seeds(rows: pd.DataFrame) -> list[str]:
    return [name for name in SEEDS if name in rows]


def _keys(rows: pd.DataFrame, columns: Sequence[str]) -> "pd.Series":
    """The values of some columns as one text for each row: `seed 3, data.seed 3`."""
    texts = [[f"{column} {_word(value)}" for value in rows[column]] for column in columns]
    return pd.Series([", ".join(parts) for parts in zip(*texts, strict=True)] if texts else "", rows.index, dtype=object)


def _plain(value: Any) -> Hashable:
    """A value by which rows are grouped: numbers to nine digits, booleans apart from them, null for what is not there."""
    if isinstance(value, bool | np.bool_):
        return word(bool(value))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return float(f"{value:.{DIGITS}g}") if isinstance(value, int | float | np.number) else str(value)


def _word(value: Any) -> str:
    plain = _plain(value)
    return f"{plain:.{DIGITS}g}" if isinstance(plain, float) else word(plain)


def _exp(value: float) -> float:
    """Finite, as JSON knows no infinity."""
    return math.exp(min(value, 700.0))


def _misfit(claim: ClaimSpec, message: str, remedy: str) -> SpecError:
    return SpecError([Problem("claim", message, f"claims.{claim.id}", remedy)])
