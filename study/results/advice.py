"""Advice: the warnings that a careful colleague would give about the trials of a study.

    table of trials ─┬─ the best lies near an end of an axis ───> edge             how far to widen it
                     ├─ an arm has few completed trials ────────> few-completed
                     └─ many trials diverge, and where ─────────> diverged
    histories ──────── the best still improved at its end ──────> still-improving
    comparison ─────── the winner is not ahead of the next ─────> not-separable
                  └─── there is none: one seed a trial ─────────> one-seed
    metrics ────────── lr and decay changed as trials trained ──> mutated

Pure functions of what a study left behind. Every warning says what was seen, in numbers, and what to do about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from study.measurement import EXPLOITS, History
from study.optimizer import PRODUCT
from study.results.arms import Comparison, Difference, compare_arms
from study.results.edges import End, near_end
from study.results.quantities import SEEDS
from study.results.wording import counted, listed, number, span
from study.space import Axis, arm_label
from study.spec import StudySpec

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["mutated", "edge", "few-completed", "diverged", "still-improving", "not-separable", "one-seed"]

LEAST_COMPLETED = 3
"""Completed trials of an arm below which its best says little."""

UNEVEN = 2
"""An arm with so many times fewer completed trials than another is compared unfairly: the best of more draws is better by chance."""

LEAST_DIVERGED = 2
"""Diverged trials from which on it is asked where they are."""

MANY_DIVERGED = 0.2
"""Share of diverged trials that is worth a word wherever they are."""

SIGNIFICANT = 0.05

LEAST_MEASURED = 5
"""Measurements below which nothing is said about how a trial's objective moves."""

TAIL = 0.3
"""The share of a trial's last measurements, at least four, that a trend is read from."""

LEAST_TREND = 0.01
"""Change over the tail, as a share of the change since the first measurement, below which a trend is of no interest."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One warning."""

    kind: Kind
    says: str
    """What was seen."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.says}; {self.remedy}"


def advise(spec: StudySpec, table: "pd.DataFrame", histories: Mapping[str, History] | None = None) -> list[Advice]:
    """Every warning about a study, those that change what to believe first.

    Args:
        spec: The study.
        table: One row for each trial, as in `trials.parquet`.
        histories: Trial to the objective at its measurements; trials that are not there are not judged.
    """
    if table.empty:
        return []
    trials = searched(table)
    best = best_of_arms(trials, spec.objective.direction)
    return [
        *_mutated(spec, trials),
        *_separation(spec, table, compare_arms(table, spec.objective)),
        *_few_completed(spec, trials),
        *(_edges(spec, best) if spec.stopping.scheduler != "pbt" else ()),
        *_still_improving(spec, best, histories or {}),
        *_diverged(spec, trials),
    ]


def advice_documents(warnings: Sequence[Advice]) -> list[dict[str, Any]]:
    """Warnings as `study report --json` prints them."""
    return [asdict(warning) for warning in warnings]


def searched(table: "pd.DataFrame") -> "pd.DataFrame":
    """The trials of the search, without replicates."""
    return table[table["replicate_of"].fillna("") == ""]


def best_of_arms(trials: "pd.DataFrame", direction: str) -> "pd.DataFrame":
    """The best completed trial of each arm that has one, best first; of equals the earlier one."""
    rivals = trials[(trials["outcome"] == "completed") & trials["value"].notna()]
    return rivals.sort_values("value", ascending=direction == "minimize", kind="stable").drop_duplicates("arm")


def _mutated(spec: StudySpec, trials: "pd.DataFrame") -> list[Advice]:
    """How many trials were not trained with the values that their rows hold."""
    count = int(trials[EXPLOITS].fillna(0).gt(0).sum()) if EXPLOITS in trials else 0
    if not count:
        return []
    fields = ", ".join(path for path in spec.nuisance if path in PRODUCT)
    says = f"{count} of {counted(len(trials), 'trial')} went on with another's state and changed values: {fields} in tables and pictures are those of launches"
    return [Advice("mutated", says, "see the metrics lr and weight_decay, and mutations.json of each trial")]


def _separation(spec: StudySpec, table: "pd.DataFrame", comparison: Comparison) -> list[Advice]:
    """Whether the order of the best two arms can be believed."""
    winner = comparison.winner
    if winner is None:
        return _one_seed(spec, table)
    if len(comparison.arms) < 2:
        return []
    runner_up = comparison.arms[1]
    apart = comparison.behind(runner_up.arm)
    if separable(apart):
        return []
    if apart is None or apart.interval is None:
        seen = "fewer than two common seeds"
    else:
        seen = f"difference {number(apart.estimate)}, 95% interval {span(apart.interval)}, {counted(apart.n, 'common seed')}"
    says = f"the winner {winner.arm} is not separable from the runner-up {runner_up.arm} ({seen})"
    return [Advice("not-separable", says, "raise replicate.seeds, or take either")]


def _one_seed(spec: StudySpec, table: "pd.DataFrame") -> list[Advice]:
    """Of a study whose arms have no replicates."""
    trials = searched(table)
    completed = trials[trials["outcome"] == "completed"]
    seeds = completed[[name for name in SEEDS if name in completed]].drop_duplicates()
    if len(completed) < 2 or len(seeds) != 1:
        return []
    if len(spec.arms) > 1:
        again = "set replicate.top and replicate.seeds to compare them on fresh seeds"
        remedy = "run the study with other values of trial.seed" if spec.stopping.scheduler == "pbt" else again
        return [Advice("one-seed", "one seed: differences between arms are not findings", remedy)]
    if len(trials) < len(table):  # its best was confirmed
        return []
    says = f"one seed: the best of {counted(len(completed), 'completed trial')} is also the luckiest, and its value a little too good"
    again = (
        "run the study with another trial.seed"
        if spec.stopping.scheduler == "pbt"
        else f"train it again with fresh seeds: study best {spec.name} --confirm 5"
    )
    return [Advice("one-seed", says, again)]


def separable(difference: Difference | None) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return difference is not None and difference.interval is not None and not difference.interval[0] <= 0 <= difference.interval[1]


def _few_completed(spec: StudySpec, trials: "pd.DataFrame") -> list[Advice]:
    labels = [arm_label(arm) for arm in spec.arms]
    completed = {label: int(((trials["arm"] == label) & (trials["outcome"] == "completed")).sum()) for label in labels}
    enough = max(LEAST_COMPLETED, -(-max(completed.values()) // UNEVEN))
    found = []
    for label, count in completed.items():
        own = trials[trials["arm"] == label]
        if count >= enough or own.empty:
            continue
        most = f"; {max(completed.values())} did in another arm" if max(completed.values()) > count and len(labels) > 1 else ""
        who = "" if len(labels) == 1 else f"{label}: "
        says = f"{who}only {count} of {counted(len(own), 'trial')} completed{most}"
        found.append(Advice("few-completed", says.replace("only 0", "none"), _more_completed(own)))
    return found


def _more_completed(trials: "pd.DataFrame") -> str:
    """What to do, by what most of the others came to."""
    ends = trials.loc[trials["outcome"] != "completed", "outcome"].value_counts()
    return {
        "stopped": "raise stopping.grace or search.trials, so that its best is not one of a few",
        "diverged": "narrow the axes where its trials diverge",
        "failed": "see the tracebacks under trials/ in the study's folder",
    }.get(str(ends.index[0]) if len(ends) else "", "raise search.trials")


def _edges(spec: StudySpec, best: "pd.DataFrame") -> list[Advice]:
    """Axes at whose ends the best of arms lie."""
    found = []
    for path, axis in spec.nuisance.items():
        if path in SEEDS or path not in best:
            continue
        ends: dict[End, list[tuple[str, float]]] = {}
        for row in best[_exists(axis, best)].to_dict("records"):
            end = near_end(path, axis, row[path])
            if end is not None:
                ends.setdefault(end, []).append((row["arm"], float(row[path])))
        for end, arms in ends.items():
            values = listed([f"{number(value)}{'' if arm == 'all' else f' for {arm}'}" for arm, value in arms])
            where = f"within 5% of the {end.side} end {number(end.bound)} of its axis" if axis.choices is None else f"the {end.side} of its choices"
            found.append(Advice("edge", f"the best {path} is {where} ({values})", end.remedy))
    return found


def _exists(axis: Axis, rows: "pd.DataFrame") -> "pd.Series":
    """In which rows a conditional axis varies."""
    varies = rows["value"].notna()
    for parent, value in axis.when.items():
        varies &= rows[parent] == value
    return varies


def _still_improving(spec: StudySpec, best: "pd.DataFrame", histories: Mapping[str, History]) -> list[Advice]:
    """Whether the best trials were still getting better when their epochs ended."""
    seen = []
    for row in best.to_dict("records"):
        trend = _trend(histories.get(row["trial_id"], ()), spec.objective.direction)
        if trend is not None:
            before, after, epochs = trend
            whose = "" if row["arm"] == "all" else f" of {row['arm']}"
            seen.append(f"{row['trial_id']}{whose} from {number(before)} to {number(after)} in its last {epochs} epochs")
    if not seen:
        return []
    word = "falling" if spec.objective.direction == "minimize" else "rising"
    says = f"{spec.objective.metric} was still {word} at the last epoch ({listed(seen)})"
    return [Advice("still-improving", says, "raise schedule.epochs: the order of trials may change with longer training")]


def _trend(history: History, direction: str) -> tuple[float, float, int] | None:
    """First and last value of a fitted line through the tail, and its epochs, where it improves and noise does not explain it."""
    if len(history) < LEAST_MEASURED:
        return None
    from scipy import stats

    tail = history[-max(4, round(TAIL * len(history))) :]
    epochs, values = [epoch for epoch, _ in tail], [value for _, value in tail]
    if len(set(values)) == 1:
        return None
    fit = stats.linregress(epochs, values, alternative="less" if direction == "minimize" else "greater")
    change = abs(fit.slope) * (epochs[-1] - epochs[0])
    if fit.pvalue >= SIGNIFICANT or change < LEAST_TREND * abs(history[0][1] - values[-1]):
        return None
    return fit.intercept + fit.slope * epochs[0], fit.intercept + fit.slope * epochs[-1], epochs[-1] - epochs[0] + 1


def _diverged(spec: StudySpec, trials: "pd.DataFrame") -> list[Advice]:
    """How many trials diverged, and in which part of the space."""
    from study.results.regions import Region, regions

    diverged = trials["outcome"] == "diverged"
    count = int(diverged.sum())
    if count < LEAST_DIVERGED:
        return []
    found: list[tuple[float, Region]] = sorted(((region.chance(diverged), region) for region in regions(spec, trials)), key=lambda pair: pair[0])
    if found and found[0][0] < SIGNIFICANT:
        region = found[0][1]
        inside, outside = diverged[region.holds], diverged[~region.holds]
        says = f"{int(inside.sum())} of {counted(len(inside), 'trial')} with {region.words} diverged, and {int(outside.sum())} of the other {len(outside)}"
        return [Advice("diverged", says, region.remedy)]
    if count < MANY_DIVERGED * len(trials):
        return []
    return [
        Advice(
            "diverged",
            f"{count} of {len(trials)} trials diverged, in no part of the space more than elsewhere",
            "set optimizer.clip, or a longer schedule.warmup",
        )
    ]
