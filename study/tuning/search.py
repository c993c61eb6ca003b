"""Search: axes to Optuna, trial by trial, over its journal. With `journal`, the only door to Optuna.

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

The journal is written through Optuna's storage, not through `Study.ask` and `tell`: these look through all trials at every call, and
would write a trial into the journal before it is known whether its values are new.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from study.measurement import Ending, History, Outcome
from study.space import Assignment, arm_label
from study.spec import StudySpec
from study.trial import TrialSpec
from study.tuning.earlier import Earlier, matching
from study.tuning.journal import FROM, WISH, ArmJournal, JournalFile
from study.tuning.points import seed_of, sobol_point

DIVERGED = "diverged"
"""Name of the constraint that a diverged trial violates."""

ENDING = "ending"
"""User attribute of a told trial: its outcome and reason."""

MUTATED = "mutated"
"""User attribute of a trial that was trained with other values than it was launched with."""

CONSTRAINT = f"constraints:{DIVERGED}"
"""System attribute by which Optuna knows that a trial violates it (optuna 5, `Trial.set_constraint`)."""

MODELS = ("tpe", "gp", "cmaes")
"""Samplers that learn from results."""

REDRAWS = 4
"""How often an assignment that its arm has had is drawn anew by the sampler, then at random, before one of the rest is taken."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One trial that is to be run."""

    trial_id: str
    arm: str
    trial: TrialSpec


class Search:
    """The journal of a study: proposes trials, and is told how they ended.

    No trial of an arm is proposed twice: an assignment that is drawn again is replaced, and the search of a finite space ends with its
    last point. Points can be enqueued, which the next trials of an arm then try; results of another study can be added, from which
    samplers learn as from the study's own.
    """

    def __init__(self, spec: StudySpec, journal: Path) -> None:
        self.spec, self.arms = spec, spec.arms
        self._file = JournalFile(journal)
        self._storage = JournalStorage(self._file)
        self._books = [ArmJournal(spec, arm, self._storage) for arm in self.arms]
        self.startup = startup(spec)
        for number in self._undrawn():
            self._draw(number, self._sampler(number))

    def running(self) -> list[Proposal]:
        """The trials that were proposed and never told: to be issued again first."""
        return [self._proposal(number) for number, frozen in self._own() if not frozen.state.is_finished()]

    def told(self) -> dict[str, tuple[Ending, float | None]]:
        """How every told trial ended."""
        found: dict[str, tuple[Ending, float | None]] = {}
        for number, frozen in self._own():
            if frozen.state.is_finished():
                said = frozen.user_attrs.get(ENDING, {"outcome": Outcome.FAILED, "reason": "", "value": None})
                found[self.trial_id(number)] = (Ending(Outcome(said["outcome"]), said["reason"]), said["value"])
        return found

    @property
    def unasked(self) -> int:
        """How many trials are left to propose."""
        return sum(book.left for book in self._books)

    @property
    def exhausted(self) -> list[str]:
        """The arms of which every point has been proposed before their share of the trials was."""
        return [book.label for book in self._books if not book.left and len(book.own) < book.share]

    def ask(self) -> Proposal | None:
        """The next trial, or None when all have been proposed."""
        due = [len(book.own) * len(self.arms) + index for index, book in enumerate(self._books) if book.left]
        if not due:
            return None
        number = min(due)
        book = self._arm_of(number)
        wish = book.next_wish()
        attributes = {} if wish is None else {WISH: wish}
        if isinstance(sampler := self._sampler(number), RandomSampler):
            book.create(attributes, self._drawn(number, create_trial(state=TrialState.RUNNING, user_attrs=attributes), sampler))
        else:  # which writes what it needs to know into the trial that it draws for
            book.create(attributes)
            self._draw(number, sampler)
        self._file.sync()
        return self._proposal(number)

    def enqueue(self, point: Assignment, arm: Assignment | None = None) -> None:
        """Has a point tried by the next trials of every arm, or of those that agree with *arm*; what it leaves open is drawn.

        Enqueuing a point again changes nothing, also after a restart.
        """
        for book in self._books:
            if all(book.arm[path] == value for path, value in (arm or {}).items()):
                book.wish(point)

    def add(self, earlier: "Earlier") -> bool:
        """Adds a trial of another study, if it is one that this study could propose; returns whether it could. Once is enough."""
        for book in self._books:
            if (point := matching(self.spec, book.arm, earlier.trial)) is None:
                continue
            trial_id = book.added.get(earlier.source)
            trial_id = book.create({FROM: earlier.source}) if trial_id is None else trial_id
            if not self._storage.get_trial(trial_id).state.is_finished():
                book.set(trial_id, point)
                self._close(trial_id, earlier.ending, earlier.value, earlier.history)
            return True
        return False

    def report(self, trial_id: str, epoch: int, objective: float) -> None:
        """Notes the objective at an epoch; a repeated epoch is ignored."""
        frozen = self._frozen(self.number(trial_id))
        if not frozen.state.is_finished() and epoch not in frozen.intermediate_values:
            self._storage.set_trial_intermediate_value(frozen._trial_id, epoch, objective)

    def mark_mutated(self, trial_id: str) -> None:
        """Notes that a trial is no longer trained with the values that Optuna proposed."""
        frozen = self._frozen(self.number(trial_id))
        if not frozen.state.is_finished() and MUTATED not in frozen.user_attrs:
            self._storage.set_trial_user_attr(frozen._trial_id, MUTATED, True)

    def tell(self, trial_id: str, ending: Ending, value: float | None, history: History = ()) -> None:
        """Closes a trial as what it is. Telling a trial twice changes nothing; an interrupted one stays open.

        Args:
            history: What may not have been reported of it yet.
        """
        frozen = self._frozen(self.number(trial_id))
        if not frozen.state.is_finished():
            self._close(frozen._trial_id, ending, value, history)

    def _close(self, trial_id: int, ending: Ending, value: float | None, history: History) -> None:
        seen = dict(self._storage.get_trial(trial_id).intermediate_values)
        with self._file.together():
            for epoch, objective in history:
                if epoch not in seen:
                    self._storage.set_trial_intermediate_value(trial_id, epoch, objective)
                    seen[epoch] = objective
            if ending.outcome is Outcome.INTERRUPTED:
                return
            self._storage.set_trial_user_attr(trial_id, ENDING, {"outcome": str(ending.outcome), "reason": ending.reason, "value": value})
            match ending.outcome:
                case Outcome.COMPLETED:
                    assert value is not None and math.isfinite(value), "a trial completes with a finite value"
                    self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
                case Outcome.FAILED:
                    self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
                case outcome:
                    if outcome is Outcome.DIVERGED:
                        self._storage.set_trial_system_attr(trial_id, CONSTRAINT, 1.0)
                    # As Optuna does itself: a pruned trial's value is that of its last step.
                    self._storage.set_trial_state_values(trial_id, TrialState.PRUNED, [seen[max(seen)]] if seen else None)

    def trial_id(self, number: int) -> str:
        """`gamma-roles-0007`."""
        return f"{self.spec.name}-{number:04d}"

    def number(self, trial_id: str) -> int:
        """The inverse of `trial_id`."""
        return int(trial_id.rpartition("-")[2])

    def _arm_of(self, number: int) -> ArmJournal:
        return self._books[number % len(self.arms)]

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._arm_of(number).own[number // len(self.arms)])

    def _own(self) -> Iterator[tuple[int, FrozenTrial]]:
        """The study's own trials in the order of proposing."""
        for number in sorted(local * len(self.arms) + arm for arm, book in enumerate(self._books) for local in range(len(book.own))):
            yield number, self._frozen(number)

    def _undrawn(self) -> list[int]:
        """Trials that a crash left without all their values."""
        return [number for number, frozen in self._own() if not frozen.state.is_finished() and not self._arm_of(number).is_complete(frozen.params)]

    def _proposal(self, number: int) -> Proposal:
        arm = self._arm_of(number).arm
        return Proposal(self.trial_id(number), arm_label(arm), self.spec.trial_for({**arm, **self._frozen(number).params}))

    def _draw(self, number: int, sampler: BaseSampler) -> None:
        """Gives a trial that has been created its values."""
        frozen = self._frozen(number)
        self._arm_of(number).set(frozen._trial_id, self._drawn(number, frozen, sampler))

    def _drawn(self, number: int, frozen: FrozenTrial, sampler: BaseSampler) -> Assignment:
        """Values that no other trial of the arm has."""
        book, local = self._arm_of(number), number // len(self.arms)
        wish: Assignment = book.wishes[frozen.user_attrs[WISH]] if WISH in frozen.user_attrs else {}
        # A fresh view: a Study keeps the trials that it has seen until it is asked itself.
        study = optuna.Study(book.name, self._storage, sampler)
        sampler.before_trial(study, frozen)
        # What a crash left of its values is drawn again, from the same seed.
        point, written = book.sampled(study, frozen, wish or self._known(book, local)), frozen.params
        for attempt in range(2 * REDRAWS):
            if book.is_new(point) and written.items() <= point.items():
                break
            if attempt == REDRAWS:
                study.sampler, wish = RandomSampler(seed_of(self.spec.search.seed, -3 - number)), {}
            point = book.sampled(study, frozen, {**wish, **written})
        else:
            point = book.another(point, self.spec.search.seed, number)
        return point

    def _known(self, book: ArmJournal, local: int) -> Assignment:
        """A point that is known beforehand: of the grid, of a Sobol sequence, or of the Sobol start of a model-based sampler."""
        if self.spec.search.sampler == "grid" and book.points is not None:
            return next((point for point in book.points if book.is_new(point)), {})
        sobol = self.spec.search.sampler == "sobol" or (self.spec.search.sampler in MODELS and local < self.startup)
        return sobol_point(self.spec, local) if sobol and self.spec.nuisance else {}

    def _sampler(self, number: int) -> BaseSampler:
        seed, local = seed_of(self.spec.search.seed, number), number // len(self.arms)
        match self.spec.search.sampler:
            case "tpe" if local >= self.startup:
                return TPESampler(seed=seed, n_startup_trials=0)
            case "gp" if local >= self.startup:
                return GPSampler(seed=seed, n_startup_trials=0)
            case "cmaes" if local >= self.startup:
                return CmaEsSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
        return RandomSampler(seed)


def startup(spec: StudySpec) -> int:
    """How many trials of an arm a model-based sampler spreads evenly before it trusts its model."""
    return max(4, min(10, spec.search.trials // len(spec.arms) // 3))
