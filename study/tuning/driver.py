"""Driver: runs a study from its spec to its best config.

spec ─ folder ─ preflight ─ MLflow ─┬─ Tune: searcher ─> trials ─> ledger ─> recorder ─┬─ table, best.yaml ─> StudyResult
                                    └─ Ctrl-C, budget: trials end as what they are ────┘
"""

import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.errors import InputError, Interrupted, TrackingUnavailable
from study.home import StudyFolder, home_path, tracking_uri_for
from study.measurement import Ending, Outcome, TrialRecord
from study.results.best import BestConfig, ObjectiveResult, choose_best
from study.results.pictures import draw
from study.spec import ObjectiveSpec, StudySpec
from study.tracking.names import masked
from study.tracking.outbox import Outbox
from study.tracking.recorder import Recorder, add_to_run, git_commit
from study.trial import TrialSpec, flatten
from study.tuning.choosing import Choice, choose
from study.tuning.preflight import audit

if TYPE_CHECKING:
    import pandas as pd

    from study.tuning.search import Proposal, Search
    from study.tuning.stopping import History

log = logging.getLogger(__name__)

PACKAGES = ("effective-lr-study", "torch", "ray", "optuna", "mlflow", "pydantic", "numpy")
"""Whose versions are remembered with a study."""

WORKERS = {
    "OMP_NUM_THREADS": "1",
    # Tensors of some megabytes come and go with every step: memory that is freed is kept, as fetching it anew costs up to a tenth of the time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
"""Environment of the processes that train."""

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


def run(spec: StudySpec, *, home: str | Path | None = None, tracking_uri: str | None = None, watch: Watch | None = None) -> StudyResult:
    """Runs a study here, or on the cluster that `RAY_ADDRESS` names; continues it where an earlier start stopped.

    Args:
        spec: The study.
        home: Folder of all studies. Default: `$STUDY_HOME`, else `./studies`.
        tracking_uri: MLflow store. Default: `$MLFLOW_TRACKING_URI`, else SQLite in the home.
        watch: Shows progress while the study runs.

    Raises:
        InputError: if something cannot work; no trial has been started then.
        Interrupted: after Ctrl-C; the same call continues the study.
    """
    base = home_path(home)
    folder = StudyFolder.prepare(base, spec)
    with folder.running():
        folder.remember(spec)
        if folder.card().state in ("finished", "failed") and len(Outbox(folder.path).records()) >= spec.search.trials:
            return _read(folder, spec, tracking_uri_for(base, tracking_uri))
        for warning in audit(spec).warnings:
            log.warning("warning: %s", warning)
        store = tracking_uri_for(base, tracking_uri)
        choice = choose(spec, base)
        log.warning("engine: %s, as %s", choice.engine, choice.why)
        recorder = Recorder(folder.path, store, spec, folder.card().study_id, engine=choice.engine)
        folder.update(run_id=recorder.open(), state="running", tracking_uri=masked(store))
        with _interruptible() as interrupt, _recording(recorder) as undelivered, (watch or _unwatched)(folder, interrupt):
            _search(spec, folder, choice, interrupt)
        if interrupt.is_set():
            raise _interrupted(spec, folder, recorder)
        result, artifacts = _conclude(spec, folder)
        if undelivered:
            raise undelivered[0]
        artifacts += draw(folder, spec, result.trials, recorder.attach)
        tags = _verify(folder, spec, result.trials)
        recorder.finish("finished" if result.best else "failed", [*artifacts, folder.claims], tags=tags)
        folder.update(state="finished" if result.best else "failed")
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


def _search(spec: StudySpec, folder: StudyFolder, choice: Choice, interrupt: threading.Event) -> None:
    """Runs every trial that is left, and settles the ones that the end of the search cut short."""
    from study.tuning.callbacks import settle
    from study.tuning.search import Search
    from study.tuning.trainables import snapshot_path

    outbox, search = Outbox(folder.path), Search(spec, folder.journal)
    for trial_id, (ending, value) in search.told().items():
        if trial_id in outbox.orphans():
            settle(outbox, folder.path, trial_id, ending, value)
    left = [(proposal, _history(outbox, proposal.trial_id, spec.objective)) for proposal in search.running()]
    if left or search.unasked:
        tune_study(spec, folder.path, search, outbox, left, interrupt, choice)
    cut_short = Ending(Outcome.INTERRUPTED) if interrupt.is_set() else Ending(Outcome.STOPPED, "budget")
    for proposal in search.running():
        history = [objective for _, objective in _history(outbox, proposal.trial_id, spec.objective)]
        value = spec.objective.value(history) if history else None
        if not interrupt.is_set():
            outbox.start(proposal.trial_id, arm=proposal.arm, trial=proposal.trial.canonical())
            search.tell(proposal.trial_id, cut_short, value)
        settle(outbox, folder.path, proposal.trial_id, cut_short, value)
    for record in outbox.records():
        # An engine may write a trial's snapshot once more before it hears that the trial was stopped.
        if record.outcome is not Outcome.INTERRUPTED:
            snapshot_path(folder.path, record.trial_id).unlink(missing_ok=True)


def _history(outbox: Outbox, trial_id: str, objective: ObjectiveSpec) -> "History":
    return [(seen.epoch, seen.values[objective.metric]) for seen in outbox.history(trial_id) if objective.metric in seen.values]


def tune_study(
    spec: StudySpec,
    folder: Path,
    search: "Search",
    outbox: Outbox,
    left: list[tuple["Proposal", "History"]],
    interrupt: threading.Event,
    choice: Choice,
) -> None:
    """Lets Ray Tune run the trials of a search until none is left, the budget is spent or `interrupt` is set."""
    _quiet_hosts()
    import ray
    from ray import tune

    from study.tuning.callbacks import LedgerCallback
    from study.tuning.search import JournalSearcher
    from study.tuning.stopping import stopping

    resources = spec.resources
    settings = {
        "folder": str(folder.resolve()),
        "objective": spec.objective.model_dump_json(),
        "device": "cuda" if resources.gpus_per_trial else "cpu",
        "keep_weights": spec.keep.weights,
    }
    going_on = {proposal.trial_id for proposal, _ in left}
    ended = [(record.arm, _history(outbox, record.trial_id, spec.objective)) for record in outbox.records() if record.trial_id not in going_on]
    resumed = {proposal.trial_id: history for proposal, history in left}
    with _ray(ray), _trained_by(choice, spec, settings) as (trainable, share):
        tune.run(
            trainable,
            name="ray",
            storage_path=str(folder.resolve()),
            search_alg=JournalSearcher(search, settings, left, _tags),
            scheduler=stopping(spec.stopping, spec.objective.direction, _longest(spec), ended, resumed),
            stop=_stopper(spec, interrupt),
            callbacks=[LedgerCallback(outbox, folder)],
            num_samples=search.unasked + len(left),
            resources_per_trial=share,
            reuse_actors=True,
            max_failures=2,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            raise_on_failed_trial=False,
            verbose=0,
        )


@contextmanager
def _trained_by(choice: Choice, spec: StudySpec, settings: dict[str, Any]) -> Iterator[tuple[Any, dict[str, float]]]:
    """What Tune runs for each trial, and what each reserves; engines for it while the block lasts.

    The settings of the trials are told how to find the engines.
    """
    from study.tuning.trainables import FusedTrainable, SoloTrainable

    resources = spec.resources
    if choice.engine == "solo":
        yield SoloTrainable, {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
        return
    from study.tuning.actor import pool

    arguments = {"folder": settings["folder"], "slots": choice.slots, "device": settings["device"], "arithmetic": choice.arithmetic}
    with pool({**arguments, "keep": settings["keep_weights"]}) as name:
        settings["pool"] = name
        # Rounded down, so that as many proxies as slots fit.
        share = int(10_000 / choice.slots) / 10_000
        yield FusedTrainable, {"cpu": 0.0, "gpu": share} if resources.gpus_per_trial else {"cpu": share}


def _tags(trial: TrialSpec) -> dict[str, str]:
    """More tags of a trial's MLflow run; none where its model cannot be built, which the trial itself will say."""
    from study.training.plans import plan_hash_of

    try:
        return {"study.plan_hash": plan_hash_of(trial)}
    except InputError:
        return {}


def _longest(spec: StudySpec) -> int:
    axis = spec.space.get("schedule.epochs")
    return spec.trial.schedule.epochs if axis is None else int(max(value for value in axis.endpoints() if isinstance(value, int | float)))


def _stopper(spec: StudySpec, interrupt: threading.Event) -> Any:
    from ray.tune import Stopper

    class StudyStopper(Stopper):
        """Ends the whole study at Ctrl-C and when its budget is spent."""

        def __init__(self) -> None:
            self.deadline = time.monotonic() + spec.budget.wall if spec.budget.wall else float("inf")
            self.gpu_seconds = 0.0

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.gpu_seconds += result.get("time_this_iter_s", 0.0) * spec.resources.gpus_per_trial
            return False

        def stop_all(self) -> bool:
            spent = spec.budget.gpu_hours is not None and self.gpu_seconds > 0 and self.gpu_seconds >= spec.budget.gpu_hours * 3600
            return interrupt.is_set() or spent or time.monotonic() > self.deadline

        def __reduce__(self) -> tuple[object, ...]:
            return (dict, ())

    return StudyStopper()


def _quiet_hosts() -> None:
    """Tune's own loggers, tables and Ctrl-C handling are replaced by ours; nothing phones home."""
    defaults = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Trials start a few at a time: the first ones train while the processes of others start.
        "TUNE_MAX_PENDING_TRIALS_PG": "2",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def _ray(ray: Any) -> Iterator[None]:
    """A Ray of our own, or the cluster that `RAY_ADDRESS` names; a Ray that runs in this process already is used and left alone."""
    if ray.is_initialized():
        yield
        return
    environment = {"env_vars": {**WORKERS, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))}}
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        ray.shutdown()


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


def _interrupted(spec: StudySpec, folder: StudyFolder, recorder: Recorder) -> Interrupted:
    folder.update(state="interrupted")
    recorder.finish("interrupted", [folder.spec])
    ended = len([record for record in Outbox(folder.path).records() if record.outcome is not Outcome.INTERRUPTED])
    return Interrupted(
        f"the study was interrupted after {ended} of {spec.search.trials} trials", where=spec.name, remedy="the same command continues it"
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
    chosen = choose_best(records, spec.objective)
    if chosen is None or chosen.value is None:
        return None
    objective = spec.objective
    return BestConfig(
        study_id=folder.card().study_id,
        name=spec.name,
        trial_id=chosen.trial_id,
        run_id=chosen.run_id,
        arm=chosen.arm,
        objective=ObjectiveResult(metric=objective.metric, direction=objective.direction, at=objective.at, value=chosen.value),
        spec_hash=spec.spec_hash(),
        git_commit=git_commit(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        trial=TrialSpec.model_validate(chosen.trial),
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
    """Tests the study's claims, writes their verdicts into its folder and returns the tags of its run; a claim that cannot be tested is logged."""
    from study.results.claims import verdict_tags, verify_each, write_verdicts

    verdicts, problems = verify_each(spec.claims, table)
    for problem in problems:
        log.warning("warning: not tested: %s", problem)
    write_verdicts(verdicts, folder.claims)
    return verdict_tags(verdicts)


def _read(folder: StudyFolder, spec: StudySpec, tracking_uri: str) -> StudyResult:
    """The result of a study that has ended; claims that it did not make before are tested now."""
    import pandas as pd

    from study.results.best import read_best

    best = read_best(folder.best) if folder.best.exists() else None
    table = pd.read_parquet(folder.table)
    before = folder.claims.read_text("utf-8") if folder.claims.exists() else ""
    tags = _verify(folder, spec, table)
    if spec.claims and folder.claims.read_text("utf-8") != before:
        add_to_run(tracking_uri, folder.card().run_id, [folder.claims, folder.spec], tags)
    return StudyResult(folder.card().study_id, best, table)


def trial_table(records: list[TrialRecord]) -> "pd.DataFrame":
    """One row for each trial, columns as `trials.parquet` has them; lists and mappings as JSON."""
    import pandas as pd

    own = ("trial_id", "arm", "outcome", "reason", "replicate_of", "value", "step", "epoch", "seconds", "run_id")
    rows = []
    for record in records:
        fields = flatten(TrialSpec.model_validate(record.trial).model_dump(mode="json"))
        settled = {"equilibrated": record.metrics.get("final/equilibrated") == 1}
        plain = {path: json.dumps(value) if isinstance(value, list | dict) else value for path, value in fields.items()}
        rows.append({**{name: getattr(record, name) for name in own}, **settled, **plain, **record.metrics})
    return pd.DataFrame(rows)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
