"""Arms: which arm is ahead, by how much, and whether it would be again. Replicates alone decide; the search only proposed them.

    replicates of a trial ──> candidate: mean over seeds, 95% interval
    candidates of an arm ──best──> the arm's result          arms are ranked by it
    two arms, same seeds ──> paired difference, 95% interval     all arms, same seeds ──> P(the winner wins again)

Replicate k has the same seeds in every arm, so what a seed does to all arms cancels in a difference. A trial's value in the search
chose it and therefore flatters it: it enters no mean and no interval here.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special

from study.measurement import TrialRecord
from study.results.intervals import Interval, interval
from study.spec import ObjectiveSpec

if TYPE_CHECKING:
    import pandas as pd

Kind: TypeAlias = Literal["r", "c"]
"""Of a replicate: `r`, of the study's race; `c`, of `study best --confirm`."""

_NUMBERED = re.compile(r"-([rc])(\d+)$")

GIVEN_UP = 2
"""A candidate that has so many seeds fewer than another of its arm was given up by the race: it does not lead."""

LEAST_SEEDS = 3
"""Fewer common seeds say nothing about winning again: one is left out, and one alone knows no noise."""

GRID = np.linspace(-6, 6, 121)
WEIGHTS = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()
"""A quadrature over the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One candidate of an arm: a trial of the search that was trained again with fresh seeds."""

    arm: str
    trial_id: str
    mean: float | None
    """Over its seeds; None where none of its replicates completed."""
    interval: Interval | None
    """95% confidence interval of the mean; None with fewer than two seeds."""
    seeds: int
    """Replicates that completed."""
    values: Mapping[int, float]
    """Their values by the replicate's number."""
    lost: int = 0
    """Replicates that diverged or failed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two arms are apart on the seeds that both have."""

    a: str
    b: str
    estimate: float | None
    """The mean of a's value minus b's; None without a common seed."""
    interval: Interval | None
    n: int
    """Common seeds."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the replicates of a study say about its arms."""

    metric: str
    direction: Literal["minimize", "maximize"]
    arms: tuple[ArmResult, ...]
    """Every arm's best candidate, the best arm first; arms without replicates are left out."""
    differences: tuple[Difference, ...]
    """Of every two arms, the better one first."""
    wins_again: float | None
    """The probability that the first arm is the first again, see `wins_again`; None with fewer than two arms or common seeds."""
    candidates: tuple[ArmResult, ...]
    """Every replicated trial, best first within its arm, arms in the order of `arms`."""

    @property
    def winner(self) -> ArmResult | None:
        """The best arm's result; None where no replicate completed."""
        return self.arms[0] if self.arms and self.arms[0].mean is not None else None

    def behind(self, arm: str) -> Difference | None:
        """An arm's difference to the winner, as winner minus arm; None for the winner itself."""
        return next((found for found in self.differences if found.a == self.arms[0].arm and found.b == arm), None)

    def document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "metric": self.metric,
            "direction": self.direction,
            "arms": [_document(arm) for arm in self.arms],
            "differences": [{**asdict(each), "interval": _ends(each.interval)} for each in self.differences],
            "wins_again": self.wins_again,
            "candidates": [_document(candidate) for candidate in self.candidates],
        }


class Replicated(NamedTuple):
    """One replicate: of which trial, and what became of it."""

    trial_id: str
    arm: str
    replicate_of: str
    outcome: str
    value: float | None


def compare_arms(table: "pd.DataFrame", objective: ObjectiveSpec, metric: str | None = None) -> Comparison:
    """Compares the arms of a study by the table of its trials, see `compare`.

    Args:
        table: One row for each trial, as in `trials.parquet`.
        objective: What trials are ranked by.
        metric: Another column to compare by, such as `test/error`, in the objective's direction. Default: the objective.
    """
    column = "value" if metric is None else metric
    rows = table[table["replicate_of"].fillna("") != ""] if {"replicate_of", column} <= set(table.columns) else table[:0]
    columns = ("trial_id", "arm", "replicate_of", "outcome", column)
    found = (Replicated(*row) for row in zip(*(rows[name] for name in columns), strict=True)) if len(rows) else ()
    return compare(candidates(found), objective, metric)


def compare_records(records: Iterable[TrialRecord], objective: ObjectiveSpec) -> Comparison:
    """Compares the arms of a study by its records, see `compare`."""
    return compare(candidates(map(replicated, records)), objective)


def replicated(record: TrialRecord) -> Replicated:
    """A record as a replicate."""
    return Replicated(record.trial_id, record.arm, record.replicate_of, str(record.outcome), record.value)


def compare(found: Sequence[ArmResult], objective: ObjectiveSpec, metric: str | None = None) -> Comparison:
    """Compares arms by their candidates.

    An arm's result is its best candidate: by its mean, after those that lost a replicate to divergence or failure come last, and without
    those that the race gave up. Several candidates of an arm are compared on the same replicates that give the mean, which flatters the best
    of `top` a little, alike in every arm.

    Args:
        found: Every replicated trial.
        objective: What trials are ranked by.
        metric: What the candidates were measured by, where it is not the objective.
    """
    by_arm: dict[str, list[ArmResult]] = {}
    for one in found:
        by_arm.setdefault(one.arm, []).append(one)
    ordered = [ranked(own, objective) for own in by_arm.values()]
    ordered.sort(key=lambda own: place(own[0], objective))
    arms = tuple(own[0] for own in ordered)
    return Comparison(
        metric or objective.metric,
        objective.direction,
        arms,
        tuple(paired(a, b) for a, b in combinations(arms, 2)),
        _wins_again(arms, objective),
        tuple(one for own in ordered for one in own),
    )


def ranked(found: Sequence[ArmResult], objective: ObjectiveSpec) -> list[ArmResult]:
    """Candidates, best first; one that was given up or has lost replicates comes after those that have not."""
    most = max((one.seeds + one.lost for one in found), default=0)
    return sorted(found, key=lambda one: (one.seeds + one.lost <= most - GIVEN_UP, *place(one, objective)))


def place(one: ArmResult, objective: ObjectiveSpec) -> tuple[bool, float, int, str]:
    """Sorts candidates: without lost replicates first, then by their means, then the earlier trial."""
    mean = math.inf if one.mean is None else objective.rank(one.mean)
    return one.lost > 0, mean, len(one.trial_id), one.trial_id


def paired(a: ArmResult, b: ArmResult) -> Difference:
    """Two candidates' difference on common seeds."""
    found = np.array([a.values[seed] - b.values[seed] for seed in sorted(a.values.keys() & b.values.keys())], dtype=np.float64)
    if not len(found):
        return Difference(a.arm, b.arm, None, None, 0)
    return Difference(a.arm, b.arm, float(found.mean()), interval((found,)), len(found))


def replicate_number(trial_id: str, kind: Kind = "r") -> int | None:
    """`gains-0007-r2` is replicate 2; None for a trial that is no replicate of this kind."""
    found = _NUMBERED.search(trial_id)
    return int(found[2]) if found is not None and found[1] == kind else None


def candidates(replicates: Iterable[Replicated], kind: Kind = "r") -> list[ArmResult]:
    """The trials that were replicated, with the values of their completed replicates; other kinds of rows are passed over."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    lost: dict[tuple[str, str], int] = {}
    for one in replicates:
        number = replicate_number(one.trial_id, kind) if one.replicate_of else None
        if number is None:
            continue
        own = values.setdefault((one.arm, one.replicate_of), {})
        if one.outcome == "completed" and one.value is not None and math.isfinite(one.value):
            own[number] = float(one.value)
        elif one.outcome in ("diverged", "failed"):
            lost[one.arm, one.replicate_of] = lost.get((one.arm, one.replicate_of), 0) + 1
    return [candidate(*key, own, lost.get(key, 0)) for key, own in values.items()]


def candidate(arm: str, trial_id: str, values: Mapping[int, float], lost: int = 0) -> ArmResult:
    """A candidate from its replicates' values."""
    ordered = dict(sorted(values.items()))
    numbers = np.array(list(ordered.values()), dtype=np.float64)
    mean = float(numbers.mean()) if len(numbers) else None
    return ArmResult(arm, trial_id, mean, interval((numbers,)), len(numbers), ordered, lost)


def _wins_again(arms: Sequence[ArmResult], objective: ObjectiveSpec) -> float | None:
    """On the seeds that all arms have; an arm without any cannot win."""
    rivals = [arm for arm in arms if arm.values]
    common = sorted(set.intersection(*(set(arm.values) for arm in rivals))) if rivals else []
    if len(rivals) < 2 or len(common) < LEAST_SEEDS:
        return None
    values = np.array([[[-objective.rank(arm.values[seed]) for arm in rivals] for seed in common]])
    return float(wins_again(values, winner=0)[0])


def wins_again(values: NDArray[np.float64], winner: int | None = None) -> NDArray[np.float64]:
    """The probability that the arm that leads without one of the seeds also leads on that one: a fresh seed, for all that it knew.

    This is what leaving out each seed in turn estimates, without bias and whatever the arms' true distance. Instead of counting seeds,
    which knows steps of 1/n only, the seed that is left out is drawn from the normal distribution around the arms' means:

        x ~ N(means, s^2 (n - 1)/n)     P(for every other arm: 0 < x_winner - x_other < n (mean_winner - mean_other))

    The right side says that the winner leads on the seeds that are left. Averaged over many studies it is the share of winners that lead
    again, within 5 points from 5 seeds on. It is low, also below chance, where the lead changes with every seed. Where arms hardly differ,
    the studies in which it happens to come out high win less often than it says: that a lead was selected cannot be undone by any estimate.

    Args:
        values: [studies, seeds, arms]; larger is better. A seed's effect on all arms cancels; arms share one variance.
        winner: The arm in question. Default: in each study the one with the largest mean.
    """
    _, seeds, arms = values.shape
    means = values.mean(1)
    rest = values - means[:, None] - values.mean(2, keepdims=True) + values.mean((1, 2))[:, None, None]
    deviation = np.sqrt((rest**2).sum((1, 2)) / ((seeds - 1) * (arms - 1)))
    first = means.argmax(1) if winner is None else np.full(len(means), winner)
    others = np.arange(arms) != first[:, None]
    ahead = (np.take_along_axis(means, first[:, None], 1) - means)[others].reshape(len(means), arms - 1)
    certain = (ahead > 0).all(1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = (ahead / (deviation * math.sqrt((seeds - 1) / seeds))[:, None])[..., None]
        chances = (special.ndtr(apart + GRID) - special.ndtr(apart * (1 - seeds) + GRID)).clip(min=0).prod(1) @ WEIGHTS
    return np.asarray(np.where(deviation > 0, chances, certain), dtype=np.float64)


def _document(arm: ArmResult) -> dict[str, Any]:
    return {**asdict(arm), "interval": _ends(arm.interval), "values": {str(seed): value for seed, value in arm.values.items()}}


def _ends(found: Interval | None) -> list[float] | None:
    return None if found is None else list(found)
