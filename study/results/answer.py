"""Answer: what a study found, in one paragraph of words, and no more than it found.

replicates ──> who is ahead, by how much, and whether the interval leaves out 0
no replicates ──> the best values, and that they are one draw each
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from study.results.advice import best_of_arms, searched, separable
from study.results.arms import Comparison
from study.results.best import BestConfig
from study.results.claims import Verdict
from study.results.wording import counted, listed, number, span
from study.spec import StudySpec

if TYPE_CHECKING:
    import pandas as pd


def answer(spec: StudySpec, table: "pd.DataFrame", comparison: Comparison, verdicts: Sequence[Verdict] = (), config: BestConfig | None = None) -> str:
    """The paragraph at the top of a report.

    Args:
        spec: The study.
        table: Its trials.
        comparison: Its arms by their replicates.
        verdicts: What became of its claims.
        config: Its best config; one that was confirmed is told with its mean.
    """
    best = best_of_arms(searched(table), spec.objective.direction) if len(table) else table
    if best.empty:
        return "No trial trained to its end with a finite value, so the study has no answer."
    several = len(spec.arms) > 1
    if comparison.winner is not None:
        sentences = _compared(comparison) if several else _confirmed(comparison)
    else:
        sentences = _first_values(spec, best) if several else _best_value(spec, table, best)
        sentences += _again(config)
    return " ".join([*sentences, *_claims(verdicts)])


def _compared(comparison: Comparison) -> list[str]:
    """Arms by their replicates."""
    winner, *others = comparison.arms
    behind = {arm.arm: comparison.behind(arm.arm) for arm in others}
    beaten = [arm for arm in behind if separable(behind[arm])]
    level = [arm for arm in behind if arm not in beaten]
    lower = "lower" if comparison.direction == "minimize" else "higher"
    mean = f"{number(winner.mean)} (95% interval {span(winner.interval)}) over {counted(winner.seeds, 'fresh seed')}"
    if not others:
        return [f"Only {winner.arm} was trained on fresh seeds: its mean {comparison.metric} is {mean}. Nothing can be said of the other arms."]
    if not level:
        first = f"{winner.arm} is ahead of {_every(beaten)}: its mean {comparison.metric} is {mean}."
    else:
        first = f"The study does not separate {winner.arm}, whose mean {comparison.metric} of {mean} is the {_most(lower)}, from {listed(level)}."
    sentences = [first]
    nearest = behind[others[0].arm]
    if nearest is not None and nearest.estimate is not None:
        zero = "leaves out 0" if separable(nearest) else "includes 0"
        interval = f"95% interval {span(nearest.interval)}, which {zero}" if nearest.interval else "one seed, so no interval"
        sentences.append(f"The difference to the runner-up {nearest.b}, paired by seed, is {number(nearest.estimate)} ({interval}).")
    if level and beaten:
        sentences.append(f"It is ahead of {listed(beaten)}.")
    if comparison.wins_again is not None:
        sentences.append(f"On one more fresh seed, it would win again with probability {comparison.wins_again:.2f}.")
    return sentences


def _every(beaten: Sequence[str]) -> str:
    return beaten[0] if len(beaten) == 1 else f"all {len(beaten)} other arms"


def _most(lower: str) -> str:
    return f"{lower.removesuffix('er')}est"


def _confirmed(comparison: Comparison) -> list[str]:
    """The best trial of a study without arms, by its replicates."""
    winner = comparison.arms[0]
    seeds = counted(winner.seeds, "fresh seed")
    return [
        f"The best trial, {winner.trial_id}, has a mean {comparison.metric} of {number(winner.mean)} (95% interval {span(winner.interval)}) over {seeds}."
    ]


def _first_values(spec: StudySpec, best: "pd.DataFrame") -> list[str]:
    """The best values of arms, which one seed each does not separate."""
    metric, lowest = spec.objective.metric, "lowest" if spec.objective.direction == "minimize" else "highest"
    first, *others = [(row["arm"], row["value"]) for row in best.to_dict("records")]
    then = f", then {listed([f'{arm} with {number(value)}' for arm, value in others])}" if others else "; no other arm has a completed trial"
    return [
        f"The {lowest} {metric}, {number(first[1])}, is that of {first[0]}{then}.",
        "Each value is the best of several trials with one seed, so these differences are not findings: nothing here says that an arm is better.",
    ]


def _best_value(spec: StudySpec, table: "pd.DataFrame", best: "pd.DataFrame") -> list[str]:
    row = best.iloc[0]
    completed = counted(int((searched(table)["outcome"] == "completed").sum()), "completed trial")
    return [
        f"The best of {completed} is {row['trial_id']}, with a {spec.objective.metric} of {number(row['value'])}.",
        "It was trained once, and the best of many is also the luckiest: expect fresh seeds to do a little worse.",
    ]


def _again(config: BestConfig | None) -> list[str]:
    """What fresh seeds made of the best trial, where it was confirmed."""
    if config is None or config.objective.mean is None:
        return []
    found = config.objective
    mean = f"{number(found.mean)} (95% interval {span(found.interval)})"
    return [f"Trained again on {counted(found.seeds, 'fresh seed')}, {config.trial_id} has a mean {found.metric} of {mean}."]


def _claims(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    counts = [(word, sum(verdict.verdict == word for verdict in verdicts)) for word in ("confirmed", "refuted", "inconclusive")]
    told = listed([f"{count} {word}" for word, count in counts if count])
    return [f"Of {counted(len(verdicts), 'claim')}, {told}."]
