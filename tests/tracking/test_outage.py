"""While the tracking server is away nobody waits for it, and when it is back it hears everything, in order."""

import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from study.errors import TrackingUnavailable
from study.home import StudyFolder
from study.measurement import Ending, Measurement, Outcome
from study.tracking import recorder as recording
from study.tracking.recorder import Recorder
from study.tracking.store import Store
from study.tuning.callbacks import LedgerCallback
from study.tuning.failures import FirstFailures
from study.tuning.status import status
from study.tuning.trainables import ENDING, MEASUREMENT
from study.views import console, study_view
from tests.tracking.scenes import measurement, study_spec
from tests.tracking.test_recorder import all_runs, client

SPEC = study_spec(trial={"schedule": {"epochs": 3}})


class Door:
    """Counts who comes through the door to MLflow, by the name of its thread, and shuts it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.refused = 0
        self.shut = threading.Event()
        whole = Store._asking

        def asking(store: Store) -> Any:
            self.calls[threading.current_thread().name] += 1
            if self.shut.is_set():
                self.refused += 1
                raise TrackingUnavailable("the server is away")
            return whole(store)

        patch.setattr(Store, "_asking", asking)
        for name in ("POLL", "FIRST_PAUSE", "LONGEST_PAUSE"):
            patch.setattr(recording, name, 0.01)


class Tune:
    """What Tune's controller does with trials, by our own callback."""

    def __init__(self, folder: StudyFolder, recorder: Recorder) -> None:
        self.callback = LedgerCallback(recorder.outbox, folder.path, SPEC.objective, FirstFailures(0))

    def trial(self, number: int) -> Any:
        config = {"trial_id": f"roles-{number:04d}", "arm": "optimizer.gamma=none", "trial": SPEC.trial.model_dump_json(), "tags": {}}
        trial = SimpleNamespace(config=config, num_failures=0, max_failures=3, last_result={ENDING: Ending(Outcome.COMPLETED)})
        self.callback.on_trial_start(0, [], trial)
        return trial

    def report(self, trial: Any, measured: Measurement) -> None:
        self.callback.on_trial_result(0, [], trial, {MEASUREMENT: measured})

    def complete(self, trial: Any) -> None:
        self.callback.on_trial_complete(0, [], trial)


@pytest.fixture
def scene(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> tuple[StudyFolder, Recorder, Tune, Door]:
    folder = StudyFolder.prepare(tmp_path, SPEC)
    recorder = Recorder(folder.path, tracking_uri, SPEC, folder.card().study_id, engine="solo")
    recorder.open()
    return folder, recorder, Tune(folder, recorder), Door(monkeypatch)


def shown(document: dict[str, Any]) -> str:
    """`study status` in a terminal."""
    out = console()
    with out.capture() as captured:
        out.print(study_view(document))
    return captured.get()


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_outage_costs_the_study_nothing_and_mlflow_no_point(scene: tuple[StudyFolder, Recorder, Tune, Door]) -> None:
    folder, recorder, tune, door = scene
    recorder.start()
    first = tune.trial(0)
    tune.report(first, measurement(1))
    wait_until(lambda: recorder.outbox.progress()["undelivered"] == 0)
    assert (status(folder)["undelivered"], status(folder)["store"]) == (0, "ok")

    door.shut.set()
    trials = [first, *map(tune.trial, range(1, 5))]
    for epoch in (1, 2, 3):
        for trial in trials:
            tune.report(trial, measurement(epoch))
    for trial in trials:
        tune.complete(trial)
    wait_until(lambda: door.refused >= 3)
    found = status(folder)
    assert (found["undelivered"], found["store"][:13]) == (4 + 4 * 3 + 2 + 5, "silent since ")
    assert shown(found).count("23 events wait for MLflow; the MLflow store is silent since ") == 1
    assert door.calls.keys() == {"recorder"}

    door.shut.clear()
    recorder.close()
    assert (status(folder)["undelivered"], status(folder)["store"]) == (0, "ok")
    assert "MLflow" not in shown(status(folder))
    runs = all_runs(recorder.tracking_uri)
    assert {run.info.status for trial_id, run in runs.items() if trial_id} == {"FINISHED"} and len(runs) == 6
    for trial_id, run in runs.items():
        if trial_id:
            assert [point.step for point in client(recorder.tracking_uri).get_metric_history(run.info.run_id, "val/error")] == [20, 40, 60]
