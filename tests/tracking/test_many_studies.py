"""A real PostgreSQL behind MLflow, and eight studies at once on one store: nothing is lost, nothing is doubled.

Debian's PostgreSQL is started on loopback as another user, as it refuses root; where its programs are missing, tests are skipped.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from study.tracking.recorder import Recorder
from tests.conftest import ROOT, own_environment, run_study, serving
from tests.tracking.scenes import study_spec

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STUDIES, TRIALS, EPOCHS = 8, 4, 5

WRITER = """
import sys, time
from pathlib import Path
from study.measurement import Ending, Outcome
from study.tracking.recorder import Recorder
from tests.tracking.scenes import measurement, study_spec

folder, uri, name, trials, epochs = Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:])
spec = study_spec(name=name)
recorder = Recorder(folder / name, uri, spec, f"{name}-id", engine="solo")
print("ready", flush=True)
sys.stdin.readline()
recorder.open()
recorder.start()
for number in range(trials):
    recorder.outbox.start(f"{name}-{number:04d}", arm="optimizer.gamma=none", trial=spec.trial.canonical())
for epoch in range(1, epochs + 1):
    for number in range(trials):
        recorder.outbox.measure(f"{name}-{number:04d}", measurement(epoch))
    time.sleep(0.1)
for number in range(trials):
    recorder.outbox.end(f"{name}-{number:04d}", Ending(Outcome.COMPLETED), 0.5 / epochs)
recorder.close()
recorder.finish("finished")
"""
"""One study without training: its ledger fills while its recorder brings it to MLflow."""


def binaries() -> Path | None:
    """Where the programs of the newest PostgreSQL are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URI of a PostgreSQL server of this module's own, without a database."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if os.getuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL refuses root, and there is no runuser to become another user")
    as_somebody = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    # Not below pytest's folder, into which nobody else may look.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        if as_somebody:
            shutil.chown(folder, "nobody")
        data = folder / "data"
        subprocess.run([*as_somebody, programs / "initdb", "-D", data, "-U", "mlflow", "-A", "trust"], check=True, capture_output=True, cwd="/")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c max_connections=200"
        control = [*as_somebody, programs / "pg_ctl", "-D", data]
        subprocess.run([*control, "-w", "-o", options, "-l", folder / "log", "start"], check=True, capture_output=True, cwd="/")
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}"
        finally:
            subprocess.run([*control, "-w", "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    finally:
        shutil.rmtree(folder)


def database(server: str, name: str) -> str:
    """The URI of a new, empty database."""
    import psycopg

    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'create database "{name}"')
    return f"{server}/{name}"


def write_at_once(folder: Path, uri: str, names: list[str]) -> None:
    """Runs a study for each name, in processes that begin at the same moment."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER, str(folder), uri]
    writers = [
        subprocess.Popen(
            [*command, name, str(TRIALS), str(EPOCHS)],
            cwd=ROOT,
            env=own_environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, said = writer.communicate(timeout=600)
        assert writer.returncode == 0, said


def remembered(uri: str, name: str) -> dict[str, Any]:
    """What MLflow holds of a study: status, params and every point of every trial, by trial; the study's own run is ''."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        trial = run.data.tags.get("study.trial_id", "").removeprefix(name)
        assert trial not in found, "one run for each trial"
        points = {metric: sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)) for metric in run.data.metrics}
        found[trial] = (run.info.status, dict(run.data.params), points)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one study leaves that is alone on a SQLite file."""
    folder = tmp_path_factory.mktemp("alone")
    write_at_once(folder, f"sqlite:///{folder}/mlflow.db", ["alone"])
    found = remembered(f"sqlite:///{folder}/mlflow.db", "alone")
    assert len(found) == TRIALS + 1
    assert {status for status, _, _ in found.values()} == {"FINISHED"}
    assert all(len(points["train/loss"]) == EPOCHS for trial, (_, _, points) in found.items() if trial)
    return found


NAMES = [f"study-{number}" for number in range(STUDIES)]


def test_eight_studies_at_once_lose_nothing_on_a_server_with_postgresql(postgresql: str, alone: dict[str, Any], tmp_path: Path) -> None:
    with serving(database(postgresql, "served"), tmp_path, "--artifacts-destination", str(tmp_path / "artifacts")) as uri:
        write_at_once(tmp_path, uri, NAMES)
        assert [name for name in NAMES if remembered(uri, name) != alone] == []


def test_eight_studies_at_once_make_the_tables_of_an_empty_postgresql_once(postgresql: str, alone: dict[str, Any], tmp_path: Path) -> None:
    uri = database(postgresql, "direct")
    write_at_once(tmp_path, uri, NAMES)
    assert [name for name in NAMES if remembered(uri, name) != alone] == []


def test_eight_studies_at_once_lose_nothing_on_one_sqlite_file(alone: dict[str, Any], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_at_once(tmp_path, uri, NAMES)
    assert [name for name in NAMES if remembered(uri, name) != alone] == []


def test_a_study_has_the_same_results_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    spec = tmp_path / "same.yaml"
    spec.write_text(
        "name: same\ntrial:\n  data: {train_size: 320}\n  model: {name: mlp, width: 16}\n  schedule: {epochs: 3}\n  trace: {every: 2}\n"
        "space:\n  optimizer.lr: {low: 1e-2, high: 1, log: true}\nsearch: {sampler: random, trials: 4}\nresources: {engine: solo}\n"
    )
    with serving(database(postgresql, "same"), tmp_path, "--artifacts-destination", str(tmp_path / "artifacts")) as server:
        for home, options in (("sqlite", ()), ("postgresql", ("--tracking-uri", server))):
            run_study("run", str(spec), "--home", str(tmp_path / home), *options, timeout=400)
        files = f"sqlite:///{tmp_path}/sqlite/mlflow.db"
        ours, theirs = remembered(files, "same"), remembered(server, "same")
        assert not (tmp_path / "postgresql" / "mlflow.db").exists()
    assert len(theirs) == 5
    timed = ("seconds",)  # wall times differ
    for trial, (status, params, points) in ours.items():
        assert (status, params) == theirs[trial][:2]
        assert {name for name in points if not name.endswith(timed)} == {name for name in theirs[trial][2] if not name.endswith(timed)}
        assert all(points[name] == theirs[trial][2][name] for name in points if not name.endswith(timed)), trial
    tables = [pd.read_parquet(tmp_path / home / "same" / "trials.parquet").set_index("trial_id").sort_index() for home in ("sqlite", "postgresql")]
    differing = [column for column in tables[0] if column not in ("seconds", "run_id") and not tables[0][column].equals(tables[1][column])]
    assert differing == []


def services(**values: str) -> dict[str, dict[str, Any]]:
    """The services of the compose file, with these variables in it."""

    def replaced(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found[1], found[2])

    text = (ROOT / "examples" / "services" / "compose.yaml").read_text("utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(re.sub(r"\$\$|\$\{(\w+):[-?]([^}]*)\}", replaced, text))["services"]
    return found


def test_what_the_compose_file_runs_works_together(postgresql: str, tmp_path: Path) -> None:
    """Its commands with its settings, in its order, on this machine in place of containers."""
    from mlflow import MlflowClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    described = services(POSTGRES_PASSWORD="secret", MLFLOW_ALLOWED_HOSTS=f"localhost:{port},127.0.0.1:{port}")
    tables, server = described["tables"], described["mlflow"]
    assert tables["environment"] == server["environment"]
    name, here = described["db"]["environment"]["POSTGRES_DB"], postgresql.partition("@")[2]
    settings = {**server["environment"], "MLFLOW_BACKEND_STORE_URI": server["environment"]["MLFLOW_BACKEND_STORE_URI"].replace("@db/", f"@{here}/")}
    assert settings["MLFLOW_BACKEND_STORE_URI"] == f"postgresql://mlflow:secret@{here}/{name}"
    ready = described["db"]["healthcheck"]["test"][1].replace("127.0.0.1", f"127.0.0.1 --port {here.partition(':')[2]}")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{binaries()}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        **settings,
    }
    database(postgresql, name)

    def runs(*command: str) -> bool:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True).returncode == 0

    assert runs("sh", "-c", ready)
    assert runs(*tables["command"])
    own = {"5000": port, "/artifacts": str(tmp_path / "artifacts")}
    command = [own.get(word, word) for word in server["command"]]
    running = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        kind, *check = (word.replace("5000", port) for word in server["healthcheck"]["test"])
        assert kind == "CMD"
        while not runs(*check):
            assert running.poll() is None
        client = MlflowClient(f"http://127.0.0.1:{port}")
        run = client.create_run(client.create_experiment("served")).info.run_id
        client.log_text(run, "kept", "note.txt")
        assert [path.read_text() for path in (tmp_path / "artifacts").rglob("note.txt")] == ["kept"]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/api/3.0/mlflow/server-info", headers={"Host": "head:5000"}))
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_a_recorder_on_postgresql_says_when_it_is_not_there(tmp_path: Path) -> None:
    from study.errors import TrackingUnavailable

    with pytest.raises(TrackingUnavailable, match="does not answer"):
        Recorder(tmp_path / "roles", "postgresql://me@127.0.0.1:1/mlflow", study_spec(), "roles-1", engine="solo").open()
