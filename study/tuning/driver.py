"""Driver: runs a study from its spec to its best config.

spec ─ folder ─ preflight ─ MLflow ─┬─ Tune: searcher ─> trials, replicates ─> ledger ─> recorder ─┬─ table, best.yaml ─> StudyResult
                                    └─ Ctrl-C, budget: trials end as what they are ────────────────┘
"""

import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from study.document import write_whole
from study.errors import AllFail, Interrupted, StudyError, TrackingUnavailable
from study.home import State, StudyFolder, home_path, tracking_uri_for
from study.measurement import Ending, Outcome, TrialRecord
from study.results.best import BestConfig, ObjectiveResult
from study.results.pictures import draw
from study.results.ranking import recommended
from study.results.table import read_table, trial_table
from study.space import Assignment
from study.spec import StudySpec
from study.tracking.names import masked
from study.tracking.outbox import Outbox
from study.tracking.recorder import Recorder, add_to_run, git_commit
from study.trial import TrialSpec
from study.tuning.choice import Choice
from study.tuning.choosing import choose
from study.tuning.earlier import Earlier, earlier_trials
from study.tuning.exploiting import mutations
from study.tuning.hosting import tune_study
from study.tuning.points import planned, wished
from study.tuning.preflight import audit, check_room
from study.tuning.replicating import train_replicates
from study.tuning.replication import wanted
from study.tuning.starting import on_ray

if TYPE_CHECKING:
    import pandas as pd


log = logging.getLogger(__name__)

PACKAGES = ("effective-lr-study", "torch", "ray", "optuna", "mlflow", "pydantic", "numpy")
"""Whose versions are remembered with a study."""

Watch = Callable[[StudyFolder, threading.Event], AbstractContextManager[None]]
"""Shows the progress of a study while it runs; the event is set once the user has asked it to stop."""


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study found."""

    study_id: str
    best: BestConfig | None
    """The best completed trial; None when no trial completed."""
    trials: "pd.DataFrame"
    """One row for each trial: its fields by dotted path, its outcome, its value and its final metrics."""


def run(
    spec: StudySpec,
    *,
    home: str | Path | None = None,
    tracking_uri: str | None = None,
    watch: Watch | None = None,
    enqueue: Sequence[str] = (),
) -> StudyResult:
    """Runs a study here, or on the cluster that `RAY_ADDRESS` names; continues it where an earlier start stopped.

    Args:
        spec: The study.
        home: Folder of all studies. Default: `$STUDY_HOME`, else `./studies`.
        tracking_uri: MLflow store. Default: `$MLFLOW_TRACKING_URI`, else SQLite in the home.
        watch: Shows progress while the study runs.
        enqueue: Points to be tried first, such as `{"optimizer.lr": 0.1}`; in every arm, unless it names one.

    Raises:
        InputError: if something cannot work; no trial has been started then.
        Interrupted: after Ctrl-C; the same call continues the study.
    """
    base = home_path(home)
    wishes, earlier = wished(spec, enqueue), earlier_trials(spec, base)
    folder = StudyFolder.prepare(base, spec)
    with folder.running():
        folder.remember(spec)
        if folder.card().state in ("finished", "failed") and _is_complete(spec, folder):
            return read(folder, spec, tracking_uri_for(base, tracking_uri))
        for warning in audit(spec).warnings:
            log.warning("warning: %s", warning)
        check_room(spec.resources)
        with on_ray() as wait:
            choice = choose(spec, base, wait)
            log.warning("engine: %s, as %s", choice.engine, choice.why)

            def work(interrupt: threading.Event) -> str:
                began = time.monotonic()
                alike = _search(spec, folder, choice, interrupt, wishes, earlier)
                if spec.replicate.top and not interrupt.is_set() and not alike:
                    train_replicates(spec, folder, choice, interrupt, began)
                return alike

            return recorded(spec, folder, tracking_uri_for(base, tracking_uri), choice, watch, work)


def _is_complete(spec: StudySpec, folder: StudyFolder) -> bool:
    """Whether neither a trial nor a replicate is left."""
    records = Outbox(folder.path).records()
    return len([record for record in records if not record.replicate_of]) >= sum(planned(spec).values()) and not wanted(spec, records)


def recorded(
    spec: StudySpec, folder: StudyFolder, store: str, choice: Choice, watch: Watch | None, work: Callable[[threading.Event], str]
) -> StudyResult:
    """Does the work of a start while MLflow hears of it, and writes down what came out.

    Args:
        work: Returns what the first trials all failed with; empty where they did not.
    """
    recorder = Recorder(folder.path, store, spec, folder.card().study_id, engine=choice.engine)
    folder.update(run_id=recorder.open(), state="running", tracking_uri=masked(store))
    with _interruptible() as interrupt, _recording(recorder) as undelivered, (watch or _unwatched)(folder, interrupt):
        alike = work(interrupt)
    if interrupt.is_set() or alike:
        raise _ended_early(spec, folder, recorder, alike, undelivered)
    result, artifacts = _conclude(spec, folder)
    if undelivered:
        raise undelivered[0]
    artifacts += draw(folder, spec, result.trials, recorder.attach)
    verdicts = _verify(folder, spec, result.trials)
    state: Literal["finished", "failed"] = "finished" if result.best else "failed"
    artifacts += _report(folder, spec, result.trials, state)
    recorder.finish(state, [*artifacts, folder.claims], verdicts=verdicts)
    folder.update(state=state)
    return result


@contextmanager
def _recording(recorder: Recorder) -> Iterator[list[TrackingUnavailable]]:
    """Brings what happens to MLflow meanwhile; what could not be brought is yielded, so that the study's own files are written first."""
    undelivered: list[TrackingUnavailable] = []
    recorder.start()
    try:
        yield undelivered
    finally:
        try:
            recorder.close()
        except TrackingUnavailable as error:
            undelivered.append(error)


def _unwatched(folder: StudyFolder, interrupt: threading.Event) -> AbstractContextManager[None]:
    return nullcontext()


def _search(
    spec: StudySpec,
    folder: StudyFolder,
    choice: Choice,
    interrupt: threading.Event,
    wishes: Sequence[tuple[Assignment, Assignment]],
    earlier: Sequence[Earlier],
) -> str:
    """Runs every trial that is left, and settles the ones that the end of the search cut short.

    Returns:
        What the first trials all failed with; empty where they did not.
    """
    from study.tuning.callbacks import history_of, settle, value_of
    from study.tuning.reconcile import reconcile, repair, sweep
    from study.tuning.search import Search
    from study.tuning.warmstart import warm_start

    repair(folder.journal)
    outbox, search, alike = Outbox(folder.path), Search(spec, folder.journal), ""
    reconcile(search, outbox, folder.path)
    for point, arm in wishes:
        search.enqueue(point, arm)
    if said := warm_start(search, earlier):
        log.warning(said)
    left = [(proposal, history_of(outbox, proposal.trial_id, spec.objective)) for proposal in search.running()]
    if left or search.unasked:
        reached, alike = tune_study(spec, folder.path, search, outbox, left, interrupt, choice)
        if reached and not interrupt.is_set():
            log.warning("the study ended by its budget: %s", reached)
    goes_on = interrupt.is_set() or bool(alike)
    if (done := search.exhausted) and not goes_on:
        log.warning("the search ended early: every combination of %s has been tried", "; ".join(done))
    cut_short = Ending(Outcome.INTERRUPTED) if goes_on else Ending(Outcome.STOPPED, "budget")
    for proposal in search.running():
        value = value_of(outbox, proposal.trial_id, spec.objective)
        if not goes_on:
            outbox.start(proposal.trial_id, arm=proposal.arm, trial=proposal.trial.canonical())
            search.tell(proposal.trial_id, cut_short, value)
        settle(outbox, folder.path, proposal.trial_id, cut_short, value)
    sweep(outbox, folder.path)
    return alike


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (or SIGTERM) into an event; a second one acts as it would have without us."""
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        interrupt.set()
        for name, handler in before.items():
            signal.signal(name, handler)

    for name in before:
        signal.signal(name, stop)
    try:
        yield interrupt
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _ended_early(spec: StudySpec, folder: StudyFolder, recorder: Recorder, alike: str, undelivered: list[TrackingUnavailable]) -> StudyError:
    """Closes a study that the user interrupted, or whose first trials all failed alike; the error that says so."""
    folder.update(state="failed" if alike else "interrupted")
    if not undelivered:  # else the run of the study stays open until the next start brings the rest
        recorder.finish("failed" if alike else "interrupted", [folder.spec])
    records = Outbox(folder.path).records()
    if alike:
        failed = [record.trial_id for record in records if record.outcome is Outcome.FAILED]
        remedy = f"see {folder.path / 'trials' / failed[-1] / 'artifacts' / 'traceback.txt'}; the same command goes on with the other trials"
        return AllFail(f"the first {spec.budget.same_failures} trials all failed alike ({alike})", where=spec.name, remedy=remedy)
    ended = [record for record in records if record.outcome is not Outcome.INTERRUPTED]
    replicates = len([record for record in ended if record.replicate_of])
    also = f" and {replicates} replicates" if replicates else ""
    waiting = f"; {undelivered[0].problems[0].message}" if undelivered else ""
    return Interrupted(
        f"the study was interrupted after {len(ended) - replicates} of {spec.search.trials} trials{also}{waiting}",
        where=spec.name,
        remedy="the same command continues it",
    )


def _conclude(spec: StudySpec, folder: StudyFolder) -> tuple[StudyResult, list[Path]]:
    """Writes the table, the best config and the environment; returns them as files, too."""
    records = Outbox(folder.path).records()
    table = trial_table(records)
    table.to_parquet(folder.table)
    environment = folder.path / "environment.json"
    environment.write_text(
        json.dumps({"versions": versions(), "platform": platform.platform(), "cores": os.cpu_count(), "git_commit": git_commit()}, indent=2)
    )
    best, artifacts = _best(spec, folder, records), [folder.spec, folder.table, environment]
    if best is not None:
        best.save(folder.best)
        artifacts.append(folder.best)
    artifacts += _kept_weights(folder, records, best)
    return StudyResult(folder.card().study_id, best, table), artifacts


def _best(spec: StudySpec, folder: StudyFolder, records: list[TrialRecord]) -> BestConfig | None:
    found = recommended(records, spec.objective)
    if found is None:
        return None
    (chosen, fresh), objective = found, spec.objective
    assert chosen.value is not None, f"{chosen.trial_id} was chosen without a value"
    result = ObjectiveResult(metric=objective.metric, direction=objective.direction, at=objective.at, value=chosen.value)
    if fresh is not None and fresh.interval is not None:
        result = result.model_copy(update={"seeds": fresh.seeds, "mean": fresh.mean, "interval": fresh.interval})
    return BestConfig(
        study_id=folder.card().study_id,
        name=spec.name,
        trial_id=chosen.trial_id,
        run_id=chosen.run_id,
        arm=chosen.arm,
        objective=result,
        spec_hash=spec.spec_hash(),
        git_commit=git_commit(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        trial=TrialSpec.model_validate(chosen.trial),
        mutations=mutations(folder.path, chosen.trial_id).get("schedule", ()),
    )


def _kept_weights(folder: StudyFolder, records: list[TrialRecord], best: BestConfig | None) -> list[Path]:
    """The best trial's weights; those of the others are removed. (Where all are kept, each is its own run's artifact.)"""
    kept = []
    for record in records:
        weights = folder.path / "trials" / record.trial_id / "model.safetensors"
        if best is not None and record.trial_id == best.trial_id and weights.exists():
            kept.append(weights)
        else:
            weights.unlink(missing_ok=True)
    return kept


def _verify(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame") -> dict[str, str]:
    """Tests the study's claims, writes down their verdicts in its folder and returns them by claim; a claim that cannot be tested is logged."""
    from study.results.claims import verify_each, write_verdicts

    verdicts, problems = verify_each(spec.claims, table)
    for problem in problems:
        log.warning("warning: not tested: %s", problem)
    write_verdicts(verdicts, folder.claims)
    return {verdict.id: verdict.verdict for verdict in verdicts}


def _report(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame", state: State) -> list[Path]:
    """Writes the report; returns it as a file, or nothing where it could not be written."""
    from study.tuning.reporting import write_report

    return write_report(folder, spec, table, state)


def read(folder: StudyFolder, spec: StudySpec, tracking_uri: str) -> StudyResult:
    """The result of a study that has ended; its claims are tested anew, as they may have changed since."""
    from study.results.best import read_best

    best = read_best(folder.best) if folder.best.exists() else None
    if not folder.table.exists():
        trial_table(Outbox(folder.path).records()).to_parquet(folder.table)
    table = read_table(folder.table)
    before = folder.claims.read_text("utf-8") if folder.claims.exists() else ""
    verdicts = _verify(folder, spec, table)
    if (spec.claims or before) and folder.claims.read_text("utf-8") != before:
        report = _report(folder, spec, table, folder.card().state)
        try:
            add_to_run(tracking_uri, folder.card().run_id, [folder.claims, folder.spec, *report], verdicts)
        except TrackingUnavailable:
            # As they were, so that the next call finds them changed, and tells MLflow.
            write_whole(folder.claims, before) if before else folder.claims.unlink()
            raise
    return StudyResult(folder.card().study_id, best, table)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
