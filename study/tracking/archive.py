"""Archive: what MLflow remembers, read back as plain values.

study name or id ──study_records──> [TrialRecord, ...]
run id ─┬─best_of_run───> what a best.yaml holds
        ├─trial_of_run──> the trial's spec, and where it comes from
        └─trace_of_run──> one row per layer and sampled step
"""

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from study.document import read_document
from study.errors import NotFound
from study.measurement import Outcome, TrialRecord
from study.traces import read_trace
from study.tracking.delivery import SPEC, TRACE
from study.tracking.names import PLANNED, masked, trial_of
from study.tracking.store import Run, Store, connect
from study.trial import TrialSpec

if TYPE_CHECKING:
    import pandas as pd

BEST = "best.yaml"
"""The artifact of a study's run with its best trial."""

ENVIRONMENT = "environment.json"
"""The artifact of a study's run with the versions that it ran with."""


def study_records(tracking_uri: str, study: str) -> list[TrialRecord]:
    """The trials of a study that have ended, in the order of starting, as its own ledger tells them.

    Args:
        study: Its name, which means its latest study, or its id.

    Raises:
        NotFound: if the store has no such study.
        TrackingUnavailable: if the store does not answer.
    """
    store = connect(tracking_uri)
    experiments = store.experiments(study)
    wanted = {"study.name": study} if experiments else {"study.id": study}
    studies = store.runs(experiments or store.experiments(), {**wanted, PLANNED: "%"}) if "'" not in study else []
    if not studies:
        raise NotFound(f"the tracking store {masked(tracking_uri)} has no such study (got {study!r})", remedy="`study list` shows what there is")
    of_it = {"study.id": studies[-1].tags["study.id"], "study.trial_id": "%", "study.outcome": "%"}
    return [_record(store, run) for run in store.runs(experiments or store.experiments(), of_it)]


def best_of_run(run_id: str, tracking_uri: str) -> dict[str, Any]:
    """What a best.yaml holds, as plain values: that of a study by the study's run, or one made of any trial by the trial's run.

    Raises:
        NotFound: if there is no such run, or a study's run has no best trial.
        TrackingUnavailable: if the store does not answer.
    """
    store = connect(tracking_uri)
    run = store.run(run_id)
    if PLANNED in run.tags:
        return _document(store, run, BEST)
    if "study.trial_id" not in run.tags:
        raise NotFound(f"the run is neither a trial nor a study (got {run_id!r})", remedy="give the id of one")
    study = store.run(run.tags["mlflow.parentRunId"])
    return {
        "study_id": run.tags["study.id"],
        "name": run.tags["study.name"],
        "trial_id": run.tags["study.trial_id"],
        "run_id": run.run_id,
        "arm": run.tags["study.arm"],
        "objective": {**{word: study.params[f"objective.{word}"] for word in ("metric", "direction", "at")}, "value": _value(run)},
        "spec_hash": run.tags["study.spec_hash"],
        "git_commit": run.tags["study.git_commit"],
        "versions": _versions(store, study),
        "date": datetime.fromtimestamp((run.ended or run.started) / 1000, UTC).isoformat(timespec="seconds"),
        "trial": _trial(store, run),
    }


def trial_of_run(run_id: str, tracking_uri: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of a trial by its run, or of a study's best trial by the study's run, and its provenance.

    The provenance holds study_id, name, trial_id, run_id, value, metric, direction, at, spec_hash, git_commit, arm, versions and date.

    Raises:
        NotFound: if there is no such run, or a study's run has no best trial.
        TrackingUnavailable: if the store does not answer.
    """
    provenance = best_of_run(run_id, tracking_uri)
    trial, objective = provenance.pop("trial"), provenance.pop("objective")
    return trial, {**provenance, **objective}


def trace_of_run(run_id: str, tracking_uri: str) -> "pd.DataFrame":
    """The samples of every layer of a trial.

    Raises:
        NotFound: if there is no such run, or it has no trace yet.
        TrackingUnavailable: if the store does not answer.
    """
    store = connect(tracking_uri)
    with TemporaryDirectory() as folder:
        return read_trace(store.download(store.run(run_id).run_id, TRACE, Path(folder)))


def _record(store: Store, run: Run) -> TrialRecord:
    tags = run.tags
    return TrialRecord(
        trial_id=tags["study.trial_id"],
        arm=tags["study.arm"],
        outcome=Outcome(tags["study.outcome"]),
        reason=tags.get("study.stop_reason") or tags.get("study.divergence") or "",
        trial=_trial(store, run),
        value=_value(run),
        step=int(tags["study.step"]),
        epoch=int(tags["study.epoch"]),
        metrics=run.metrics,
        run_id=run.run_id,
        seconds=float(tags["study.seconds"]),
        replicate_of=tags.get("study.replicate_of", ""),
    )


def _value(run: Run) -> float | None:
    return float(run.tags["study.value"]) if "study.value" in run.tags else None


def _trial(store: Store, run: Run) -> dict[str, Any]:
    """The canonical spec from a run's params, or from its artifact where a param was too long."""
    tree = trial_of(run.params) or _document(store, run, SPEC)
    return TrialSpec.model_validate(tree).canonical()


def _versions(store: Store, study: Run) -> dict[str, str]:
    """The library versions that a study ran with; empty until it has ended."""
    try:
        return dict(_document(store, study, ENVIRONMENT).get("versions", {}))
    except NotFound:
        return {}


def _document(store: Store, run: Run, artifact: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        document = read_document(store.download(run.run_id, artifact, Path(folder))).tree
    if not isinstance(document, dict):
        raise NotFound(f"the artifact {artifact} of run {run.run_id} holds no mapping", remedy="was it written by another program?")
    return document
