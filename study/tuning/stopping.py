"""Stopping: which trials end before their last epoch, arm by arm.

    result of a trial ──> its arm's own scheduler (ASHA, median, or its bracket's of hyperband) ──> go on or stop

A scheduler compares trials with each other. One scheduler for all arms would let an arm that learns fast stop the trials of an
arm that blooms late; with one scheduler for each arm, arms are compared by their results alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from study.measurement import History
from study.spec import ObjectiveSpec
from study.stoppingspec import StoppingSpec
from study.trial import TrialSpec

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

OBJECTIVE = "objective"
"""Key of the ranked metric in a Tune result."""

EPOCH = "epoch"
"""Key of the absolute epoch in a Tune result: Tune's own counter starts again after a restart."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole parts, fill [0, 1) evenly, however many there are."""


@dataclass(frozen=True, slots=True)
class Past:
    """A trial that ended before this start."""

    trial_id: str
    arm: str
    epochs: int
    """The length of its schedule."""
    history: History


def stalled(values: Sequence[float], objective: ObjectiveSpec, patience: int) -> bool:
    """Whether the objective has not improved at the last *patience* measurements.

    Args:
        values: The objective at every measurement, oldest first.
    """
    ranks = [objective.rank(value) for value in values]
    return len(ranks) > patience and min(ranks[-patience:]) >= min(ranks[:-patience])


def brackets(spec: StoppingSpec, epochs: int) -> list[tuple[int, float]]:
    """Hyperband's brackets: the epochs that every trial of a bracket gets, and the bracket's share of the trials.

    Bracket s begins at grace x reduction^s, up to the longest trial. As in Hyperband, all brackets cost about the same:
    one with r rungs above its first gets trials in proportion to reduction^r / (r + 1).

    Source: Li et al., Hyperband, algorithm 1, arXiv:1603.06560; asynchronous halving within a bracket: arXiv:1810.05934.
    """
    rungs = int(math.log(epochs / spec.grace) / math.log(spec.reduction) + 1e-9)
    weights = [spec.reduction ** (rungs - s) / (rungs - s + 1) for s in range(rungs + 1)]
    return [(spec.grace * spec.reduction**s, weight / sum(weights)) for s, weight in enumerate(weights)]


def bracket_of(trial_id: str, shares: Sequence[tuple[int, float]]) -> int:
    """Which bracket a trial belongs to: by its number alone, so that it is the same after a restart."""
    place = int(trial_id.rpartition("-")[2]) * GOLDEN % 1
    for index, (_, share) in enumerate(shares):
        place -= share
        if place < 0:
            return index
    return len(shares) - 1


def stopping(
    spec: StoppingSpec, direction: str, epochs: int, ended: Sequence[Past] = (), resumed: Mapping[str, History] | None = None
) -> "ArmScheduler":
    """The scheduler that a spec asks for.

    Args:
        spec: What to stop by.
        direction: `minimize` or `maximize`.
        epochs: The longest trial.
        ended: Every trial that ended before this start.
        resumed: History of every trial that will be added again, by its id.
    """
    mode = "min" if direction == "minimize" else "max"

    def build(bracket: int) -> TrialScheduler:
        match spec.scheduler:
            case "asha" | "hyperband":
                grace = spec.grace * spec.reduction**bracket
                return AsyncHyperBandScheduler(EPOCH, OBJECTIVE, mode, max_t=epochs, grace_period=grace, reduction_factor=spec.reduction)
            case "median":
                return MedianStoppingRule(EPOCH, OBJECTIVE, mode, grace_period=spec.grace, min_time_slice=float("inf"))  # type: ignore[arg-type]
        return FIFOScheduler()  # type: ignore[no-untyped-call]

    shares = brackets(spec, epochs) if spec.scheduler == "hyperband" else [(spec.grace, 1.0)]
    return ArmScheduler(build, ended, resumed or {}, Comparison(not spec.within_arm, shares, epochs if spec.compare == "schedule" else None))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which trials are compared, and when."""

    shared: bool
    """Whether arms are compared with each other."""
    brackets: Sequence[tuple[int, float]]
    longest: int | None
    """The longest trial's epochs, in whose units the others' are counted: equal shares of their schedules; None counts each trial's own."""

    def group(self, arm: str, trial_id: str) -> tuple[str, int]:
        """The trials that a trial is compared with."""
        return ("" if self.shared else arm, bracket_of(trial_id, self.brackets) if len(self.brackets) > 1 else 0)

    def time(self, epoch: int, epochs: int) -> float:
        """How far a trial is: its epoch, or the epoch at which the longest trial has trained the same share of its schedule."""
        return epoch if self.longest is None else epoch * self.longest / epochs


class _PastTrial:
    """Stands for an ended trial in a scheduler's books."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class ArmScheduler(FIFOScheduler):
    """Sends every event of a trial to the scheduler of its group, and replays what was measured before a restart.

    Without the replay a resumed study would judge its first trials against empty rungs.
    """

    def __init__(self, build: Callable[[int], TrialScheduler], ended: Sequence[Past], resumed: Mapping[str, History], comparison: Comparison) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._build, self._resumed, self._comparison = build, dict(resumed), comparison
        self._waiting_to_replay = list(ended)
        self._groups: dict[tuple[str, int], TrialScheduler] = {}

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Opens the trial in its group's books; one that is resumed brings its past along."""
        for index, past in enumerate(self._waiting_to_replay):
            scheduler = self._group(past.arm, past.trial_id)
            self._open(tune_controller, scheduler, _PastTrial(f"past-{index}"), past.epochs, past.history)
        self._waiting_to_replay = []
        self._open(tune_controller, self._of(trial), trial, self._length(trial), self._resumed.pop(trial.config["trial_id"], ()))

    def _open(self, tune_controller: "TuneController", scheduler: TrialScheduler, trial: Any, epochs: int, history: History) -> None:
        scheduler.on_trial_add(tune_controller, trial)
        for epoch, objective in history:
            scheduler.on_trial_result(tune_controller, trial, {EPOCH: self._comparison.time(epoch, epochs), OBJECTIVE: objective})

    def _of(self, trial: "Trial") -> TrialScheduler:
        return self._group(trial.config["arm"], trial.config["trial_id"])

    def _group(self, arm: str, trial_id: str) -> TrialScheduler:
        key = self._comparison.group(arm, trial_id)
        if key not in self._groups:
            self._groups[key] = self._build(key[1])
        return self._groups[key]

    def _timed(self, trial: "Trial", result: dict[str, Any]) -> dict[str, Any]:
        if self._comparison.longest is None or EPOCH not in result:
            return result
        return {**result, EPOCH: self._comparison.time(result[EPOCH], self._length(trial))}

    def _length(self, trial: "Trial") -> int:
        """A trial's epochs, where they matter."""
        return 0 if self._comparison.longest is None else TrialSpec.model_validate_json(trial.config["trial"]).schedule.epochs

    def on_trial_result(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> str:
        """The decision of the trial's group."""
        return str(self._of(trial).on_trial_result(tune_controller, trial, self._timed(trial, result)))

    def on_trial_complete(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> None:
        """Closes the trial in its group's books."""
        self._of(trial).on_trial_complete(tune_controller, trial, self._timed(trial, result))

    def on_trial_error(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Closes the trial in its group's books."""
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Closes the trial in its group's books."""
        self._of(trial).on_trial_remove(tune_controller, trial)
