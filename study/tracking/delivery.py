"""Delivery: the events of one trial become its one MLflow run.

    start ────> the run: found by its tags, or created; reopened where it had ended
    measure ──> metrics, in batches
    end ──────> artifacts, final values, tags ──> read back and compared ──> closed

Delivering the same events again changes nothing: times are the events' own, and MLflow drops a point that it has.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from study.document import to_yaml
from study.measurement import Ending, LayerSample, Outcome
from study.spec import ObjectiveSpec
from study.tracking.names import ENDING_TAGS, STATUS, StudyIdentity, ending_tags, metric_name, params_of, trial_tags
from study.tracking.outbox import Entry, Event, Outbox
from study.tracking.store import Refused, Store
from study.tracking.summaries import Point, all_layers_count, latest, points, summary
from study.trial import TrialSpec

TRACE = "trace.parquet"
"""The artifact with every sample of every layer."""

SPEC = "spec.yaml"
"""The artifact with the whole trial."""

Stamped = tuple[Point, int]
"""A point and its time in ms."""


class Delivery:
    """Brings the trials of one study to MLflow."""

    def __init__(self, store: Store, outbox: Outbox, experiment: str, parent: str, identity: StudyIdentity, objective: ObjectiveSpec) -> None:
        self.store = store
        self.outbox = outbox
        self.experiment = experiment
        self.parent = parent
        self.identity = identity
        self.objective = objective

    def deliver(self, events: Sequence[Event]) -> None:
        """Delivers events of one trial, in order.

        Raises:
            TrackingUnavailable: if MLflow does not answer; deliver the same events again.
            Refused: if MLflow will never hold what it was sent.
        """
        (entry,) = self.outbox.entries(events[0].trial_id)
        run_id = entry.run_id or self._found(entry)
        fresh = not run_id
        if fresh:
            run_id = self.store.create(self.experiment, entry.trial_id, events[0].time, trial_tags(self.identity, entry, self.parent))
        if run_id != entry.run_id:
            self.outbox.remember_run(entry.trial_id, run_id)
        waiting: list[Stamped] = []
        for event in events:
            if event.measurement is not None:
                waiting += [(point, event.time) for point in points(event.measurement)]
                continue
            self.store.log(run_id, waiting)
            waiting = []
            if event.ending is not None:
                self._end(run_id, event, event.ending)
            else:
                if not fresh:
                    self.store.reopen(self.store.run(run_id), forget=ENDING_TAGS)
                fresh = False
                self.store.log(run_id, params=params_of(TrialSpec.model_validate(entry.trial).model_dump(mode="json")))
        self.store.log(run_id, waiting)

    def settle(self) -> None:
        """Makes sure that every trial has exactly one run; runs that a lost answer left behind are deleted.

        Raises:
            Refused: if a trial has none.
        """
        runs: dict[str, list[str]] = {}
        for run in self.store.runs([self.experiment], {"study.id": self.identity.study_id, "study.trial_id": "%"}):
            runs.setdefault(run.tags["study.trial_id"], []).append(run.run_id)
        for entry in self.outbox.entries():
            if entry.run_id not in runs.get(entry.trial_id, []):
                raise Refused(f"trial {entry.trial_id} has no run in MLflow", remedy="was it deleted there? restore it, then resume the study")
            for run_id in runs[entry.trial_id]:
                if run_id != entry.run_id:
                    self.store.delete(run_id)

    def _found(self, entry: Entry) -> str:
        """A run that is not in the ledger, as a process died between creating it and writing it down; empty where there is none."""
        runs = self.store.runs([self.experiment], {"study.id": self.identity.study_id, "study.trial_id": entry.trial_id})
        return runs[0].run_id if runs else ""

    def _end(self, run_id: str, event: Event, ending: Ending) -> None:
        (entry,) = self.outbox.entries(event.trial_id)
        past = [
            (before.measurement, before.time) for before in self.outbox.events(event.trial_id) if before.measurement and before.number < event.number
        ]
        measurements = [measurement for measurement, _ in past]
        samples = [sample for measurement in measurements for sample in measurement.samples]
        series = [(point, time) for measurement, time in past for point in points(measurement)]
        finals = {} if ending.outcome is Outcome.INTERRUPTED else summary(measurements, self.objective)
        closing = [(Point(name, measurements[-1].step, value), event.time) for name, value in finals.items()]
        self._upload(run_id, entry, ending, samples)
        traced = {"study.traced": "all"} if all_layers_count(samples) else {}
        self.store.log(run_id, closing, tags=ending_tags(ending, entry.value, measurements) | traced)
        self._verify(run_id, [*series, *closing])
        self.store.end(run_id, STATUS[ending.outcome], event.time)
        held = latest((point for point, _ in series), finals)
        self.outbox.remember_metrics(entry.trial_id, {metric_name(name): value for name, value in held.items()})

    def _verify(self, run_id: str, sent: Sequence[Stamped]) -> None:
        """Reads a run back; what is missing is sent once more."""
        if self._holds(run_id, sent):
            return
        self.store.log(run_id, sent)
        if not self._holds(run_id, sent):
            raise Refused(f"the MLflow run {run_id} does not hold what it was sent", remedy="compare it with its trace.parquet")

    def _holds(self, run_id: str, sent: Sequence[Stamped]) -> bool:
        """Whether a run has every metric that was sent, and the longest series all of its points."""
        steps: dict[str, set[int]] = {}
        for point, _ in sent:
            steps.setdefault(metric_name(point.name), set()).add(point.step)
        if not steps:
            return True
        longest = max(steps, key=lambda name: len(steps[name]))
        return steps.keys() <= self.store.run(run_id).metrics.keys() and self.store.length(run_id, longest) == len(steps[longest])

    def _upload(self, run_id: str, entry: Entry, ending: Ending, samples: Sequence[LayerSample]) -> None:
        folder = self.outbox.folder / "trials" / entry.trial_id
        extra = folder / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC).write_text(to_yaml(TrialSpec.model_validate(entry.trial).canonical()), "utf-8")
        write_trace(folder / TRACE, samples)
        if ending.error and not (extra / "traceback.txt").exists():
            extra.mkdir(exist_ok=True)
            (extra / "traceback.txt").write_text(ending.error, "utf-8")
        for file in (folder / SPEC, folder / TRACE):
            self.store.upload(run_id, file)
        for file in sorted(path for path in extra.rglob("*") if path.is_file()):
            inside = file.parent.relative_to(extra).as_posix()
            self.store.upload(run_id, file, "" if inside == "." else inside)


def write_trace(path: Path, samples: Sequence[LayerSample]) -> None:
    """Writes samples as a Parquet table, one row per layer and sampled step; numbers that are not finite are null."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    types: dict[Any, Any] = {int: pa.int64(), str: pa.string(), bool: pa.bool_(), float: pa.float64(), float | None: pa.float64()}
    arrays = {column.name: pa.array([getattr(sample, column.name) for sample in samples], types[column.type]) for column in fields(LayerSample)}
    finite = {name: pc.if_else(pc.is_finite(array), array, None) if array.type == pa.float64() else array for name, array in arrays.items()}
    pq.write_table(pa.table(finite), path)
