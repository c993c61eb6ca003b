"""Journal: Optuna's file of a study, and one arm's study in it.

own trials, in the order of proposing ──┐
trials of another study, by source ─────┼── their points ──> what must not be proposed again
points that wait to be tried ───────────┘
"""

import json
import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from study.errors import HomeError
from study.space import Assignment, Axis, arm_label
from study.spec import StudySpec
from study.tracking.remedies import DAMAGED
from study.tuning.points import combinations, exists, grid, index_of, key_of, parents_first, seed_of, snapped

FROM = "from"
"""User attribute of a trial of another study: which one it is."""

WISH = "enqueued"
"""User attribute of a trial: the number of the point that was enqueued for it. Those of an arm's study `enqueued:0`, ...: these points."""


class JournalFile(JournalFileBackend):
    """Optuna's file, which the study's control loop does not wait for longer than it must.

    Lines that belong together are written at once, and another thread forces them to disk. A process that is killed loses nothing that it
    wrote; a machine that loses power may lose the last moments, as with the ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._mutex = path, JournalFileSymlinkLock(str(path))
        self._held: list[dict[str, Any]] | None = None
        self._seen = (-1, -1)
        self._disk, self._forced = ThreadPoolExecutor(1, "journal"), Future[None]()
        self._forced.set_result(None)
        super().__init__(str(path), self._mutex)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from a number on. Optuna asks for them before everything it does: a file that has not grown is not opened.

        Raises:
            HomeError: if a line is damaged.
        """
        number, size = log_number_from, self._path.stat().st_size
        if (number, size) == self._seen:
            return
        try:
            for line in super().read_logs(log_number_from):
                number += 1
                yield line
        except ValueError as error:
            raise HomeError(f"the study's journal is damaged ({error})", where=f"{self._path}:{number + 1}", remedy=DAMAGED) from error
        # The size before reading: what was appended meanwhile is looked for the next time.
        self._seen = (number, size)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes lines, while nobody else does; later, where they belong together with others."""
        if self._held is not None:
            self._held += logs
            return
        self._mutex.acquire()
        try:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs))
        finally:
            self._mutex.release()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Writes all lines of the block at its end. Whoever reads meanwhile sees none of them."""
        held: list[dict[str, Any]] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        self.append_logs(held)

    def sync(self) -> None:
        """Has what was written forced to disk, and waits only for the time before.

        Raises:
            OSError: if that failed.
        """
        self._forced.result()
        self._forced = self._disk.submit(self._force)

    def _force(self) -> None:
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


class ArmJournal:
    """An arm's study in the journal: which trials it has, which points were proposed, which are wished for."""

    def __init__(self, spec: StudySpec, arm: Assignment, storage: JournalStorage) -> None:
        self.arm, self.label, self.name = arm, arm_label(arm), f"{spec.name}/{arm_label(arm)}"
        self.share = spec.search.trials // len(spec.arms)
        self._axes = {path: spec.space[path] for path in parents_first(spec.nuisance)}
        self._distributions = {path: distribution_of(axis, spec.integer(path)) for path, axis in self._axes.items()}
        self._integer = {path: spec.integer(path) for path in self._axes}
        points = combinations(spec, arm)
        self.points = None if points is None else grid(points, self.share, spec.search.seed)
        """Every point of a finite space, in the order of a grid."""
        self._storage = storage
        study = optuna.create_study(storage=storage, study_name=self.name, direction=spec.objective.direction, load_if_exists=True)
        self._id = study._study_id
        wishes = {name: point for name, point in study.user_attrs.items() if name.startswith(f"{WISH}:")}
        self.wishes: list[Assignment] = [wishes[f"{WISH}:{index}"] for index in range(len(wishes))]
        self._wished = set(map(key_of, self.wishes))
        self._open_wishes = dict(enumerate(self.wishes))
        self.own: list[int] = []
        """The journal's ids of the study's own trials, in the order of proposing."""
        self.added: dict[str, int] = {}
        """The journal's ids of other studies' trials, by their source."""
        self._proposed: set[str] = set()
        for frozen in study.get_trials(deepcopy=False):
            self._enter(frozen._trial_id, frozen.user_attrs)
            if self.is_complete(frozen.params):
                self._proposed.add(key_of(frozen.params))

    @property
    def left(self) -> int:
        """How many trials are left to propose."""
        unseen = self.share if self.points is None else len(self.points) - len(self._proposed)
        return max(0, min(self.share - len(self.own), unseen))

    def _enter(self, trial_id: int, attributes: Mapping[str, Any]) -> None:
        self._open_wishes.pop(attributes.get(WISH, -1), None)
        if FROM in attributes:
            self.added[attributes[FROM]] = trial_id
        else:
            self.own.append(trial_id)

    def create(self, attributes: Mapping[str, Any], point: Assignment | None = None) -> int:
        """A trial in the journal, with its values if they are known: in one line then, which a crash writes whole or not at all."""
        # Optuna takes the first of choices that Python calls equal, so that others are written one by one.
        plain = {
            path: value for path, value in (point or {}).items() if self._distributions[path].to_internal_repr(value) == self._internal(path, value)
        }
        template = create_trial(
            state=TrialState.RUNNING, params=plain, distributions={path: self._distributions[path] for path in plain}, user_attrs=dict(attributes)
        )
        trial_id = self._storage.create_new_trial(self._id, template)
        self._enter(trial_id, attributes)
        if point is not None:
            self.set(trial_id, point)
        return trial_id

    def wish(self, point: Assignment) -> None:
        """A point for the next trial, without axes that do not exist at it."""
        there = {**self.arm, **point}
        point = {path: value for path, value in point.items() if exists(self._axes[path], {**self._axes[path].when, **there})}
        if point and key_of(point) not in self._wished:
            self._open_wishes[len(self.wishes)] = point
            self._storage.set_study_user_attr(self._id, f"{WISH}:{len(self.wishes)}", point)
            self.wishes.append(point)
            self._wished.add(key_of(point))

    def next_wish(self) -> int | None:
        """The oldest wish that no trial has tried and none has come by anyway."""
        return next((index for index, point in self._open_wishes.items() if not self.is_complete(point) or self.is_new(point)), None)

    def is_complete(self, point: Assignment) -> bool:
        """Whether every axis that exists at a point has a value."""
        return all(path in point or not exists(axis, {**self.arm, **point}) for path, axis in self._axes.items())

    def is_new(self, point: Assignment) -> bool:
        """Whether the arm has not had this point."""
        return key_of(point) not in self._proposed

    def another(self, drawn: Assignment, seed: int, number: int) -> Assignment:
        """A new point of a finite space of which old ones keep being drawn; the drawn one where the space cannot be listed."""
        new = [point for point in self.points or () if self.is_new(point)]
        return new[seed_of(seed, number) % len(new)] if new else drawn

    def set(self, trial_id: int, point: Assignment) -> None:
        """Writes a point into the journal as a trial's values."""
        written = self._storage.get_trial(trial_id).params
        for path, value in point.items():
            if path not in written:
                self._storage.set_trial_param(trial_id, path, self._internal(path, value), self._distributions[path])
        self._proposed.add(key_of({**point, **written}))

    def _internal(self, path: str, value: Any) -> float:
        choices = self._axes[path].choices
        return float(value) if choices is None else float(index_of(choices, value) or 0)

    def sampled(self, study: optuna.Study, frozen: FrozenTrial, known: Assignment) -> Assignment:
        """One value for each axis that exists: the known one, or one from the study's sampler."""
        sampler = study.sampler
        relative = (
            sampler.sample_relative(study, frozen, sampler.infer_relative_search_space(study, frozen)) if known.keys() < self._axes.keys() else {}
        )
        drawn: Assignment = {}
        for path, axis in self._axes.items():
            if not exists(axis, {**self.arm, **drawn}):
                continue
            distribution = self._distributions[path]
            if path in known:
                value = known[path]
            elif distribution.single():
                value = distribution.to_external_repr(0.0) if axis.choices else axis.low
            else:
                value = relative[path] if path in relative else sampler.sample_independent(study, frozen, path, distribution)
            drawn[path] = snapped(axis, self._integer[path], value)
        return drawn


def distribution_of(axis: Axis, integer: bool) -> BaseDistribution:
    if axis.choices is not None:
        return CategoricalDistribution(axis.choices)
    assert axis.low is not None and axis.high is not None
    high = axis.high if axis.step is None else axis.low + axis.step * int((axis.high - axis.low) / axis.step + 1e-9)
    if integer:
        return IntDistribution(int(axis.low), int(high), step=int(axis.step or 1), log=axis.log)
    return FloatDistribution(float(axis.low), float(high), step=axis.step, log=axis.log)
