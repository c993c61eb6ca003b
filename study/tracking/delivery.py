"""Delivery: the events of one trial become its one MLflow run.

    start ────> the run: found by its tags, or created; reopened where it had ended
    measure ──> metrics, in batches
    end ──────> artifacts, final values, tags ──> read back and compared ──> closed

Delivering the same events again changes nothing: times are the events' own, and MLflow drops a point that it has. At a trial's end
its measurements are read from the ledger one by one, as often as need be: a long trial takes no more memory than a short one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from study.document import to_yaml
from study.measurement import Ending, LayerSample, Measurement, Outcome
from study.spec import ObjectiveSpec
from study.traces import write_trace
from study.tracking.names import ENDING_TAGS, STATUS, StudyIdentity, ending_tags, metric_name, params_of, trial_tags
from study.tracking.outbox import Entry, Event, Outbox
from study.tracking.store import Refused, Store
from study.tracking.summaries import Point, overview, points, summary
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
        self._doubtful = {entry.trial_id for entry in outbox.entries() if not entry.run_id}
        """Trials that may have a run which the ledger does not know: a process died, or an answer was lost, while it was created."""

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
            self._doubtful.add(entry.trial_id)
            run_id = self.store.create(self.experiment, entry.trial_id, events[0].time, trial_tags(self.identity, entry, self.parent))
        if run_id != entry.run_id:
            self.outbox.remember_run(entry.trial_id, run_id)
            self._doubtful.discard(entry.trial_id)
        trial = TrialSpec.model_validate(entry.trial)
        waiting: list[Stamped] = []
        params: Mapping[str, str] = {}
        for event in events:
            if event.measurement is not None:
                waiting += _stamped(event.measurement, event.time, trial)
                continue
            self.store.log(run_id, waiting, params)
            waiting, params = [], {}
            if event.ending is not None:
                self._end(run_id, trial, event, event.ending)
            else:
                if not fresh:
                    self.store.reopen(self.store.run(run_id), forget=ENDING_TAGS)
                fresh = False
                params = params_of(trial.model_dump(mode="json"))
        self.store.log(run_id, waiting, params)

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
        """A run that is not in the ledger; empty where there is none. MLflow takes long to search: only where it may be."""
        if entry.trial_id not in self._doubtful:
            return ""
        runs = self.store.runs([self.experiment], {"study.id": self.identity.study_id, "study.trial_id": entry.trial_id})
        return runs[0].run_id if runs else ""

    def _past(self, end: Event) -> Iterator[Measurement]:
        """What a trial measured before this end of it, oldest first."""
        return (measurement for measurement, _ in self.outbox.measured(end.trial_id, before=end.number))

    def _end(self, run_id: str, trial: TrialSpec, event: Event, ending: Ending) -> None:
        (entry,) = self.outbox.entries(event.trial_id)
        seen = overview(self._past(event), trial.schedule.epochs)
        finals = {} if ending.outcome is Outcome.INTERRUPTED else summary(seen, self._past(event), self.objective)
        closing = [(Point(name, seen.whole.step, value), event.time) for name, value in finals.items()]
        samples = (sample for measurement in self._past(event) for sample in measurement.samples)
        self._upload(run_id, entry.trial_id, trial, ending, samples)
        traced = {"study.traced": "all"} if seen.all_layers else {}
        self.store.log(run_id, closing, tags=ending_tags(ending, entry.value, [seen.whole]) | traced)
        lengths = {name: series.points for name, series in seen.series.items()} | dict.fromkeys(finals, 1)
        if not self._holds(run_id, lengths):
            self._send_again(run_id, trial, event, closing)
            if not self._holds(run_id, lengths):
                raise Refused(f"the MLflow run {run_id} does not hold what it was sent", remedy="compare it with its trace.parquet")
        self.store.end(run_id, STATUS[ending.outcome], event.time)
        self.outbox.remember_metrics(entry.trial_id, {metric_name(name): value for name, value in (seen.latest() | finals).items()})

    def _holds(self, run_id: str, lengths: Mapping[str, int]) -> bool:
        """Whether a run has every metric that was sent, and the longest series all of its points."""
        if not lengths:
            return True
        longest = max(lengths, key=lambda name: lengths[name])
        names = {metric_name(name) for name in lengths}
        return names <= self.store.run(run_id).metrics.keys() and self.store.length(run_id, longest) >= lengths[longest]

    def _send_again(self, run_id: str, trial: TrialSpec, end: Event, closing: Sequence[Stamped]) -> None:
        for measurement, time in self.outbox.measured(end.trial_id, before=end.number):
            self.store.log(run_id, _stamped(measurement, time, trial))
        self.store.log(run_id, closing)

    def _upload(self, run_id: str, trial_id: str, trial: TrialSpec, ending: Ending, samples: Iterable[LayerSample]) -> None:
        folder = self.outbox.folder / "trials" / trial_id
        extra = folder / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC).write_text(to_yaml(trial.canonical()), "utf-8")
        write_trace(folder / TRACE, samples)
        if ending.error and not (extra / "traceback.txt").exists():
            extra.mkdir(exist_ok=True)
            (extra / "traceback.txt").write_text(ending.error, "utf-8")
        for file in (folder / SPEC, folder / TRACE):
            self.store.upload(run_id, file)
        for file in sorted(path for path in extra.rglob("*") if path.is_file()):
            inside = file.parent.relative_to(extra).as_posix()
            self.store.upload(run_id, file, "" if inside == "." else inside)


def _stamped(measurement: Measurement, time: int, trial: TrialSpec) -> list[Stamped]:
    """The points that MLflow gets of a measurement."""
    return [(point, time) for point in points(measurement, trial.schedule.epochs)]
