"""Store: the one door to MLflow, and all that this package asks of it.

    connect(uri) ──> Store ── find, create, log, read back, end ──> Run
                       ├── TrackingUnavailable    no answer: ask again later
                       └── Refused                an answer that will not change

Only `MlflowClient` is used, never the fluent API, whose global state other code in the process may share.
"""

import logging
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from study.errors import NotFound, TrackingUnavailable
from study.tracking.names import masked, metric_name
from study.tracking.summaries import Point

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a dead server would freeze a call for minutes; the recorder asks again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What MLflow is told through the environment, where the user has not said otherwise."""

MOST_METRICS, MOST_WORDS, MOST_BYTES = 800, 100, 300_000
"""Metrics; params, and as many tags; bytes of each kind: together as much as MLflow takes in one request."""

PAGE = 1000
"""Runs in one answer."""

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

MAKING = 600.0
"""Seconds to wait for another process that makes the tables of a SQLite file: some on an idle machine, minutes on a crowded one."""

LOCKED = 20.0
"""Seconds to wait for a SQLite file that another process writes."""

BUSY = "other studies write into this file: run the same command again, or give them a server with PostgreSQL (docs/cluster.md)"
"""What to do where a SQLite file stays locked."""

GATE = 0x57D1
"""Number of the lock that whoever makes the tables of a PostgreSQL store holds."""

PERMANENT = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
"""MLflow's words for answers that asking again does not change."""


STRANGER = "Invalid Host header"
"""What an MLflow server answers to who calls it by a name that it was not told."""


class Refused(TrackingUnavailable):
    """The MLflow store answered, and will not do what was asked."""


@dataclass(frozen=True, slots=True)
class Run:
    """One MLflow run as it is read back."""

    run_id: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """Every metric at its last step."""
    started: int
    """Milliseconds since 1970."""
    ended: int | None


def connect(uri: str) -> "Store":
    """Opens a tracking store and makes it answer once; an empty SQLite file gets its tables.

    Raises:
        TrackingUnavailable: within seconds, if it does not answer.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    path = sqlite_path(uri)
    try:
        with _asking(uri):
            if path is None and (port := DATABASE_PORTS.get(urlsplit(uri).scheme.partition("+")[0])) is not None:
                # MLflow itself would try a silent database for minutes.
                socket.create_connection((urlsplit(uri).hostname or "localhost", urlsplit(uri).port or port), timeout=5).close()
            from mlflow.tracking import MlflowClient

            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            with _one_at_a_time(path) if path is not None else _one_on_postgresql(uri):
                if path is not None:
                    _try_file(path)
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)
    except Refused as error:
        raise TrackingUnavailable(error.problems[0].message, remedy=_remedy(uri)) from None
    return Store(uri, client)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


class Store:
    """An MLflow tracking store that has answered once.

    Raises:
        TrackingUnavailable: from any method, if it does not answer.
        Refused: from any method, if it answers that it cannot be done.
    """

    def __init__(self, uri: str, client: Any) -> None:
        self.uri = uri
        self._client = client

    def experiment(self, name: str) -> str:
        """The id of an experiment; a deleted one is restored, a missing one created. Artifacts lie next to a SQLite store."""
        with self._asking():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                path = sqlite_path(self.uri)
                # No study can have this folder's name: it holds an underscore.
                location = None if path is None else (path.parent / "mlflow_artifacts" / name).as_uri()
                return str(self._client.create_experiment(name, artifact_location=location))
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def experiments(self, name: str | None = None) -> list[str]:
        """The ids of all experiments, or of the one that is named."""
        with self._asking():
            if name is not None:
                found = self._client.get_experiment_by_name(name)
                return [] if found is None or found.lifecycle_stage == "deleted" else [str(found.experiment_id)]
            return [str(experiment.experiment_id) for experiment in self._client.search_experiments()]

    def runs(self, experiments: Sequence[str], tags: Mapping[str, str]) -> list[Run]:
        """The runs that carry these tags, oldest first; `%` stands for any text."""
        query = " and ".join(f"tags.`{name}` {'LIKE' if '%' in value else '='} '{value}'" for name, value in tags.items())
        found: list[Run] = []
        token = None
        with self._asking():
            while True:
                page = self._client.search_runs(list(experiments), query, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token)
                found += [_run(run) for run in page]
                token = page.token
                if not token:
                    return found

    def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFound: if there is none of that id.
        """
        try:
            with self._asking():
                return _run(self._client.get_run(run_id))
        except Refused:
            where = f"in the tracking store {masked(self.uri)}"
            raise NotFound(f"no such run {where} (got {run_id!r})", remedy="check the id and the tracking URI") from None

    def create(self, experiment: str, name: str, started: int, tags: Mapping[str, str]) -> str:
        """Creates a run with its tags, in one request, and returns its id."""
        with self._asking():
            return str(self._client.create_run(experiment, start_time=started, tags=dict(tags), run_name=name).info.run_id)

    def delete(self, run_id: str) -> None:
        """Deletes a run."""
        with self._asking():
            self._client.delete_run(run_id)

    def reopen(self, run: Run, forget: Iterable[str] = ()) -> None:
        """Makes an ended run a running one, without the tags that spoke of its end."""
        self.forget(run.run_id, (name for name in forget if name in run.tags))
        with self._asking():
            if run.status != "RUNNING":
                self._client.update_run(run.run_id, status="RUNNING")

    def forget(self, run_id: str, tags: Iterable[str]) -> None:
        """Removes tags, which the run has."""
        with self._asking():
            for name in tags:
                self._client.delete_tag(run_id, name)

    def log(
        self,
        run_id: str,
        points: Sequence[tuple[Point, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Adds metrics (each with its time in ms), params and tags, in as few requests as MLflow allows."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(metric_name(point.name), point.value, time, point.step) for point, time in points]
        words = [Param(*pair) for pair in (params or {}).items()], [RunTag(*pair) for pair in (tags or {}).items()]
        batches = _batches(metrics, MOST_METRICS), *(_batches(items, MOST_WORDS) for items in words)
        with self._asking():
            for numbers, fields, marks in zip_longest(*batches, fillvalue=()):
                self._client.log_batch(run_id, numbers, fields, marks, synchronous=True)

    def length(self, run_id: str, metric: str) -> int:
        """How many points one series of a run has."""
        with self._asking():
            return len(self._client.get_metric_history(run_id, metric_name(metric)))

    def upload(self, run_id: str, file: Path, folder: str = "") -> None:
        """Adds a file to the artifacts of a run."""
        with self._asking():
            self._client.log_artifact(run_id, str(file), folder or None)

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copies an artifact of a run into a folder.

        Raises:
            NotFound: if the run has no such artifact.
        """
        with self._asking():
            if not any(found.path == artifact for found in self._client.list_artifacts(run_id)):
                raise NotFound(f"run {run_id} has no artifact {artifact}", remedy="artifacts appear when a trial or a study ends")
            return Path(self._client.download_artifacts(run_id, artifact, str(folder)))

    def end(self, run_id: str, status: str, ended: int) -> None:
        """Closes a run: FINISHED, KILLED or FAILED."""
        with self._asking():
            self._client.set_terminated(run_id, status, ended)

    def _asking(self) -> Any:
        return _asking(self.uri)


@contextmanager
def _asking(uri: str) -> Iterator[None]:
    """Turns what MLflow may raise into our two errors, credentials hidden; the cause is not chained, as it holds them."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise _silence(uri, error) from None
    except Exception as error:
        code = getattr(error, "error_code", None)
        if code is None:
            raise
        if code in PERMANENT:
            raise Refused(f"the tracking store {masked(uri)} refused ({_said(error)})", remedy="see its message") from None
        raise _silence(uri, error) from None


def _silence(uri: str, error: Exception) -> TrackingUnavailable:
    reason = _said(error) or type(error).__name__
    if STRANGER in reason:
        name = urlsplit(uri).netloc.rpartition("@")[2]
        remedy = f"start it with --allowed-hosts '{name}' (and every other name with its port by which it is called), or call it by its address"
        return TrackingUnavailable(f"the MLflow server does not let in who calls it {name!r}", where=masked(uri), remedy=remedy)
    busy = sqlite_path(uri) is not None and "locked" in reason
    return TrackingUnavailable(f"the tracking store {masked(uri)} does not answer ({reason})", remedy=BUSY if busy else _remedy(uri))


def _said(error: Exception) -> str:
    return masked(" ".join(str(error).split()))


def _remedy(uri: str) -> str:
    if sqlite_path(uri) is not None:
        return "check that its folder exists and that you may write there, or name another store with --tracking-uri"
    if uri.startswith(("http://", "https://")):
        return "start the server, or name another store with --tracking-uri or MLFLOW_TRACKING_URI"
    return "name a store such as sqlite:///mlflow.db or http://host:5000 with --tracking-uri or MLFLOW_TRACKING_URI"


def _try_file(path: Path) -> None:
    db = sqlite3.connect(path, timeout=LOCKED)
    try:
        db.execute("BEGIN IMMEDIATE")
        db.rollback()
    finally:
        db.close()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process at a time create the tables of a SQLite store: MLflow's first-use migrations race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gate = path.with_name(f"{path.name}.creating")
    if path.exists() and path.stat().st_size and not gate.exists():
        yield
        return
    # Not a lock of SQLite's own: whoever waits for one on a file that is removed meanwhile is told of a disk error.
    with FileLock(gate, timeout=MAKING):
        try:
            yield
        finally:
            with suppress(OSError):
                gate.unlink()


@contextmanager
def _one_on_postgresql(uri: str) -> Iterator[None]:
    """The same for a PostgreSQL database without a server before it; other stores see to themselves."""
    if not uri.startswith("postgresql"):
        yield
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    # Without a transaction: an open one would hold up what makes the tables.
    with create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        # Held by the connection, and gone with it.
        connection.execute(text("select pg_advisory_lock(:gate)"), {"gate": GATE})
        yield


def _batches(items: Sequence[Any], most: int) -> Iterator[list[Any]]:
    """The items in order, in batches that one request can hold."""
    batch: list[Any] = []
    weight = 0
    for item in items:
        # JSON writes a character as at most six bytes, and needs some for the names of fields.
        size = 6 * (len(item.key) + len(str(item.value))) + 100 if isinstance(item.value, str) else len(item.key) + 150
        if batch and (len(batch) == most or weight + size > MOST_BYTES):
            yield batch
            batch, weight = [], 0
        batch.append(item)
        weight += size
    if batch:
        yield batch


def _run(run: Any) -> Run:
    data, info = run.data, run.info
    return Run(info.run_id, info.status, dict(data.tags), dict(data.params), dict(data.metrics), info.start_time, info.end_time)
