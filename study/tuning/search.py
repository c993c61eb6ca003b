"""Search: axes to Optuna, and our own Tune searcher over its ask and tell. The only door to Optuna.

    arm 1 ── Optuna study ─┐
    arm 2 ── Optuna study ─┼── one journal file, the only durable truth ──> trial number i belongs to arm i mod arms
    arm 3 ── Optuna study ─┘

    outcome        told to Optuna as
    completed      its value
    stopped        pruned at its last step, with the values that it reported
    diverged       pruned, and infeasible by a constraint: never as inf, never left running
    failed         failed
    interrupted    nothing: the trial stays running, and the next start issues it again

Arms take turns and each has a sampler of its own, so an interrupted study is still balanced. A sampler's randomness is derived
from the trial's number, because Optuna does not store it.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher
from scipy.stats import qmc

from study.measurement import Ending, Outcome
from study.space import Assignment, Axis, arm_label
from study.spec import StudySpec
from study.trial import TrialSpec
from study.tuning.stopping import EPOCH, OBJECTIVE, History
from study.tuning.trainables import VALUE, ending_of

DIVERGED = "diverged"
"""Name of the constraint that a diverged trial violates."""

ENDING = "ending"
"""User attribute of a told trial: its outcome and reason."""

optuna.logging.set_verbosity(optuna.logging.WARNING)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One trial that is to be run."""

    trial_id: str
    arm: str
    trial: TrialSpec


class Search:
    """The journal of a study: proposes trials, and is told how they ended."""

    def __init__(self, spec: StudySpec, journal: Path) -> None:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        self.spec, self.arms = spec, spec.arms
        self._studies = [
            optuna.create_study(
                storage=storage,
                study_name=f"{spec.name}/{arm_label(arm)}",
                direction=spec.objective.direction,
                load_if_exists=True,
            )
            for arm in self.arms
        ]
        self._startup = max(4, min(10, spec.search.trials // len(self.arms) // 3))
        self._points = list(_points(spec)) if spec.search.sampler == "grid" else None
        self._next = sum(len(study.get_trials(deepcopy=False)) for study in self._studies)

    def running(self) -> list[Proposal]:
        """The trials that were proposed and never told: to be issued again first."""
        found = []
        for arm, study in enumerate(self._studies):
            for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                number = frozen.number * len(self.arms) + arm
                found.append((number, self._proposal(number, self._trial(number))))
        return [proposal for _, proposal in sorted(found, key=lambda pair: pair[0])]

    def told(self) -> dict[str, tuple[Ending, float | None]]:
        """How every told trial ended."""
        found: dict[str, tuple[Ending, float | None]] = {}
        for arm, study in enumerate(self._studies):
            for frozen in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)):
                said = frozen.user_attrs.get(ENDING, {"outcome": Outcome.FAILED, "reason": "", "value": None})
                ending = Ending(Outcome(said["outcome"]), said["reason"])
                found[self.trial_id(frozen.number * len(self.arms) + arm)] = (ending, said["value"])
        return found

    @property
    def unasked(self) -> int:
        """How many trials are left to propose."""
        planned = self.spec.search.trials
        if self._points is not None:
            planned = min(planned, len(self._points) * len(self.arms))
        return max(0, planned - self._next)

    def ask(self) -> Proposal | None:
        """The next trial, or None when all have been proposed."""
        number = self._next
        if not self.unasked:
            return None
        self._next += 1
        study, local = self._studies[number % len(self.arms)], number // len(self.arms)
        if (point := self._point(local)) is not None:
            study.enqueue_trial(point)
        study.sampler = self._sampler(number, local)
        trial = study.ask()
        assert trial.number == local, "another process writes to this journal"
        return self._proposal(number, trial)

    def report(self, trial_id: str, epoch: int, objective: float) -> None:
        """Notes the objective at an epoch; a repeated epoch is ignored."""
        trial = self._trial(self.number(trial_id))
        if epoch not in trial.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(objective, epoch)

    def tell(self, trial_id: str, ending: Ending, value: float | None) -> None:
        """Closes a trial as what it is. Telling a trial twice changes nothing; an interrupted one stays open."""
        number = self.number(trial_id)
        study, trial = self._studies[number % len(self.arms)], self._trial(number)
        if ending.outcome is Outcome.INTERRUPTED or study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            return
        trial.set_user_attr(ENDING, {"outcome": str(ending.outcome), "reason": ending.reason, "value": value})
        match ending.outcome:
            case Outcome.COMPLETED:
                study.tell(trial.number, value)
            case Outcome.STOPPED:
                study.tell(trial.number, state=TrialState.PRUNED)
            case Outcome.DIVERGED:
                trial.set_constraint(DIVERGED, 1.0)
                study.tell(trial.number, state=TrialState.PRUNED)
            case Outcome.FAILED:
                study.tell(trial.number, state=TrialState.FAIL)

    def trial_id(self, number: int) -> str:
        """`gamma-roles-0007`."""
        return f"{self.spec.name}-{number:04d}"

    def number(self, trial_id: str) -> int:
        """The inverse of `trial_id`."""
        return int(trial_id.rpartition("-")[2])

    def _trial(self, number: int) -> optuna.Trial:
        """A handle on a trial that exists; suggesting again on it returns the values that it already has."""
        study = self._studies[number % len(self.arms)]
        frozen = study.get_trials(deepcopy=False)[number // len(self.arms)]
        return optuna.Trial(study, frozen._trial_id)

    def _proposal(self, number: int, trial: optuna.Trial) -> Proposal:
        arm = self.arms[number % len(self.arms)]
        assignment = {**arm, **self._suggest(trial, arm)}
        return Proposal(self.trial_id(number), arm_label(arm), self.spec.trial_for(assignment))

    def _suggest(self, trial: optuna.Trial, arm: Assignment) -> Assignment:
        drawn: Assignment = {}
        for path in _parents_first(self.spec.nuisance):
            axis = self.spec.space[path]
            if all({**arm, **drawn}.get(parent, _MISSING) == value for parent, value in axis.when.items()):
                drawn[path] = _suggested(trial, path, axis, self.spec.integer(path))
        return drawn

    def _sampler(self, number: int, local: int) -> BaseSampler:
        seed = _seed(self.spec.search.seed, number)
        match self.spec.search.sampler:
            case "tpe" if local >= self._startup:
                return TPESampler(seed=seed, n_startup_trials=0)
            case "gp" if local >= self._startup:
                return GPSampler(seed=seed, n_startup_trials=0)
            case "cmaes" if local >= self._startup:
                return CmaEsSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
        return RandomSampler(seed)

    def _point(self, local: int) -> Assignment | None:
        """A point that is known beforehand: of the grid, of a Sobol sequence, or of the Sobol start of a model-based sampler."""
        if self._points is not None:
            return self._points[local]
        sobol = self.spec.search.sampler == "sobol" or (self.spec.search.sampler != "random" and local < self._startup)
        return _sobol_point(self.spec, local) if sobol and self.spec.nuisance else None


_MISSING = object()


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


def _parents_first(axes: Mapping[str, Axis]) -> list[str]:
    """Paths in an order in which every condition is decided before the axis that it governs."""
    order: list[str] = []
    waiting = list(axes)
    while waiting:
        ready = [path for path in waiting if not any(parent in waiting for parent in axes[path].when)] or waiting[:1]
        order += ready
        waiting = [path for path in waiting if path not in ready]
    return order


def _suggested(trial: optuna.Trial, path: str, axis: Axis, integer: bool) -> Any:
    if axis.choices is not None:
        return trial.suggest_categorical(path, list(axis.choices))
    assert axis.low is not None and axis.high is not None
    if integer:
        return trial.suggest_int(path, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log)
    return trial.suggest_float(path, float(axis.low), float(axis.high), step=axis.step, log=axis.log)


def _sobol_point(spec: StudySpec, local: int) -> Assignment:
    """Point number `local` of a scrambled Sobol sequence over the nuisance axes, the same in every arm."""
    axes = spec.nuisance
    sequence = qmc.Sobol(len(axes), scramble=True, rng=_seed(spec.search.seed, -1))
    unit = sequence.fast_forward(local).random(1)[0] if local else sequence.random(1)[0]
    return {path: _at(axis, spec.integer(path), float(share)) for (path, axis), share in zip(axes.items(), unit, strict=True)}


def _at(axis: Axis, integer: bool, share: float) -> Any:
    """The value at a share in [0, 1) of an axis."""
    if axis.choices is not None:
        return axis.choices[int(share * len(axis.choices))]
    assert axis.low is not None and axis.high is not None
    low, high = float(axis.low), float(axis.high)
    step = float(axis.step or (1 if integer else 0))
    if step:
        value = low + step * int(share * (int((high - low) / step + 1e-9) + 1)) if not axis.log else low * ((high + 1) / low) ** share
    else:
        value = low * (high / low) ** share if axis.log else low + (high - low) * share
    return int(value) if integer else min(value, high)


def _points(spec: StudySpec) -> Iterator[Assignment]:
    """Every combination of the nuisance axes' values, the last axis fastest."""
    values = [_values(axis, spec.integer(path)) for path, axis in spec.nuisance.items()]
    for combination in itertools.product(*values):
        yield dict(zip(spec.nuisance, combination, strict=True))


def _values(axis: Axis, integer: bool) -> Sequence[Any]:
    if axis.choices is not None:
        return axis.choices
    assert axis.low is not None and axis.high is not None
    step = axis.step or 1
    number = int((axis.high - axis.low) / step + 1e-9) + 1
    return [int(axis.low + step * index) if integer else axis.low + step * index for index in range(number)]


class JournalSearcher(Searcher):
    """Gives Tune the trials of a Search: first those that an earlier start left running, then new ones."""

    def __init__(
        self,
        search: Search,
        settings: Mapping[str, Any],
        resumed: Sequence[tuple[Proposal, History]],
        tags: Callable[[TrialSpec], Mapping[str, str]] = lambda trial: {},
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min" if search.spec.objective.direction == "minimize" else "max")
        self._search, self._settings = search, dict(settings)
        self._waiting, self._tags = list(resumed), tags
        self._trial_ids: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The config of the next trial, or FINISHED."""
        if self._waiting:
            proposal, history = self._waiting.pop(0)
        else:
            asked = self._search.ask()
            if asked is None:
                return Searcher.FINISHED
            proposal, history = asked, ()
        self._trial_ids[trial_id] = proposal.trial_id
        return {
            **self._settings,
            "trial_id": proposal.trial_id,
            "arm": proposal.arm,
            "trial": json.dumps(proposal.trial.canonical()),
            "tags": self._tags(proposal.trial),
            "epoch": len(history),
            "history": [objective for _, objective in history],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes the objective at an epoch."""
        if OBJECTIVE in result:
            self._search.report(self._trial_ids[trial_id], result[EPOCH], result[OBJECTIVE])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells how the trial ended; Tune withholds the last result of a stopped trial from `on_trial_result`."""
        ours = self._trial_ids.pop(trial_id, None)
        if ours is None:
            return
        if result and OBJECTIVE in result:
            self._search.report(ours, result[EPOCH], result[OBJECTIVE])
        self._search.tell(ours, ending_of(result, error), (result or {}).get(VALUE))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the journal holds it all."""
