"""Facts about the delivery of long trials: what they take of memory, and what is asked of MLflow."""

import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from study.errors import TrackingUnavailable
from study.measurement import Ending, Measurement, Outcome
from study.traces import read_trace
from study.tracking.delivery import Delivery
from study.tracking.names import StudyIdentity, metric_name
from study.tracking.outbox import Outbox
from study.tracking.store import Run
from study.tracking.summaries import Point
from tests.tracking.scenes import layer, study_spec

SPEC = study_spec(trial={"schedule": {"epochs": 1000}})


class Counting:
    """A store that keeps the last value of each metric and how many points it has; until it is first read it loses those named *lost*."""

    def __init__(self, lost: str = "") -> None:
        self.lost = lost
        self.points: Counter[str] = Counter()
        self.values: dict[str, float] = {}
        self.largest = 0
        self.ended = ""

    def create(self, experiment: str, name: str, started: int, tags: Mapping[str, str]) -> str:
        return "run"

    def runs(self, experiments: Sequence[str], tags: Mapping[str, str]) -> list[Run]:
        return []

    def log(self, run_id: str, points: Sequence[tuple[Point, int]] = (), params: Any = None, tags: Any = None) -> None:
        self.largest = max(self.largest, len(points))
        for point, _ in points:
            if point.name != self.lost:
                self.values[metric_name(point.name)] = point.value
                self.points[metric_name(point.name)] += 1

    def run(self, run_id: str) -> Run:
        self.lost, self.largest = "", 0
        return Run(run_id, "RUNNING", {}, {}, dict(self.values), 0, None)

    def length(self, run_id: str, metric: str) -> int:
        return self.points[metric_name(metric)]

    def reopen(self, run: Run, forget: Sequence[str]) -> None:
        self.ended = ""

    def upload(self, run_id: str, file: Path, folder: str = "") -> None:
        assert file.exists()

    def end(self, run_id: str, status: str, ended: int) -> None:
        self.ended = status


def lived(folder: Path, measurements: int, layers: int = 20) -> Outbox:
    """A trial that has ended, one sampled step for each measurement."""
    outbox = Outbox(folder)
    outbox.start("roles-0000", arm="all", trial=SPEC.trial.canonical())
    for epoch in range(1, measurements + 1):
        samples = [layer(10 * epoch, f"conv{number}") for number in range(layers)]
        outbox.measure("roles-0000", Measurement(10 * epoch, epoch, {"val/error": 1 / epoch}, samples, seconds=0.5))
    outbox.end("roles-0000", Ending(Outcome.COMPLETED), 1 / measurements)
    return outbox


def delivered(outbox: Outbox, store: Any) -> int:
    """Delivers all that is pending, and returns the most bytes of Python objects that this held at once."""
    delivery = Delivery(store, outbox, "0", "parent", StudyIdentity("study-1", "roles", "", "", "solo"), SPEC.objective)
    tracemalloc.start()
    while events := outbox.pending(limit=8):
        delivery.deliver(events)
        outbox.mark_delivered(events)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries are loaded before memory is measured."""
    delivered(lived(tmp_path_factory.mktemp("warm"), 3), Counting())


def test_a_trial_of_ten_times_the_length_takes_about_as_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.traces.ROWS", 200)
    short, long = lived(tmp_path / "short", 100), lived(tmp_path / "long", 1000)
    once, tenfold = delivered(short, Counting()), delivered(long, (store := Counting()))
    assert tenfold < 2 * once
    assert len(read_trace(long.folder / "trials" / "roles-0000" / "trace.parquet")) == 20_000
    assert store.ended == "FINISHED"
    assert store.values["final/val/error"] == 1 / 1000
    assert store.values["final/effective_lr/median"] == pytest.approx(sum(0.1 / (10 * epoch) for epoch in range(701, 1001)) / 300)
    (record,) = long.records()
    assert (record.metrics, record.seconds) == (store.values, 500.0)


def test_what_a_store_lost_is_sent_again_a_measurement_at_a_time(tmp_path: Path) -> None:
    store = Counting(lost="val/error")
    delivered(lived(tmp_path, 20, layers=2), store)
    assert (store.points["val/error"], store.ended) == (20, "FINISHED")
    assert store.largest < 20


class Losing(Counting):
    """Creates a run whose answer is lost the first time; counts who asks for runs."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.made: list[str] = []

    def create(self, experiment: str, name: str, started: int, tags: Mapping[str, str]) -> str:
        self.made.append(name)
        if len(self.made) == 1:
            raise TrackingUnavailable("no answer")
        return "run-2"

    def runs(self, experiments: Sequence[str], tags: Mapping[str, str]) -> list[Run]:
        self.asked.append(tags["study.trial_id"])
        return [Run("run-1", "RUNNING", {}, {}, {}, 0, None)]


def test_a_run_is_looked_for_only_where_one_may_be_that_the_ledger_does_not_know(tmp_path: Path) -> None:
    outbox, store = Outbox(tmp_path), Losing()
    delivery = Delivery(store, outbox, "0", "parent", StudyIdentity("study-1", "roles", "", "", "solo"), SPEC.objective)
    for trial_id in ("roles-0000", "roles-0001"):
        outbox.start(trial_id, arm="all", trial=SPEC.trial.canonical())
    first, second = ([event for event in outbox.pending(limit=8) if event.trial_id == trial_id] for trial_id in ("roles-0000", "roles-0001"))
    with pytest.raises(TrackingUnavailable):
        delivery.deliver(first)
    assert store.asked == []
    delivery.deliver(first)
    delivery.deliver(second)
    assert (store.asked, store.made) == (["roles-0000"], ["roles-0000", "roles-0001"])
    assert {entry.trial_id: entry.run_id for entry in outbox.entries()} == {"roles-0000": "run-1", "roles-0001": "run-2"}


def test_after_a_crash_a_run_is_looked_for_wherever_the_ledger_knows_none(tmp_path: Path) -> None:
    outbox, store = lived(tmp_path, 1), Losing()
    delivered(outbox, store)
    assert (store.asked, store.made) == (["roles-0000"], [])
