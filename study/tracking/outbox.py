"""Outbox: the study's ledger, one SQLite file that knows what happened and what MLflow has heard of it.

    start ──> measure ──> measure ──> end            events, each written once, with the time at which it was first written
      └──────────┴───────────┴─────────┴── pending ──> Recorder ──> MLflow ──> mark_delivered

Who writes here never waits for MLflow. Every call is idempotent: repeating it changes nothing, whichever process repeats it.

Journal: WAL with synchronous=NORMAL. Measured on a virtual disk, per call: 0.08 ms; a rollback journal takes 1.0 ms when it syncs, and
0.12 ms when it doesn't, but a power cut may then destroy the file. As chosen, the death of a process loses nothing; a power cut loses
the last moments (at most those since the last checkpoint, about 4 MB of events) and never the file. Readers don't block the writer.
WAL wants all its processes on one machine; where a file system refuses it, SQLite falls back to a rollback journal by itself.
"""

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from study.errors import HomeError
from study.measurement import Ending, LayerSample, Measurement, Outcome, TrialRecord, finite
from study.tracking.remedies import remedy_for

FILE = "outbox.sqlite"
"""The ledger's name in the study's folder."""

PATIENCE = 30.0
"""Seconds that a call waits while another process writes."""

MOST_EVENTS = 4096
"""Events that are delivered at once: each trial among them costs a request, so that few events for each of many trials would be slow."""

MOST_TEXT = 4_000_000
"""Characters of samples that are delivered at once, about; a single measurement may have more."""

RUNNING = "running"
"""The state of a trial without an outcome; a crash leaves it so."""

STATES = (*Outcome, RUNNING)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, trial_id TEXT NOT NULL UNIQUE, arm TEXT NOT NULL, replicate_of TEXT NOT NULL, trial TEXT NOT NULL,
    tags TEXT NOT NULL, outcome TEXT NOT NULL DEFAULT 'running', reason TEXT NOT NULL DEFAULT '', value REAL,
    run_id TEXT NOT NULL DEFAULT '', metrics TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, trial_id TEXT NOT NULL, kind TEXT NOT NULL, time INTEGER NOT NULL, delivered INTEGER NOT NULL DEFAULT 0,
    step INTEGER, epoch INTEGER, seconds REAL, body TEXT NOT NULL, samples TEXT NOT NULL DEFAULT '[]'
);
CREATE UNIQUE INDEX IF NOT EXISTS measured_once ON events (trial_id, kind, step);
CREATE INDEX IF NOT EXISTS undelivered ON events (number) WHERE delivered = 0;
CREATE TABLE IF NOT EXISTS silence (since INTEGER NOT NULL, reason TEXT NOT NULL);
"""

_EVENT = "number, trial_id, kind, time, step, epoch, seconds, body, samples"

_of_sample = attrgetter(*(column.name for column in fields(LayerSample)))

_inherited: list[sqlite3.Connection] = []
"""Connections of a parent process: closing them in a fork could damage the ledger, so they are kept and never touched."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a trial, in the order of happening."""

    number: int
    trial_id: str
    kind: Literal["start", "measure", "end"]
    time: int
    """Milliseconds since 1970 when it was first written; replays send the same."""
    measurement: Measurement | None = None
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A trial as it stands in the ledger, whether or not it has ended."""

    trial_id: str
    arm: str
    replicate_of: str
    trial: Mapping[str, Any]
    """The trial's spec as plain values."""
    tags: Mapping[str, str]
    """More tags for its MLflow run."""
    state: str
    """An outcome, or `running`."""
    reason: str
    value: float | None
    run_id: str
    """Its MLflow run, once there is one."""
    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that its MLflow run holds, once its end is delivered; until then the values of its last measurement."""


def record_of(entry: Entry) -> TrialRecord:
    """An ended trial as it is remembered."""
    return TrialRecord(
        trial_id=entry.trial_id,
        arm=entry.arm,
        outcome=Outcome(entry.state),
        reason=entry.reason,
        trial=entry.trial,
        value=entry.value,
        step=entry.step,
        epoch=entry.epoch,
        metrics=entry.metrics,
        run_id=entry.run_id,
        seconds=entry.seconds,
        replicate_of=entry.replicate_of,
    )


class Outbox:
    """What happened in one study. Threads and processes may share it; pickling it carries the path alone.

    Raises:
        HomeError: from any method, if the ledger cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._local = threading.local()

    def __reduce__(self) -> tuple[object, ...]:
        return (Outbox, (self.folder,))

    def start(self, trial_id: str, *, arm: str, trial: Mapping[str, Any], tags: Mapping[str, str] | None = None, replicate_of: str = "") -> None:
        """A trial begins, or an interrupted one goes on: its outcome is then cleared."""
        with self._transaction() as db:
            row = db.execute("SELECT outcome FROM trials WHERE trial_id = ?", (trial_id,)).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO trials (trial_id, arm, replicate_of, trial, tags) VALUES (?, ?, ?, ?, ?)",
                    (trial_id, arm, replicate_of, json.dumps(trial), json.dumps(dict(tags or {}))),
                )
            elif row[0] == Outcome.INTERRUPTED:
                db.execute("UPDATE trials SET outcome = ?, reason = '', value = NULL, metrics = '' WHERE trial_id = ?", (RUNNING, trial_id))
            else:
                return
            # Later than everything before, so that MLflow's runs, which know milliseconds, sort in the order of starting.
            (last,) = db.execute("SELECT ifnull(max(time), 0) FROM (SELECT time FROM events ORDER BY number DESC LIMIT 1)").fetchone()
            _write(db, trial_id, "start", earliest=last + 1)

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        """A running trial was measured. The first measurement at a step counts; repeated ones, and those after the end, are ignored."""
        samples = json.dumps([_of_sample(sample) for sample in measurement.samples])
        row = trial_id, _now(), measurement.step, measurement.epoch, measurement.seconds, json.dumps(finite(measurement.values)), samples
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO events (trial_id, kind, time, step, epoch, seconds, body, samples)"
                " SELECT ?, 'measure', ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM trials WHERE trial_id = ? AND outcome = ?)",
                (*row, trial_id, RUNNING),
            )

    def end(self, trial_id: str, ending: Ending, value: float | None) -> None:
        """A running trial ends. A trial ends once: later endings are ignored, until it is started again.

        Args:
            value: The objective; kept where it is finite.
        """
        kept = value if value is not None and math.isfinite(value) else None
        with self._transaction() as db:
            done = db.execute(
                "UPDATE trials SET outcome = ?, reason = ?, value = ? WHERE trial_id = ? AND outcome = ?",
                (ending.outcome, ending.reason, kept, trial_id, RUNNING),
            )
            if done.rowcount:
                _write(db, trial_id, "end", json.dumps([ending.outcome, ending.reason, ending.error]))

    def records(self) -> list[TrialRecord]:
        """Every trial that has ended, in the order of starting."""
        return [record_of(entry) for entry in self.entries() if entry.state != RUNNING]

    def ended(self) -> list[str]:
        """The ids of trials that have ended, in the order of ending."""
        rows = self._db.execute(
            "SELECT trial_id FROM events JOIN trials USING (trial_id) WHERE kind = 'end' AND outcome != ? GROUP BY trial_id"
            " ORDER BY max(events.number)",
            (RUNNING,),
        )
        return [trial_id for (trial_id,) in rows]

    def running(self) -> list[Entry]:
        """Every trial without an outcome, in the order of starting, with what it measured last."""
        return [entry for entry in self.entries() if entry.state == RUNNING]

    def orphans(self) -> list[str]:
        """The ids of trials without an outcome: at the start of a process, those that a crash left behind."""
        rows = self._db.execute("SELECT trial_id FROM trials WHERE outcome = ? ORDER BY number", (RUNNING,))
        return [trial_id for (trial_id,) in rows]

    def entries(self, trial_id: str | None = None) -> list[Entry]:
        """Every trial in the order of starting, or the one that is named; empty where there is none."""
        which, named = ("", ()) if trial_id is None else ("AND trial_id = ?", (trial_id,))
        rows = self._db.execute(
            "SELECT * FROM trials LEFT JOIN (SELECT trial_id, max(step) AS step, epoch, sum(seconds) AS seconds, body FROM events"
            f" WHERE kind = 'measure' {which} GROUP BY trial_id) USING (trial_id) WHERE true {which} ORDER BY number",
            (*named, *named),
        )
        return [_entry(row) for row in rows]

    def history(self, trial_id: str) -> list[Measurement]:
        """What a trial measured, oldest first, without its layers' samples."""
        rows = self._db.execute("SELECT step, epoch, body, seconds FROM events WHERE trial_id = ? AND kind = 'measure' ORDER BY step", (trial_id,))
        return [Measurement(step, epoch, json.loads(body), (), seconds) for step, epoch, body, seconds in rows]

    def measured(self, trial_id: str, before: int) -> Iterator[tuple[Measurement, int]]:
        """What a trial measured before the event *before*, in the order of steps, each with its time in ms; one at a time is in memory.

        Between two of them the ledger is not held open, so that whoever reads may take long and may write.
        """
        query = (
            f"SELECT {_EVENT} FROM events WHERE trial_id = ? AND kind = 'measure' AND step > ? AND number < ? ORDER BY step LIMIT 1"  # by its index
        )
        step = -1
        while (row := self._db.execute(query, (trial_id, step, before)).fetchone()) is not None:
            step = row["step"]
            yield _measurement(row), row["time"]

    def pending(self, limit: int = MOST_EVENTS, without: Collection[str] = ()) -> list[Event]:
        """The oldest events that MLflow has not heard of, in order, at most *limit*; those of the trials *without* are left out.

        They end with the one whose samples make MOST_TEXT full.
        """
        left_out = ", ".join("?" * len(without))
        query = f"SELECT {_EVENT} FROM events WHERE delivered = 0 AND trial_id NOT IN ({left_out}) ORDER BY number LIMIT ?"
        found: list[Event] = []
        size = 0
        with closing(self._db.execute(query, (*without, limit))) as rows:
            for row in rows:
                found.append(_event(row))
                size += len(row["samples"])
                if size >= MOST_TEXT:
                    break
        return found

    def mark_delivered(self, events: Sequence[Event]) -> None:
        """MLflow holds these events; they are no longer pending."""
        with self._transaction() as db:
            db.executemany("UPDATE events SET delivered = 1 WHERE number = ?", [(event.number,) for event in events])

    def remember_run(self, trial_id: str, run_id: str) -> None:
        """The MLflow run of a trial."""
        with self._transaction() as db:
            db.execute("UPDATE trials SET run_id = ? WHERE trial_id = ?", (run_id, trial_id))

    def remember_metrics(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """All that the MLflow run of an ended trial holds."""
        with self._transaction() as db:
            db.execute("UPDATE trials SET metrics = ? WHERE trial_id = ? AND outcome != ?", (json.dumps(dict(metrics)), trial_id, RUNNING))

    def note_silence(self, reason: str = "") -> None:
        """The MLflow store does not answer, for this reason; it answers again, without one. The first note of a silence keeps its time."""
        with self._transaction() as db:
            if not reason:
                db.execute("DELETE FROM silence")
            elif db.execute("SELECT 1 FROM silence").fetchone() is None:
                db.execute("INSERT INTO silence VALUES (?, ?)", (_now(), reason))

    def silence(self) -> tuple[int, str] | None:
        """Since when the MLflow store has not answered, in milliseconds since 1970, and why; None where it answered the last time."""
        row = self._db.execute("SELECT since, reason FROM silence").fetchone()
        return (row["since"], row["reason"]) if row else None

    def progress(self) -> dict[str, Any]:
        """How many trials are in which state: `{"completed": 7, ..., "running": 2, "arms": {arm: the same}, "replicates": the same}`.

        Replicates are counted apart. `undelivered` is the number of events that MLflow has not heard of.
        """
        counts = dict.fromkeys(STATES, 0)
        total, replicates = dict(counts), dict(counts)
        arms: dict[str, dict[str, int]] = {}
        groups = "SELECT arm, replicate_of != '', outcome, count(*) FROM trials GROUP BY 1, 2, 3 ORDER BY min(number)"
        for arm, replicate, state, number in self._db.execute(groups):
            for tally in (replicates,) if replicate else (total, arms.setdefault(arm, dict(counts))):
                tally[state] += number
        (undelivered,) = self._db.execute("SELECT count(*) FROM events WHERE delivered = 0").fetchone()
        return {**total, "arms": arms, "replicates": replicates, "undelivered": undelivered}

    def close(self) -> None:
        """Closes this thread's connection; the next call opens another."""
        opened = self._opened
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()
        self._local.opened = None

    @property
    def _opened(self) -> tuple[int, sqlite3.Connection] | None:
        """This thread's connection, and the process that opened it."""
        return getattr(self._local, "opened", None)

    @property
    def _db(self) -> sqlite3.Connection:
        opened = self._opened
        if opened is not None and opened[0] != os.getpid():
            _inherited.append(opened[1])
            opened = None
        if opened is None:
            opened = self._local.opened = (os.getpid(), _open(self.folder))
        return opened[1]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that the block writes, or nothing.

        Raises:
            HomeError: if the disk is full, or the file locked, damaged or not to be written any more.
        """
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite itself gives up some that meet a full disk
                    db.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            if not (remedy := remedy_for(error)):
                raise
            raise HomeError(f"the study's ledger cannot be written ({error})", where=str(self.folder / FILE), remedy=remedy) from error


def _open(folder: Path) -> sqlite3.Connection:
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        db.row_factory = sqlite3.Row
        _write_ahead(db)
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
    except (OSError, sqlite3.Error) as error:
        remedy = remedy_for(error) or "check the disk and your rights to it"
        raise HomeError(f"the study's ledger cannot be opened ({error})", where=str(path), remedy=remedy) from error
    return db


def _write_ahead(db: sqlite3.Connection) -> None:
    """Has the ledger's journal written ahead. SQLite itself does not wait where several that open a new file at once all want to be the one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _write(db: sqlite3.Connection, trial_id: str, kind: str, body: str = "", earliest: int = 0) -> None:
    db.execute("INSERT INTO events (trial_id, kind, time, body) VALUES (?, ?, ?, ?)", (trial_id, kind, max(_now(), earliest), body))


def _event(row: sqlite3.Row) -> Event:
    number, trial_id, kind, written = row["number"], row["trial_id"], row["kind"], row["time"]
    match kind:
        case "measure":
            return Event(number, trial_id, kind, written, measurement=_measurement(row))
        case "end":
            outcome, reason, error = json.loads(row["body"])
            return Event(number, trial_id, kind, written, ending=Ending(Outcome(outcome), reason, error))
    return Event(number, trial_id, kind, written)


def _measurement(row: sqlite3.Row) -> Measurement:
    # By position: fields that LayerSample got since a ledger was written are last, and take their defaults.
    layers = tuple(LayerSample(*sample) for sample in json.loads(row["samples"]))
    return Measurement(row["step"], row["epoch"], json.loads(row["body"]), layers, row["seconds"])


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        trial_id=row["trial_id"],
        arm=row["arm"],
        replicate_of=row["replicate_of"],
        trial=json.loads(row["trial"]),
        tags=json.loads(row["tags"]),
        state=row["outcome"],
        reason=row["reason"],
        value=row["value"],
        run_id=row["run_id"],
        step=row["step"] or 0,
        epoch=row["epoch"] or 0,
        seconds=row["seconds"] or 0.0,
        metrics=json.loads(row["metrics"] or row["body"] or "{}"),
    )
