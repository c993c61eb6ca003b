"""Recorder: a thread that brings the outbox to MLflow, while nobody waits for it.

    open() ──> parent run          start() ──> [ pending ─> Delivery ─> mark delivered ]*          close() ──> all delivered, checked
                                                   └── no answer: wait, then the same events again

Whatever crashes, every trial ends up with exactly one run: the outbox keeps what was not delivered for the next recorder.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from study.errors import HomeError, NotFound, TrackingUnavailable
from study.measurement import finite
from study.spec import StudySpec
from study.tracking.delivery import Delivery
from study.tracking.names import MOST_PARAM, MOST_TAG, PLANNED, VERDICT, StudyIdentity, masked, params_of, shortened
from study.tracking.outbox import Event, Outbox
from study.tracking.store import Refused, Store, connect
from study.tracking.summaries import Point

POLL = 2.0
"""Seconds between looks into an empty outbox; what comes in between becomes one request for each trial."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before asking a silent store again; doubled each time."""

PATIENCE = 60.0
"""Seconds that a silent store is asked again for, once the study waits for it."""


COMMIT = "STUDY_GIT_COMMIT"
"""Variable that a submitted study has: its files went to the cluster without their repository."""

STUDY_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
"""MLflow's word for each state of a study."""


class Recorder:
    """Remembers one study in MLflow: one run for the study, below it one for each trial."""

    def __init__(self, folder: Path, tracking_uri: str, spec: StudySpec, study_id: str, engine: str) -> None:
        self.outbox = Outbox(folder)
        self.tracking_uri = tracking_uri
        self.spec = spec
        self.identity = StudyIdentity(study_id, spec.name, spec.spec_hash(), git_commit(), engine)
        self.parent = ""
        """The study's own run, once opened."""
        self._store: Store | None = None
        self._delivery: Delivery | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._failures: dict[str, Exception] = {}
        """What went wrong for good, by trial; its later events stay in the outbox."""
        self._silence: Exception | None = None
        """The store's last failure to answer, while it lasts."""

    def open(self) -> str:
        """Makes sure that the store answers, and opens the study's run: found again, or created. Returns its id.

        Raises:
            TrackingUnavailable: within seconds, if the store does not answer.
            NotFound: if the study has runs, and they are not in this store.
        """
        store = connect(self.tracking_uri)
        experiment = store.experiment(self.spec.name)
        self._check_runs(store, experiment)
        self.parent = self._parent(store, experiment)
        self._store = store
        self._delivery = Delivery(store, self.outbox, experiment, self.parent, self.identity, self.spec.objective)
        return self.parent

    def start(self) -> None:
        """Starts to deliver what the outbox holds and will hold."""
        assert self._delivery is not None, "open() comes before start()"
        if self._thread is not None:
            assert self._abandoned.is_set(), "close() comes before the next start()"
            self._thread.join()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._failures, self._silence = {}, None
        self.outbox.note_silence()
        self._thread = threading.Thread(target=self._drain, args=(self._delivery,), name="recorder", daemon=True)
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Delivers everything, checks that every trial has its one run, and stops.

        Args:
            timeout: Seconds to wait; by default as long as it takes, but no longer than a minute for a store that does not answer.

        Raises:
            TrackingUnavailable: if something could not be delivered; the outbox keeps it.
        """
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout)
            self._abandoned.set()
            self._check()

    def finish(
        self,
        state: Literal["finished", "interrupted", "failed"],
        artifacts: Sequence[Path] = (),
        metrics: Mapping[str, float] | None = None,
        verdicts: Mapping[str, str] | None = None,
    ) -> None:
        """Adds the study's own artifacts, metrics (at step 0) and verdicts to its run, and closes it.

        Args:
            state: Where the study stands now: an `interrupted` one can be resumed, a `failed` one has no result.
            verdicts: Of its claims, by their ids; they take the place of all that the run has. By default these stay.

        Raises:
            TrackingUnavailable: if the store does not answer for a minute.
        """
        assert self._store is not None, "open() comes first"
        points = [(Point(name, 0, value), _now()) for name, value in finite(metrics or {}).items()]
        _patiently(partial(self._store.log, self.parent, points))
        if verdicts is not None:
            _patiently(partial(_replace_verdicts, self._store, self.parent, verdicts))
        for file in artifacts:
            _patiently(partial(self._store.upload, self.parent, file))
        _patiently(partial(self._store.end, self.parent, STUDY_STATUS[state], _now()))

    def attach(self, trial_id: str, file: Path) -> None:
        """Adds a file to the artifacts of a trial's run, in place of one of the same name.

        Raises:
            NotFound: if the trial has no run.
            TrackingUnavailable: if the store does not answer for a minute.
        """
        assert self._store is not None, "open() comes first"
        run_id = self.run_id(trial_id)
        if run_id is None:
            raise NotFound(f"the trial has no run in MLflow (got {trial_id!r})", remedy="attach files once it is delivered")
        _patiently(partial(self._store.upload, run_id, file))

    def run_id(self, trial_id: str) -> str | None:
        """The MLflow run of a trial; None until there is one."""
        found = self.outbox.entries(trial_id)
        return (found[0].run_id or None) if found else None

    def _drain(self, delivery: Delivery) -> None:
        pause, silent_since = FIRST_PAUSE, 0.0
        while not self._abandoned.is_set():
            # Read before the look into the outbox, so that what was written before close() is not missed.
            closing = self._closing.is_set()
            try:
                idle = not self._round(delivery)
            except Exception as error:
                self._hear(error)
                silent_since = (silent_since or time.monotonic()) if closing else 0.0
                if closing and time.monotonic() - silent_since > PATIENCE:
                    break
                self._abandoned.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self._hear(None)
            pause, silent_since = FIRST_PAUSE, 0.0
            if idle and closing:
                break
            if idle:
                self._closing.wait(POLL)
        self.outbox.close()

    def _hear(self, silence: Exception | None) -> None:
        """Keeps why the store is silent, or that it is not; where that changes the ledger is told, for those who look at the study."""
        if (silence is None) != (self._silence is None):
            with suppress(HomeError):  # a full disk, which whoever writes measurements reports
                self.outbox.note_silence(masked(" ".join(str(silence).split())) if silence else "")
        self._silence = silence

    def _round(self, delivery: Delivery) -> bool:
        """Delivers the oldest events, trial by trial; False if there were none."""
        events = self.outbox.pending(without=self._failures)
        trials: dict[str, list[Event]] = {}
        for event in events:
            trials.setdefault(event.trial_id, []).append(event)
        for trial_id, group in trials.items():
            if self._abandoned.is_set():
                break
            try:
                delivery.deliver(group)
            except Exception as error:
                if isinstance(error, TrackingUnavailable) and not isinstance(error, Refused):
                    raise
                self._failures[trial_id] = error
            else:
                self.outbox.mark_delivered(group)
        return bool(events)

    def _check(self) -> None:
        undelivered = self.outbox.progress()["undelivered"]
        cause = next(iter(self._failures.values()), None) or self._silence
        if undelivered or cause:
            trials = f" of {', '.join(self._failures)}" if self._failures else ""
            raise TrackingUnavailable(
                f"{undelivered} events{trials} are not in MLflow yet ({cause or 'out of time'})", remedy="nothing is lost: resume the study"
            ) from cause
        assert self._delivery is not None
        _patiently(self._delivery.settle)

    def _check_runs(self, store: Store, experiment: str) -> None:
        """Makes sure that the store holds the runs that the ledger knows: another store, or a hand that deleted them, would make a second history."""
        known = {entry.run_id: entry.trial_id for entry in self.outbox.entries() if entry.run_id}
        if not known:
            return
        there = {run.run_id for run in store.runs([experiment], {"study.id": self.identity.study_id, "study.trial_id": "%"})}
        if missing := known.keys() - there:
            first = min(missing, key=lambda run_id: known[run_id])
            raise NotFound(
                f"{len(missing)} of {len(known)} runs of this study are not in the tracking store (got {masked(self.tracking_uri)}; {known[first]} is"
                f" the run {first})",
                where=self.spec.name,
                remedy="name the store that it began in with --tracking-uri; where runs were deleted there, bring them back with MlflowClient.restore_run",
            )

    def _parent(self, store: Store, experiment: str) -> str:
        tags = {
            **self.identity.tags(),
            PLANNED: str(self.spec.search.trials),
            "study.objective": self.spec.objective.metric,
            "study.direction": self.spec.objective.direction,
        }
        if self.spec.question:
            tags["mlflow.note.content"] = shortened(self.spec.question, MOST_TAG)
        found = store.runs([experiment], {"study.id": self.identity.study_id, PLANNED: "%"})
        if not found:
            run_id = store.create(experiment, self.spec.name, _now(), tags)
            store.log(run_id, params=study_params(self.spec))
            return run_id
        store.reopen(found[0])
        store.log(found[0].run_id, params=study_params(self.spec), tags=tags)
        return found[0].run_id


def add_to_run(tracking_uri: str, run_id: str, artifacts: Sequence[Path], verdicts: Mapping[str, str]) -> None:
    """Adds files and verdicts to a study's run that has ended, which stays so: a file in place of one of the same name, the verdicts of all.

    Raises:
        TrackingUnavailable: if the store does not answer.
    """
    store = connect(tracking_uri)
    _replace_verdicts(store, run_id, verdicts)
    for file in artifacts:
        store.upload(run_id, file)


def _replace_verdicts(store: Store, run_id: str, verdicts: Mapping[str, str]) -> None:
    """Sets the tags of a study's verdicts, and removes those of claims that have none any more."""
    tags = {f"{VERDICT}{claim}": verdict for claim, verdict in verdicts.items()}
    store.log(run_id, tags=tags)
    store.forget(run_id, [name for name in store.run(run_id).tags if name.startswith(VERDICT) and name not in tags])


def study_params(spec: StudySpec) -> dict[str, str]:
    """What decides a study's trials, as params of its run; the spec hash covers it all, so that they never change."""
    fixed = spec.model_dump(mode="json", include={"search": {"sampler", "seed"}, "objective": True, "stopping": True})
    space = {path: axis.model_dump(mode="json", exclude_defaults=True) for path, axis in spec.space.items()}
    return params_of(fixed) | {f"space.{path}": shortened(json.dumps(axis), MOST_PARAM) for path, axis in space.items()}


def git_commit() -> str:
    """The commit of the present directory, `-dirty` where tracked files differ from it; outside a repository what `$STUDY_GIT_COMMIT` says."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT, "")


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=5).stdout.strip()


def _now() -> int:
    return time.time_ns() // 1_000_000


def _patiently(ask: Callable[[], None]) -> None:
    """Asks a silent store again, for a minute."""
    deadline, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
    while True:
        try:
            return ask()
        except TrackingUnavailable as error:
            if isinstance(error, Refused) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
