"""Stopping: which trials end before their last epoch, arm by arm.

    result of a trial ──> its arm's own scheduler (ASHA, median) ──> go on or stop

A scheduler compares trials with each other. One scheduler for all arms would let an arm that learns fast stop the trials of an
arm that blooms late; with one scheduler for each arm, arms are compared by their results alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from study.spec import StoppingSpec

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

OBJECTIVE = "objective"
"""Key of the ranked metric in a Tune result."""

EPOCH = "epoch"
"""Key of the absolute epoch in a Tune result: Tune's own counter starts again after a restart."""

History = Sequence[tuple[int, float]]
"""Epoch and objective of a trial's measurements, oldest first."""


def stopping(
    spec: StoppingSpec, direction: str, epochs: int, ended: Sequence[tuple[str, History]] = (), resumed: Mapping[str, History] | None = None
) -> "ArmScheduler":
    """The scheduler that a spec asks for.

    Args:
        spec: What to stop by.
        direction: `minimize` or `maximize`.
        epochs: The longest trial.
        ended: Arm and history of every trial that ended before this start.
        resumed: History of every trial that will be added again, by its id.
    """
    mode = "min" if direction == "minimize" else "max"

    def build() -> TrialScheduler:
        match spec.scheduler:
            case "asha":
                return AsyncHyperBandScheduler(EPOCH, OBJECTIVE, mode, max_t=epochs, grace_period=spec.grace, reduction_factor=spec.reduction)
            case "median":
                return MedianStoppingRule(EPOCH, OBJECTIVE, mode, grace_period=spec.grace, min_time_slice=float("inf"))  # type: ignore[arg-type]
        return FIFOScheduler()  # type: ignore[no-untyped-call]

    return ArmScheduler(build, ended, resumed or {}, shared=not spec.within_arm)


class _PastTrial:
    """Stands for an ended trial in a scheduler's books."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class ArmScheduler(FIFOScheduler):
    """Sends every event of a trial to the scheduler of its arm, and replays what was measured before a restart.

    Without the replay a resumed study would judge its first trials against empty rungs.
    """

    def __init__(
        self, build: Callable[[], TrialScheduler], ended: Sequence[tuple[str, History]], resumed: Mapping[str, History], *, shared: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._build, self._resumed, self._shared = build, dict(resumed), shared
        self._waiting_to_replay = list(ended)
        self._arms: dict[str, TrialScheduler] = {}

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Opens the trial in its arm's books; one that is resumed brings its past along."""
        for index, (label, history) in enumerate(self._waiting_to_replay):
            self._open(tune_controller, label, _PastTrial(f"past-{index}"), history)
        self._waiting_to_replay = []
        self._open(tune_controller, trial.config["arm"], trial, self._resumed.pop(trial.config["trial_id"], ()))

    def _open(self, tune_controller: "TuneController", label: str, trial: Any, history: History) -> None:
        arm = self._arm(label)
        arm.on_trial_add(tune_controller, trial)
        for epoch, objective in history:
            arm.on_trial_result(tune_controller, trial, {EPOCH: epoch, OBJECTIVE: objective})

    def _arm(self, label: str) -> TrialScheduler:
        key = "" if self._shared else label
        if key not in self._arms:
            self._arms[key] = self._build()
        return self._arms[key]

    def on_trial_result(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> str:
        """The decision of the trial's arm."""
        return str(self._arm(trial.config["arm"]).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> None:
        """Closes the trial in its arm's books."""
        self._arm(trial.config["arm"]).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Closes the trial in its arm's books."""
        self._arm(trial.config["arm"]).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Closes the trial in its arm's books."""
        self._arm(trial.config["arm"]).on_trial_remove(tune_controller, trial)
