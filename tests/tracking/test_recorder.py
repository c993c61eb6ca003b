"""Facts about how a study gets into MLflow: once, whole, and without anybody waiting for it."""

import math
import shutil
import socket
import socketserver
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from study.errors import NotFound, TrackingUnavailable
from study.measurement import Ending, Measurement, Outcome
from study.spec import StudySpec
from study.traces import read_trace
from study.tracking import store
from study.tracking.outbox import FILE, Outbox
from study.tracking.recorder import Recorder, add_to_run
from study.tracking.store import MOST_METRICS, connect
from study.tracking.summaries import MOST_POINTS
from tests.tracking.scenes import LAYERS, layer, measurement, study_spec

SPEC = study_spec()

ENDINGS = {
    "roles-0000": Ending(Outcome.COMPLETED),
    "roles-0001": Ending(Outcome.STOPPED, "scheduler"),
    "roles-0002": Ending(Outcome.DIVERGED, "nan"),
    "roles-0003": Ending(Outcome.FAILED, error="Traceback: boom"),
    "roles-0004": Ending(Outcome.INTERRUPTED),
}

TRACE = (
    "step layer role place scale_invariant equilibrated lr weight_decay weight_norm grad_norm effective_lr rotation rotation_expected source"
    " relaxation_time coordinate_rate"
)


def begin(outbox: Outbox, trial_id: str, **more: Any) -> None:
    outbox.start(trial_id, arm="optimizer.gamma=none", trial=SPEC.trial.canonical(), **more)


def live(outbox: Outbox, trial_id: str, ending: Ending | None, epochs: int = 3, **more: Any) -> None:
    """One trial's whole life, or a life without an end."""
    begin(outbox, trial_id, **more)
    for epoch in range(1, epochs + 1):
        outbox.measure(trial_id, measurement(epoch))
    if ending is not None:
        outbox.end(trial_id, ending, 0.5 / epochs if ending.outcome in (Outcome.COMPLETED, Outcome.STOPPED) else None)


def opened(folder: Path, uri: str, spec: StudySpec = SPEC) -> Recorder:
    recorder = Recorder(folder / "roles", uri, spec, "study-1", engine="solo")
    recorder.open()
    return recorder


def delivered(recorder: Recorder, timeout: float | None = None) -> Recorder:
    recorder.start()
    recorder.close(timeout)
    return recorder


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def all_runs(uri: str) -> dict[str, Any]:
    """Every run of a store by trial id, the study's own under the empty name; no id twice."""
    mlflow = client(uri)
    runs = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    named = {run.data.tags.get("study.trial_id", ""): run for run in runs}
    assert len(named) == len(runs)
    return named


def rows(uri: str) -> int:
    """Points of all metrics in a SQLite store."""
    db = sqlite3.connect(uri.removeprefix("sqlite:///"))
    (count,) = db.execute("SELECT count(*) FROM metrics").fetchone()
    db.close()
    return int(count)


@pytest.fixture(scope="module")
def study(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """A study with one trial of every ending, all of it in MLflow, to be looked at only."""
    folder = tmp_path_factory.mktemp("study")
    recorder = opened(folder, f"sqlite:///{shutil.copy(mlflow_database, folder / 'mlflow.db')}")
    for trial_id, ending in ENDINGS.items():
        live(recorder.outbox, trial_id, ending)
    return delivered(recorder)


def test_a_study_is_one_run_with_one_run_for_each_trial_below_it(study: Recorder) -> None:
    runs = all_runs(study.tracking_uri)
    assert set(runs) == {"", *ENDINGS}
    assert runs[""].info.run_id == study.parent
    assert client(study.tracking_uri).get_experiment(runs[""].info.experiment_id).name == "roles"
    for trial_id in ENDINGS:
        assert runs[trial_id].data.tags["mlflow.parentRunId"] == study.parent
        assert runs[trial_id].info.run_name == trial_id
        assert runs[trial_id].info.run_id == study.run_id(trial_id)
    assert study.run_id("roles-9999") is None


def test_every_outcome_has_its_status_and_tags(study: Recorder) -> None:
    runs = all_runs(study.tracking_uri)
    words = ("study.outcome", "study.stop_reason", "study.divergence")
    assert {trial_id: (run.info.status, *(run.data.tags.get(word) for word in words)) for trial_id, run in runs.items() if trial_id} == {
        "roles-0000": ("FINISHED", "completed", None, None),
        "roles-0001": ("KILLED", "stopped", "scheduler", None),
        "roles-0002": ("FAILED", "diverged", None, "nan"),
        "roles-0003": ("FAILED", "failed", None, None),
        "roles-0004": ("KILLED", "interrupted", None, None),
    }


def test_a_trials_run_carries_the_tags_of_its_study_and_its_own(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000-r1", Ending(Outcome.COMPLETED), replicate_of="roles-0000", tags={"study.note": "mine"})
    delivered(recorder)
    runs = all_runs(tracking_uri)
    own = {"study.trial_id": "roles-0000-r1", "study.arm": "optimizer.gamma=none", "study.replicate_of": "roles-0000", "study.note": "mine"}
    shared = {"study.name": "roles", "study.id": "study-1", "study.spec_hash": SPEC.spec_hash(), "study.engine": "solo"}
    assert runs["roles-0000-r1"].data.tags.items() >= {**own, **shared}.items()
    assert runs[""].data.tags.items() >= {**shared, "mlflow.runName": "roles", "mlflow.note.content": SPEC.question}.items()
    assert runs["roles-0000-r1"].data.tags["study.git_commit"] == runs[""].data.tags["study.git_commit"]


def test_params_are_every_field_of_the_trial(study: Recorder) -> None:
    params = all_runs(study.tracking_uri)["roles-0000"].data.params
    assert set(params) == set(SPEC.trial.dotted())
    assert (params["optimizer.gamma"], params["optimizer.lr"], params["optimizer.clip"], params["model.blocks"]) == ("none", "0.1", "null", "[2, 2]")
    assert all_runs(study.tracking_uri)[""].data.params["space.optimizer.gamma"] == '{"choices": ["none", "last"], "role": "scientific"}'


def test_metrics_stand_at_absolute_optimizer_steps(study: Recorder) -> None:
    history = client(study.tracking_uri).get_metric_history
    run_id = study.run_id("roles-0000")
    assert [(point.step, point.value) for point in history(run_id, "val/error")] == [(20, 0.5), (40, 0.25), (60, 0.5 / 3)]
    assert [point.step for point in history(run_id, f"rotation/{LAYERS[0]}")] == [10, 20, 30, 40, 50, 60]
    assert [point.step for point in history(run_id, "val/loss")] == [40, 60]


def test_an_ended_run_has_its_final_and_best_values(study: Recorder) -> None:
    metrics = all_runs(study.tracking_uri)["roles-0001"].data.metrics
    assert metrics["final/val/error"] == metrics["best/val/error"] == 0.5 / 3
    assert metrics["final/rotation/median"] == pytest.approx(math.sqrt((1.0**2 + 1.2**2) / 2))
    assert metrics["final/effective_lr/median"] == pytest.approx((0.1 / 50 + 0.1 / 60) / 2)


def test_no_metric_is_ever_inf_or_nan(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    begin(recorder.outbox, "roles-0000")
    broken = tuple(layer(10, name, weight_norm=math.nan, effective_lr=math.inf, rotation=math.nan) for name in LAYERS)
    recorder.outbox.measure("roles-0000", Measurement(20, 1, {"train/loss": math.inf, "val/error": 0.9}, broken))
    recorder.outbox.end("roles-0000", Ending(Outcome.DIVERGED, "inf"), None)
    delivered(recorder)
    assert all_runs(tracking_uri)["roles-0000"].data.metrics == {
        "val/error": 0.9,
        "final/val/error": 0.9,
        "best/val/error": 0.9,
        "final/equilibrated": 0.0,
    }


def test_the_trace_is_a_table_with_one_row_for_each_layer_and_sample(study: Recorder) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(study.outbox.folder / "trials" / "roles-0002" / "trace.parquet")
    assert table.column_names == TRACE.split()
    assert (table.num_rows, str(table.schema.field("step").type), str(table.schema.field("rotation_expected").type)) == (12, "int64", "double")
    assert table.to_pylist()[1]["rotation_expected"] is None
    assert [artifact.path for artifact in client(study.tracking_uri).list_artifacts(study.run_id("roles-0002"))] == ["spec.yaml", "trace.parquet"]


def test_a_failed_trial_keeps_its_traceback_and_any_file_of_its_own(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    own = recorder.outbox.folder / "trials" / "roles-0000" / "artifacts" / "plots"
    own.mkdir(parents=True)
    (own / "loss.txt").write_text("1 2 3")
    live(recorder.outbox, "roles-0000", Ending(Outcome.FAILED, error="Traceback: boom"))
    delivered(recorder)
    found = client(tracking_uri).download_artifacts(recorder.run_id("roles-0000"), "traceback.txt")
    assert Path(found).read_text() == "Traceback: boom"
    assert client(tracking_uri).download_artifacts(recorder.run_id("roles-0000"), "plots/loss.txt").endswith("loss.txt")


def test_medians_over_all_layers_are_marked(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", Ending(Outcome.COMPLETED))
    begin(recorder.outbox, "roles-0001")
    recorder.outbox.measure("roles-0001", Measurement(10, 1, {"val/error": 0.5}, (layer(10, "fc"),)))
    recorder.outbox.end("roles-0001", Ending(Outcome.COMPLETED), 0.5)
    delivered(recorder)
    assert [all_runs(tracking_uri)[trial_id].data.tags.get("study.traced") for trial_id in ("roles-0000", "roles-0001")] == [None, "all"]


def test_the_ledger_learns_run_ids_and_all_metrics(study: Recorder) -> None:
    runs = all_runs(study.tracking_uri)
    records = study.outbox.records()
    assert len(records) == len(ENDINGS)
    for record in records:
        assert (record.run_id, record.metrics) == (runs[record.trial_id].info.run_id, runs[record.trial_id].data.metrics)
    assert study.outbox.progress()["undelivered"] == 0


@pytest.mark.parametrize("knows_its_runs", [True, False])
def test_replaying_everything_adds_no_run_and_no_point(tracking_uri: str, tmp_path: Path, knows_its_runs: bool) -> None:
    recorder = opened(tmp_path, tracking_uri)
    for trial_id, ending in ENDINGS.items():
        live(recorder.outbox, trial_id, ending)
    crashed = tmp_path / "crashed" / "roles"
    crashed.mkdir(parents=True)
    if knows_its_runs:
        delivered(recorder)
    copied(recorder.outbox, crashed)
    if knows_its_runs:
        undelivered(crashed)
    else:
        delivered(recorder)
    before, number = {name: run.to_dictionary() for name, run in all_runs(tracking_uri).items()}, rows(tracking_uri)
    delivered(opened(tmp_path / "crashed", tracking_uri))
    after = {name: run.to_dictionary() for name, run in all_runs(tracking_uri).items()}
    assert rows(tracking_uri) == number
    assert after == before


def copied(outbox: Outbox, folder: Path) -> None:
    """The ledger as a crash at this moment would leave it."""
    source, target = sqlite3.connect(outbox.folder / FILE), sqlite3.connect(folder / FILE)
    source.backup(target)
    source.close()
    target.close()


def undelivered(folder: Path) -> None:
    """A ledger that has not heard of its deliveries."""
    db = sqlite3.connect(folder / FILE)
    db.execute("UPDATE events SET delivered = 0")
    db.commit()
    db.close()


def test_an_interrupted_trial_goes_on_in_its_own_run(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", Ending(Outcome.INTERRUPTED), epochs=2)
    delivered(recorder)
    first = all_runs(tracking_uri)["roles-0000"]
    again = opened(tmp_path, tracking_uri)
    begin(again.outbox, "roles-0000")
    delivered(again)
    running = all_runs(tracking_uri)["roles-0000"]
    assert (running.info.run_id, running.info.status, running.data.tags.get("study.outcome")) == (first.info.run_id, "RUNNING", None)
    live(again.outbox, "roles-0000", Ending(Outcome.COMPLETED), epochs=4)
    delivered(again)
    ended = all_runs(tracking_uri)["roles-0000"]
    assert (ended.info.run_id, ended.info.status, ended.data.tags["study.outcome"]) == (first.info.run_id, "FINISHED", "completed")
    assert [point.step for point in client(tracking_uri).get_metric_history(first.info.run_id, "val/error")] == [20, 40, 60, 80]


def test_the_same_study_opens_the_same_run_again(tracking_uri: str, tmp_path: Path) -> None:
    first = opened(tmp_path, tracking_uri)
    first.finish("interrupted")
    assert all_runs(tracking_uri)[""].info.status == "KILLED"
    longer = study_spec(search={"trials": 8})
    assert opened(tmp_path, tracking_uri, longer).parent == first.parent
    run = all_runs(tracking_uri)[""]
    assert (run.info.status, run.data.tags["study.trials"]) == ("RUNNING", "8")


def test_a_deleted_experiment_is_restored(tracking_uri: str, tmp_path: Path) -> None:
    first = opened(tmp_path, tracking_uri)
    experiment = all_runs(tracking_uri)[""].info.experiment_id
    client(tracking_uri).delete_experiment(experiment)
    assert opened(tmp_path, tracking_uri).parent == first.parent
    assert client(tracking_uri).get_experiment(experiment).lifecycle_stage == "active"


@pytest.mark.parametrize("deleted", [True, False])
def test_a_study_whose_runs_are_not_in_the_store_says_what_to_do(tracking_uri: str, mlflow_database: Path, tmp_path: Path, deleted: bool) -> None:
    """They were deleted by hand, or another store was named: going on would begin a second history."""
    recorder = opened(tmp_path, tracking_uri)
    for number in range(3):
        live(recorder.outbox, f"roles-000{number}", Ending(Outcome.COMPLETED))
    delivered(recorder)
    run_id, uri = recorder.run_id("roles-0001"), tracking_uri
    if deleted:
        client(tracking_uri).delete_run(run_id)
    else:
        uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'other.db')}"
    said = rf"{1 if deleted else 3} of 3 runs of this study are not in the tracking store .*--tracking-uri.*restore_run"
    with pytest.raises(NotFound, match=said):
        opened(tmp_path, uri)
    if deleted:
        client(tracking_uri).restore_run(run_id)
    assert opened(tmp_path, tracking_uri).parent == recorder.parent


def test_artifacts_lie_next_to_a_sqlite_store(study: Recorder) -> None:
    location = all_runs(study.tracking_uri)["roles-0000"].info.artifact_uri
    assert location.startswith((study.outbox.folder.parent / "mlflow_artifacts" / "roles").as_uri())


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("interrupted", "KILLED"), ("failed", "FAILED")])
def test_a_study_is_finished_with_its_artifacts_metrics_and_verdicts(tracking_uri: str, tmp_path: Path, state: Any, status: str) -> None:
    recorder = opened(tmp_path, tracking_uri)
    (tmp_path / "best.yaml").write_text("trial_id: roles-0000")
    recorder.finish(state, [tmp_path / "best.yaml"], {"best/val/error": 0.1, "broken": math.nan}, {"grows": "confirmed"})
    run = all_runs(tracking_uri)[""]
    assert (run.info.status, run.data.metrics, run.data.tags["study.claim.grows"]) == (status, {"best/val/error": 0.1}, "confirmed")
    assert [artifact.path for artifact in client(tracking_uri).list_artifacts(recorder.parent)] == ["best.yaml"]


def test_verdicts_take_the_place_of_those_before(tracking_uri: str, tmp_path: Path) -> None:
    """A claim that is no longer made has no verdict any more; the user's own tags are none of ours."""
    recorder = opened(tmp_path, tracking_uri)

    def said() -> dict[str, str]:
        return {name: text for name, text in all_runs(tracking_uri)[""].data.tags.items() if "claim" in name}

    mine = {"claimed.by": "me", "study.claims": "two"}
    for name, text in mine.items():
        client(tracking_uri).set_tag(recorder.parent, name, text)
    recorder.finish("finished", verdicts={"grows": "confirmed", "shrinks": "refuted"})
    assert said() == {**mine, "study.claim.grows": "confirmed", "study.claim.shrinks": "refuted"}
    again = opened(tmp_path, tracking_uri)
    again.finish("interrupted")
    assert said() == {**mine, "study.claim.grows": "confirmed", "study.claim.shrinks": "refuted"}
    again.finish("finished", verdicts={"grows": "inconclusive"})
    assert said() == {**mine, "study.claim.grows": "inconclusive"}
    add_to_run(tracking_uri, recorder.parent, [], {"shrinks": "confirmed"})
    assert said() == {**mine, "study.claim.shrinks": "confirmed"}
    add_to_run(tracking_uri, recorder.parent, [], {})
    assert said() == mine and all_runs(tracking_uri)[""].info.status == "FINISHED"


def test_a_run_that_a_lost_answer_left_behind_is_deleted(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", Ending(Outcome.COMPLETED))
    delivered(recorder)
    tags = {"study.id": "study-1", "study.trial_id": "roles-0000"}
    client(tracking_uri).create_run(all_runs(tracking_uri)[""].info.experiment_id, tags=tags)
    delivered(recorder)
    assert all_runs(tracking_uri)["roles-0000"].info.run_id == recorder.run_id("roles-0000")


def test_a_trial_that_mlflow_refuses_does_not_keep_the_others_away(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", None)
    delivered(recorder)
    client(tracking_uri).delete_run(recorder.run_id("roles-0000"))
    recorder.outbox.end("roles-0000", Ending(Outcome.COMPLETED), 0.1)
    live(recorder.outbox, "roles-0001", Ending(Outcome.COMPLETED))
    with pytest.raises(TrackingUnavailable, match=r"1 events of roles-0000 are not in MLflow yet .*refused"):
        delivered(recorder)
    assert all_runs(tracking_uri)["roles-0001"].info.status == "FINISHED"
    client(tracking_uri).restore_run(recorder.run_id("roles-0000"))
    delivered(recorder)
    assert all_runs(tracking_uri)["roles-0000"].info.status == "FINISHED"


def test_what_mlflow_lost_is_sent_again_before_a_run_is_closed(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", None)
    delivered(recorder)
    db = sqlite3.connect(tracking_uri.removeprefix("sqlite:///"))
    for table in ("metrics", "latest_metrics"):
        db.execute(f"DELETE FROM {table} WHERE key LIKE 'rotation/%'")
    db.commit()
    db.close()
    recorder.outbox.end("roles-0000", Ending(Outcome.COMPLETED), 0.1)
    delivered(recorder)
    assert len(client(tracking_uri).get_metric_history(recorder.run_id("roles-0000"), "rotation/median")) == 6


def test_more_than_a_request_holds_arrives_whole(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    begin(recorder.outbox, "roles-0000")
    samples = tuple(layer(step, f"conv{number}") for step in range(1, 41) for number in range(20))
    recorder.outbox.measure("roles-0000", Measurement(40, 1, {"val/error": 0.5}, samples))
    recorder.outbox.end("roles-0000", Ending(Outcome.COMPLETED), 0.5)
    delivered(recorder)
    assert rows(tracking_uri) > 2 * MOST_METRICS
    assert len(client(tracking_uri).get_metric_history(recorder.run_id("roles-0000"), "rotation/conv19")) == 40


def test_long_series_reach_mlflow_thinned_with_their_extremes_and_replays_send_the_same(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    begin(recorder.outbox, "roles-0000")
    rotations = [Random(step).random() for step in range(400)]
    samples = tuple(layer(step, "conv", rotation=rotation) for step, rotation in enumerate(rotations, start=1))
    recorder.outbox.measure("roles-0000", Measurement(400, 1, {"val/error": 0.5}, samples))
    recorder.outbox.end("roles-0000", Ending(Outcome.COMPLETED), 0.5)
    (tmp_path / "crashed" / "roles").mkdir(parents=True)
    copied(recorder.outbox, tmp_path / "crashed" / "roles")
    delivered(recorder)
    values = [point.value for point in client(tracking_uri).get_metric_history(recorder.run_id("roles-0000"), "rotation/conv")]
    assert 40 <= len(values) <= MOST_POINTS // SPEC.trial.schedule.epochs == 50
    assert (min(values), max(values)) == (min(rotations), max(rotations))
    assert len(read_trace(recorder.outbox.folder / "trials" / "roles-0000" / "trace.parquet")) == 400
    number = rows(tracking_uri)
    delivered(opened(tmp_path / "crashed", tracking_uri))
    assert rows(tracking_uri) == number


def test_a_file_can_be_attached_to_the_run_of_an_ended_trial(tracking_uri: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, tracking_uri)
    live(recorder.outbox, "roles-0000", Ending(Outcome.COMPLETED))
    delivered(recorder)
    for text in ("old", "new"):
        (tmp_path / "picture.svg").write_text(text)
        recorder.attach("roles-0000", tmp_path / "picture.svg")
    found = client(tracking_uri).download_artifacts(recorder.run_id("roles-0000"), "picture.svg")
    assert Path(found).read_text() == "new"
    assert all_runs(tracking_uri)["roles-0000"].info.status == "FINISHED"
    with pytest.raises(NotFound, match=r"no run in MLflow \(got 'roles-9999'\)"):
        recorder.attach("roles-9999", tmp_path / "picture.svg")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_store_that_does_not_answer_is_an_error_within_seconds_and_hides_the_password(scheme: str, tmp_path: Path) -> None:
    uri = f"{scheme}://ann:hush@127.0.0.1:{closed_port()}/x"
    start = time.monotonic()
    with pytest.raises(TrackingUnavailable, match="does not answer") as caught:
        opened(tmp_path, uri)
    assert time.monotonic() - start < 30  # MLflow's own patience is minutes
    assert "ann:***@127.0.0.1" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "--tracking-uri" in caught.value.problems[0].remedy


def test_a_sqlite_file_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingUnavailable, match=r"mlflow\.db does not answer.*writ"):
        opened(tmp_path, f"sqlite:///{tmp_path}/file/mlflow.db")


@pytest.mark.parametrize("uri", ["ftp://host/x", "./mlruns", "nonsense"])
def test_a_store_of_an_unknown_kind_is_an_error_that_says_what_to_use(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingUnavailable, match=r"sqlite:///mlflow\.db"):
        opened(tmp_path, uri)


def test_an_empty_file_gets_its_tables_once(tmp_path: Path, mlflow_database: Path) -> None:
    assert mlflow_database.stat().st_size > 100_000
    assert [path.name for path in mlflow_database.parent.iterdir()] == [mlflow_database.name]
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    assert connect(f"sqlite:///{tmp_path}/mlflow.db").experiments() == ["0"]


class Line(socketserver.ThreadingTCPServer):
    """A line to a server that can be cut and mended."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.cut = threading.Event()
        self.refused = threading.Event()
        super().__init__(("127.0.0.1", 0), _Talk)


class _Talk(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        line: Line = self.server  # type: ignore[assignment]
        if line.cut.is_set():
            line.refused.set()
            return
        host, port = line.upstream.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as server:
            answers = threading.Thread(target=_pass_on, args=(server, self.request), daemon=True)
            answers.start()
            _pass_on(self.request, server, line.cut)
            answers.join()


def _pass_on(source: socket.socket, target: socket.socket, cut: threading.Event | None = None) -> None:
    while data := source.recv(65536):
        if cut is not None and cut.is_set():
            break
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


@pytest.fixture
def line(mlflow_server: str) -> Iterator[Line]:
    with Line(mlflow_server) as line:
        thread = threading.Thread(target=line.serve_forever)
        thread.start()
        yield line
        line.shutdown()
        thread.join()


def test_through_a_real_server_that_goes_away_nothing_is_lost_and_nothing_doubled(line: Line, mlflow_server: str, tmp_path: Path) -> None:
    recorder = opened(tmp_path, f"http://127.0.0.1:{line.server_address[1]}")
    live(recorder.outbox, "roles-0000", Ending(Outcome.COMPLETED))
    delivered(recorder)

    line.cut.set()
    live(recorder.outbox, "roles-0001", Ending(Outcome.STOPPED, "scheduler"))
    with pytest.raises(TrackingUnavailable, match=r"5 events are not in MLflow yet .*nothing is lost"):
        delivered(recorder, timeout=0.2)

    recorder.start()
    assert line.refused.wait(60)
    line.cut.clear()
    recorder.close()
    recorder.finish("finished")
    runs = all_runs(mlflow_server)
    assert {trial_id: run.info.status for trial_id, run in runs.items()} == {"": "FINISHED", "roles-0000": "FINISHED", "roles-0001": "KILLED"}
    history = client(mlflow_server).get_metric_history(recorder.run_id("roles-0001"), "val/error")
    assert [point.step for point in history] == [20, 40, 60]
    assert Path(client(mlflow_server).download_artifacts(recorder.run_id("roles-0001"), "trace.parquet", str(tmp_path))).stat().st_size > 0


def test_a_sqlite_file_that_stays_locked_says_what_to_do(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCKED", 0.1)
    with sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingUnavailable, match=r"is locked\); other studies write into this file: run the same command again, or give them a"):
            connect(tracking_uri)
        other.rollback()
    connect(tracking_uri)


def test_whoever_waits_for_the_tables_of_a_sqlite_file_goes_on_once_they_are_there(tmp_path: Path) -> None:
    """The gate is removed by the first while the others wait at it."""
    path, made, inside = tmp_path / "mlflow.db", [], threading.Lock()

    def enter() -> None:
        with store._one_at_a_time(path):
            if not path.exists():
                with inside:
                    time.sleep(0.2)
                    made.append(path.write_bytes(b"tables"))

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert made == [6]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db"]
