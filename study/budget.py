"""Budget: what a study has spent of each of its limits, what is left, and which of them has ended it.

limit                 spent                                                     counted
search.trials         trials that have ended                                    over all starts of the study
budget.wall           time since the study was started or resumed               from the latest start
budget.gpu_hours      hours of training x the share of a GPU that they had      over all starts
budget.target         the best completed value                                  over all starts
budget.no_improvement trials that have ended since the last new best one        over all starts
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from study.measurement import Outcome
from study.spec import StudySpec

LIMITS = ("wall", "gpu_hours", "target", "no_improvement")
"""Fields of `budget`; each ends the whole study, and its running trials with it, as `stopped` for the reason `budget`."""


@dataclass(slots=True)
class Meter:
    """Counts what a study spends: from its ledger at first, then as things happen."""

    spec: StudySpec
    seconds: float = 0.0
    """Time that trials have trained."""
    best: float | None = None
    """The best value of a completed trial."""
    trials: int = 0
    """Trials that have ended."""
    without_improvement: int = 0
    """Trials that have ended since the best one."""

    @classmethod
    def of(cls, spec: StudySpec, ended: Iterable[tuple[str, float | None]], seconds: float) -> "Meter":
        """What a ledger says.

        Args:
            ended: Outcome and value of every trial that has ended, in the order of ending, replicates left out.
            seconds: Time that all of them, running ones included, have trained.
        """
        meter = cls(spec, seconds)
        for outcome, value in ended:
            meter.end(outcome, value)
        return meter

    def end(self, outcome: str, value: float | None) -> None:
        """A trial has ended."""
        if outcome == Outcome.INTERRUPTED:
            return
        rank = self.spec.objective.rank
        self.trials += 1
        self.without_improvement += 1
        if outcome == Outcome.COMPLETED and value is not None and (self.best is None or rank(value) < rank(self.best)):
            self.best, self.without_improvement = value, 0

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of training. A fused engine has its share of a GPU to itself, and the time of its trials adds up to its time."""
        resources = self.spec.resources
        share = 1 / resources.engines_per_gpu if resources.engine == "fused" and resources.gpus_per_trial else resources.gpus_per_trial
        return self.seconds * share / 3600

    def reached(self, wall: float) -> str:
        """The limit that has been reached, the first in the order of LIMITS; empty where there is none.

        Args:
            wall: Seconds since the latest start.
        """
        budget, rank = self.spec.budget, self.spec.objective.rank
        met = {
            "wall": budget.wall is not None and wall > budget.wall,
            "gpu_hours": budget.gpu_hours is not None and self.gpu_hours > 0 and self.gpu_hours >= budget.gpu_hours,
            "target": budget.target is not None and self.best is not None and rank(self.best) <= rank(budget.target),
            "no_improvement": budget.no_improvement is not None and self.without_improvement >= budget.no_improvement,
        }
        return next((limit for limit in LIMITS if met[limit]), "")

    def document(self, wall: float | None) -> dict[str, Any]:
        """The part of `study status` about the budget: each limit, what is spent and left of it."""
        budget, trials = self.spec.budget, self.spec.search.trials
        spent = {"trials": self.trials, "wall": wall, "gpu_hours": self.gpu_hours, "best": self.best, "without_improvement": self.without_improvement}
        left: dict[str, float] = {"trials": max(0, trials - self.trials)}
        if budget.wall is not None:
            left["wall"] = max(0.0, budget.wall - (wall or 0.0))
        if budget.gpu_hours is not None:
            left["gpu_hours"] = max(0.0, budget.gpu_hours - self.gpu_hours)
        if budget.no_improvement is not None:
            left["no_improvement"] = max(0, budget.no_improvement - self.without_improvement)
        limits = {limit: getattr(budget, limit) for limit in LIMITS}
        return {"trials": trials, **limits, "trial_seconds": self.seconds, "spent": spent, "left": left, "reached": self.reached(wall or 0.0) or None}


def budget_line(document: Mapping[str, Any]) -> str:
    """What is spent of each limit that is set, for people; empty where none is.

    Args:
        document: The budget of `study status`.
    """
    spent, parts = document["spent"], []
    if document["wall"] is not None and spent["wall"] is not None:
        parts.append(f"{_minutes(spent['wall'])} of {_minutes(document['wall'])} spent")
    if document["gpu_hours"] is not None:
        parts.append(f"{spent['gpu_hours']:.2f} of {document['gpu_hours']:g} GPU-hours")
    if document["target"] is not None:
        parts.append(f"target {document['target']:g}{' reached' if document['reached'] == 'target' else ''}")
    if document["no_improvement"] is not None:
        parts.append(f"{spent['without_improvement']} of {document['no_improvement']} trials without a new best")
    return f"budget: {', '.join(parts)}" if parts else ""


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
