"""Populations: the trials of an arm trained side by side, the worst going on with the state of the best under mutated lr and decay.

    epoch 4   0.31   0.12   0.45   0.20          every `perturbation` epochs a trial is ranked among its arm's latest
                │      │      ×      │
              0.31   0.12 ──> 0.12  0.20          exploit: state of one of the best `quantile`
               lr     lr    1.2 lr   lr           explore: lr and decay times 0.8 or 1.2, or drawn anew, within their axes

Ray's own scheduler decides, one for each arm. It clones the whole config of the better trial; here a trial gets its name, its arm and
its history back, so that it stays one trial, one MLflow run, and one trial of Optuna, whose params are those that it was launched with.

Asynchronous, as in the paper, but for one thing: a trial that is more than an interval ahead of the last of its arm waits for it. So a
state that is taken over is at most one interval older or younger than who takes it, however slowly the process of a trial starts.

Source: Jaderberg et al., Population Based Training of Neural Networks, arXiv:1711.09846.
"""

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

from study.optimizer import PRODUCT
from study.space import Assignment, Axis, arm_label
from study.spec import StudySpec
from study.trial import TrialSpec
from study.tuning.exploiting import mutations
from study.tuning.points import exists, values_on
from study.tuning.stopping import EPOCH, OBJECTIVE

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

IDENTITY = "trial_id"
"""Key of a trial's config that tells whose it is."""


class Populations(FIFOScheduler):
    """One PopulationBasedTraining for each arm."""

    def __init__(self, spec: StudySpec) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spec = spec
        self._arms = {arm_label(arm): arm for arm in spec.arms}
        self._populations = {label: population(spec, arm) for label, arm in self._arms.items()}
        self._histories: dict[str, dict[int, float]] = {}

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Takes a trial into its arm's population, with the values that are in force: a resumed one may have been mutated before."""
        config = trial.config
        if config[IDENTITY] not in self._histories:
            self._histories[config[IDENTITY]] = dict(enumerate(config["history"], start=1))
            _configure(trial, {**config, **self._values(config)})
        self._of(trial).on_trial_add(Arm(tune_controller, config["arm"]), trial)  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> str:
        """The decision of the arm's scheduler, which is asked every `perturbation` epochs; an exploit is made the trial's own."""
        if OBJECTIVE not in result:
            return str(TrialScheduler.CONTINUE)
        epoch, history = result[EPOCH], self._histories[trial.config[IDENTITY]]
        history[epoch] = result[OBJECTIVE]
        if epoch % self._spec.stopping.perturbation:
            return str(TrialScheduler.CONTINUE)
        own = {**trial.config, "epoch": epoch, "history": [history[past] for past in sorted(history) if past <= epoch]}
        _configure(trial, own)
        view = Arm(tune_controller, own["arm"])
        known = {each.config[IDENTITY]: self._values_of(each.config) for each in view.get_trials()}
        decision = self._of(trial).on_trial_result(view, trial, {EPOCH: epoch, OBJECTIVE: result[OBJECTIVE]})  # type: ignore[arg-type]
        if (donor := trial.config[IDENTITY]) != own[IDENTITY]:
            values = self._values_of(trial.config)
            exploit = {"epoch": epoch, "donor": donor, "donor_values": known[donor], "values": values, "trial": self._trial(own["arm"], values)}
            _configure(trial, {**own, **values, "exploit": exploit})
        if decision == TrialScheduler.CONTINUE and not self._may_go_on(trial, self._last(view.get_trials())):
            return str(TrialScheduler.PAUSE)
        return str(decision)

    def choose_trial_to_run(self, tune_controller: "TuneController") -> "Trial | None":
        """Of the trials that wait and may go on, the one that is furthest behind.

        Ray's scheduler goes by the age of the state that a trial took over: it would choose the same ones again and again, as these keep their own.
        """
        trials: list[Trial] = tune_controller.get_trials()  # type: ignore[no-untyped-call]
        last = self._last(trials)
        waiting = (trial for trial in trials if trial.status in ("PENDING", "PAUSED") and self._may_go_on(trial, last))
        return min(waiting, key=lambda trial: int(trial.config["epoch"]), default=None)

    def _may_go_on(self, trial: "Trial", last: Mapping[str, int]) -> bool:
        """Whether a trial is no more than one interval ahead of the last of its arm: what is taken over is of about the same age."""
        return self._interval(trial) - last[trial.config["arm"]] <= 1

    def _last(self, trials: Iterable["Trial"]) -> dict[str, int]:
        """Of each arm, the intervals that the trial behind all others has trained."""
        last: dict[str, int] = {}
        for trial in trials:
            if not trial.is_finished():  # type: ignore[no-untyped-call]
                last[trial.config["arm"]] = min(self._interval(trial), last.get(trial.config["arm"], sys.maxsize))
        return last

    def _interval(self, trial: "Trial") -> int:
        return int(trial.config["epoch"]) // self._spec.stopping.perturbation

    def _of(self, trial: "Trial") -> PopulationBasedTraining:
        return self._populations[trial.config["arm"]]

    def _values(self, config: Mapping[str, Any]) -> Assignment:
        """The values of an arm's axes that a trial begins this start with."""
        exploits = mutations(Path(config["folder"]), config[IDENTITY]).get("exploits")
        if exploits:
            return dict(exploits[-1]["values"])
        fields = TrialSpec.model_validate_json(config["trial"]).dotted()
        return {path: fields[path] for path in mutable(self._spec, self._arms[config["arm"]])}

    def _values_of(self, config: Mapping[str, Any]) -> Assignment:
        return {path: config[path] for path in PRODUCT if path in config}

    def _trial(self, arm: str, values: Assignment) -> dict[str, Any]:
        return self._spec.trial_for({**self._arms[arm], **values}).canonical()


def _configure(trial: "Trial", config: Mapping[str, Any]) -> None:
    """Gives a trial another config, which it begins with the next time it is started."""
    trial.set_config(dict(config))  # type: ignore[no-untyped-call]


class Arm:
    """What a scheduler sees of Tune: the trials of one arm, and no search.

    Ray's scheduler refuses searchers, as one would learn the results of mutated trials for the values of their launch. Ours tells Optuna
    which trials were mutated.
    """

    search_alg = None

    def __init__(self, tune_controller: "TuneController", arm: str) -> None:
        self._tune_controller, self._arm = tune_controller, arm

    def get_trials(self) -> list["Trial"]:
        """The arm's trials."""
        trials: list[Trial] = self._tune_controller.get_trials()  # type: ignore[no-untyped-call]
        return [trial for trial in trials if trial.config["arm"] == self._arm]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tune_controller, name)


def population(spec: StudySpec, arm: Assignment) -> PopulationBasedTraining:
    """Ray's scheduler for one arm of a study."""
    axes, stopping = mutable(spec, arm), spec.stopping
    return PopulationBasedTraining(
        time_attr=EPOCH,
        metric=OBJECTIVE,
        mode="min" if spec.objective.direction == "minimize" else "max",
        perturbation_interval=stopping.perturbation,
        burn_in_period=stopping.grace,
        hyperparam_mutations={path: mutation(axis, spec.integer(path)) for path, axis in axes.items()},
        quantile_fraction=stopping.quantile,
        resample_probability=stopping.resample,
        custom_explore_fn=lambda config: {**config, **within(axes, config)},
        log_config=False,
    )


def mutable(spec: StudySpec, arm: Assignment) -> dict[str, Axis]:
    """The axes that are mutated in an arm."""
    return {path: axis for path, axis in spec.nuisance.items() if path in PRODUCT and exists(axis, arm)}


def mutation(axis: Axis, integer: bool = False) -> list[Any] | Callable[[], float]:
    """How Ray mutates a value of an axis: to a neighbour in a list, or times 0.8 or 1.2; a function draws anew."""
    if (values := values_on(axis, integer)) is not None:
        return sorted(values)
    return lambda: drawn(axis)


def drawn(axis: Axis) -> float:
    """A value of an interval, uniform in the logarithm where the axis is."""
    assert axis.low is not None and axis.high is not None, "only intervals are drawn from"
    if axis.log:
        return math.exp(random.uniform(math.log(axis.low), math.log(axis.high)))
    return random.uniform(axis.low, axis.high)


def within(axes: Mapping[str, Axis], values: Mapping[str, Any]) -> Assignment:
    """The values on intervals, held between their ends."""
    ends = {path: (float(axis.low), float(axis.high)) for path, axis in axes.items() if axis.low is not None and axis.high is not None}
    return {path: min(max(values[path], low), high) for path, (low, high) in ends.items()}
