"""Facts about the ledger of a study."""

import itertools
import json
import math
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from study.errors import HomeError
from study.measurement import Ending, LayerSample, Measurement, Outcome, finite
from study.tracking.outbox import FILE, Outbox
from tests.tracking.scenes import layer, measurement

COMPLETED = Ending(Outcome.COMPLETED)
INTERRUPTED = Ending(Outcome.INTERRUPTED)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "study")


def started(outbox: Outbox, *trial_ids: str) -> Outbox:
    for trial_id in trial_ids:
        outbox.start(trial_id, arm="all", trial={"optimizer": {"lr": 0.1}})
    return outbox


def test_a_trial_is_remembered_from_its_start_to_its_end(outbox: Outbox) -> None:
    outbox.start("t-0001-r2", arm="optimizer.gamma=last", trial={"seed": 3}, tags={"study.note": "x"}, replicate_of="t-0001")
    outbox.measure("t-0001-r2", Measurement(20, 1, {"val/error": 0.5}, seconds=1.5))
    outbox.measure("t-0001-r2", Measurement(40, 2, {"val/error": 0.25}, seconds=2.0))
    outbox.end("t-0001-r2", Ending(Outcome.STOPPED, "scheduler"), 0.25)
    (record,) = outbox.records()
    assert (record.trial_id, record.arm, record.replicate_of, record.trial) == ("t-0001-r2", "optimizer.gamma=last", "t-0001", {"seed": 3})
    assert (record.outcome, record.reason, record.value) == (Outcome.STOPPED, "scheduler", 0.25)
    assert (record.step, record.epoch, record.seconds, record.metrics) == (40, 2, 3.5, {"val/error": 0.25})


def test_repeating_every_call_changes_nothing(outbox: Outbox) -> None:
    for _ in range(2):
        started(outbox, "a")
        outbox.measure("a", measurement(1))
        outbox.measure("a", measurement(2))
    for _ in range(2):
        outbox.end("a", COMPLETED, 0.25)
        started(outbox, "a")
    assert [event.kind for event in outbox.pending()] == ["start", "measure", "measure", "end"]
    assert [record.outcome for record in outbox.records()] == [Outcome.COMPLETED]


def test_the_first_measurement_at_a_step_counts(outbox: Outbox) -> None:
    started(outbox, "a").measure("a", measurement(1, error=0.5))
    outbox.measure("a", measurement(1, error=0.7))
    assert [past.values["val/error"] for past in outbox.history("a")] == [0.5]


def test_an_interrupted_trial_that_starts_again_is_running_again(outbox: Outbox) -> None:
    started(outbox, "a").measure("a", measurement(1))
    outbox.end("a", INTERRUPTED, 0.5)
    assert outbox.orphans() == []
    started(outbox, "a")
    assert outbox.records() == []
    assert outbox.orphans() == ["a"]
    outbox.measure("a", measurement(2))
    assert [event.kind for event in outbox.pending()] == ["start", "measure", "end", "start", "measure"]


def test_what_is_measured_after_the_end_is_ignored(outbox: Outbox) -> None:
    started(outbox, "a").end("a", COMPLETED, None)
    outbox.measure("a", measurement(1))
    assert outbox.history("a") == []


def test_a_trial_ends_once(outbox: Outbox) -> None:
    started(outbox, "a").end("a", COMPLETED, 0.1)
    outbox.end("a", Ending(Outcome.FAILED, error="Traceback"), None)
    assert [(record.outcome, record.value) for record in outbox.records()] == [(Outcome.COMPLETED, 0.1)]


def test_records_come_in_the_order_of_starting(outbox: Outbox) -> None:
    started(outbox, "b", "a", "c")
    for trial_id in ("c", "a", "b"):
        outbox.end(trial_id, COMPLETED, None)
    assert [record.trial_id for record in outbox.records()] == ["b", "a", "c"]


def test_trials_without_an_outcome_are_running_and_their_last_measurement_is_known(outbox: Outbox) -> None:
    started(outbox, "a", "b").measure("b", measurement(2))
    outbox.end("a", COMPLETED, None)
    (running,) = outbox.running()
    assert (running.trial_id, running.state, running.step, running.epoch) == ("b", "running", 40, 2)
    assert running.metrics["val/error"] == 0.25


def test_history_is_what_was_measured_oldest_first_without_samples(outbox: Outbox) -> None:
    started(outbox, "a").measure("a", measurement(2))
    outbox.measure("a", measurement(1))
    assert [(past.step, past.epoch, past.samples) for past in outbox.history("a")] == [(20, 1, ()), (40, 2, ())]


def test_events_hold_what_was_measured_to_the_last_bit(outbox: Outbox) -> None:
    value = 0.1 + 0.2
    samples = (layer(10, "conv", rotation=math.pi / 7), layer(10, "fc", effective_lr=None))
    started(outbox, "a").measure("a", Measurement(10, 1, {"val/error": value}, samples, 0.25))
    assert outbox.pending()[1].measurement == Measurement(10, 1, {"val/error": value}, samples, 0.25)


def test_samples_of_an_older_ledger_which_lack_the_newest_columns_are_read(outbox: Outbox) -> None:
    sample = layer(10, "conv", source="update")
    started(outbox, "a").measure("a", Measurement(10, 1, {}, (sample,)))
    old = json.dumps([[getattr(sample, name) for name in LayerSample.__slots__[:14]]])
    assert old.endswith('"update"]]')
    outbox._db.execute("UPDATE events SET samples = ? WHERE kind = 'measure'", (old,))
    assert [past.samples for past, _ in outbox.measured("a", before=99)] == [(sample,)]


def test_what_was_measured_before_an_event_is_read_in_the_order_of_steps_while_others_write(outbox: Outbox) -> None:
    started(outbox, "a", "b").measure("a", measurement(2))
    for trial_id in ("b", "a"):
        outbox.measure(trial_id, measurement(1))
    first, *_, last = outbox.pending()
    outbox.measure("a", measurement(3))
    seen = outbox.measured("a", before=last.number + 1)
    past, written = next(seen)
    assert (past, first.time <= written) == (measurement_read(1), True)
    Outbox(outbox.folder).measure("b", measurement(4))
    outbox.end("a", COMPLETED, None)
    assert [past for past, _ in seen] == [measurement_read(2)]
    assert list(outbox.measured("a", before=first.number)) == []


def measurement_read(epoch: int) -> Measurement:
    """A measurement as the ledger gives it back: what is not finite is gone."""
    one = measurement(epoch)
    return replace(one, values=finite(one.values))


def test_what_is_pending_ends_where_its_samples_become_many_and_is_never_empty(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    started(outbox, "a", "b")
    for epoch in range(1, 7):
        outbox.measure("a", measurement(epoch))
    text = len(outbox._db.execute("SELECT samples FROM events WHERE step = 20").fetchone()[0])
    monkeypatch.setattr("study.tracking.outbox.MOST_TEXT", int(2.5 * text))
    numbers = []
    while events := outbox.pending():
        numbers.append([event.number for event in events])
        outbox.mark_delivered(events)
    assert numbers == [[1, 2, 3, 4, 5], [6, 7, 8]]
    outbox.measure("a", measurement(7))
    outbox.measure("a", measurement(8))
    monkeypatch.setattr("study.tracking.outbox.MOST_TEXT", 1)
    assert len(outbox.pending()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_kept(outbox: Outbox, value: float) -> None:
    started(outbox, "a").measure("a", Measurement(20, 1, {"val/loss": value, "val/error": 0.5}))
    outbox.end("a", COMPLETED, value)
    (record,) = outbox.records()
    assert (record.value, record.metrics) == (None, {"val/error": 0.5})


def test_an_event_is_pending_until_it_is_delivered_and_keeps_the_time_of_its_writing(outbox: Outbox) -> None:
    before = time.time_ns() // 1_000_000
    started(outbox, "a", "b").measure("a", measurement(1))
    first = outbox.pending(limit=2)
    assert [(event.trial_id, event.kind) for event in first] == [("a", "start"), ("b", "start")]
    assert before <= first[0].time < first[1].time <= time.time_ns() // 1_000_000 + 1
    assert Outbox(outbox.folder).pending(limit=2) == first
    outbox.mark_delivered(first)
    assert [event.kind for event in outbox.pending()] == ["measure"]
    assert outbox.pending(without=["a"]) == []
    assert outbox.progress()["undelivered"] == 1


def test_progress_counts_trials_by_state_and_arm_and_replicates_apart(outbox: Outbox) -> None:
    for number, arm in enumerate(["x", "y", "x"]):
        outbox.start(f"t-{number}", arm=arm, trial={})
    outbox.start("t-0-r1", arm="x", trial={}, replicate_of="t-0")
    outbox.end("t-0", COMPLETED, 0.1)
    outbox.end("t-1", Ending(Outcome.DIVERGED, "nan"), None)
    progress = outbox.progress()
    assert {state: progress[state] for state in ("completed", "diverged", "running", "stopped", "failed", "interrupted")} == {
        "completed": 1,
        "diverged": 1,
        "running": 1,
        "stopped": 0,
        "failed": 0,
        "interrupted": 0,
    }
    assert list(progress["arms"]) == ["x", "y"]
    assert (progress["arms"]["x"]["completed"], progress["arms"]["x"]["running"], progress["arms"]["y"]["diverged"]) == (1, 1, 1)
    assert progress["replicates"]["running"] == 1


def test_pickling_carries_the_path_alone(outbox: Outbox) -> None:
    started(outbox, "a")
    copy = pickle.loads(pickle.dumps(outbox))
    copy.end("a", COMPLETED, None)
    assert len(outbox.records()) == 1
    assert len(pickle.dumps(outbox)) < 500


def test_two_threads_write_without_losing_or_doubling_anything(outbox: Outbox) -> None:
    def write() -> None:
        for number in range(10):
            started(outbox, f"t-{number}")
            for epoch in range(1, 6):
                outbox.measure(f"t-{number}", measurement(epoch))
        outbox.close()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(outbox.history(f"t-{number}")) for number in range(10)] == [5] * 10
    assert len(outbox.pending(limit=1000)) == 60


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    def opened(outbox: Outbox, together: threading.Barrier) -> list[str]:
        together.wait()
        started(outbox, "a")
        found = outbox.orphans()
        outbox.close()
        return found

    with ThreadPoolExecutor(4) as threads:
        for number in range(40):
            outbox, together = Outbox(tmp_path / str(number)), threading.Barrier(4)
            assert [found.result() for found in [threads.submit(opened, outbox, together) for _ in range(4)]] == [["a"]] * 4


def test_a_killed_process_loses_nothing_that_it_wrote(outbox: Outbox) -> None:
    program = (
        "import os, signal; from pathlib import Path; from study.measurement import Measurement; from study.tracking.outbox import Outbox;"
        f"outbox = Outbox(Path({str(outbox.folder)!r})); outbox.start('a', arm='', trial={{}});"
        "[outbox.measure('a', Measurement(step, step, {'val/error': 0.5})) for step in range(1, 51)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    assert died.returncode == -signal.SIGKILL
    assert outbox.orphans() == ["a"]
    assert [past.step for past in outbox.history("a")] == list(range(1, 51))


def test_another_process_reads_while_one_writes(outbox: Outbox) -> None:
    started(outbox, "a")
    program = f"from pathlib import Path; from study.tracking.outbox import Outbox; print(Outbox(Path({str(outbox.folder)!r})).progress()['running'])"
    with outbox._transaction():
        seen = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "1"


def test_a_call_takes_well_under_a_millisecond_of_processor_time(outbox: Outbox) -> None:
    started(outbox, "a")
    measurements = [measurement(epoch) for epoch in range(1, 301)]
    begin = time.thread_time()
    for one in measurements:
        outbox.measure("a", one)
    assert (time.thread_time() - begin) / len(measurements) < 1e-3


def test_a_ledger_that_is_no_database_is_an_error_that_names_it(outbox: Outbox) -> None:
    outbox.folder.mkdir()
    (outbox.folder / FILE).write_text("not a database, but long enough to be taken for one. " * 50)
    with pytest.raises(HomeError, match=r"outbox\.sqlite: .*cannot be opened"):
        outbox.records()


def test_importing_the_ring_loads_no_heavy_library() -> None:
    program = (
        "import sys; import study.tracking.outbox, study.tracking.recorder, study.tracking.archive;"
        "print([name for name in ('mlflow', 'pandas', 'pyarrow', 'torch', 'ray', 'optuna') if name in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@contextmanager
def a_full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond a size: what a write to a full disk says, without filling one."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def test_a_full_disk_is_an_error_that_says_so_and_damages_nothing(outbox: Outbox) -> None:
    def measure_for_ever() -> None:
        for epoch in itertools.count(1):
            outbox.measure("a", measurement(epoch))

    started(outbox, "a")
    with a_full_disk(400_000), pytest.raises(HomeError, match=r"ledger cannot be written .*free some space"):
        measure_for_ever()
    written = len(outbox.history("a"))
    assert written > 10
    outbox.measure("a", measurement(written + 1))
    outbox.end("a", COMPLETED, 0.5)
    outbox.close()
    again = Outbox(outbox.folder)
    assert [seen.epoch for seen in again.history("a")] == list(range(1, written + 2))
    assert [record.outcome for record in again.records()] == [Outcome.COMPLETED]
    db = sqlite3.connect(outbox.folder / FILE)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def sized(outbox: Outbox) -> None:
    outbox._db.execute("PRAGMA max_page_count = 1")


def unwritable(outbox: Outbox) -> None:
    outbox._db.execute("PRAGMA query_only = 1")


def scratched(outbox: Outbox) -> None:
    outbox.close()
    content = (outbox.folder / FILE).read_bytes()
    (outbox.folder / FILE).write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def replaced(outbox: Outbox) -> None:
    outbox.close()
    (outbox.folder / FILE).unlink()
    (outbox.folder / FILE).mkdir()


@pytest.mark.parametrize(
    ("happens", "complaint"),
    [
        (sized, "cannot be written (database or disk is full); free some space there, then start the study again"),
        (unwritable, "cannot be written (attempt to write a readonly database); see that the disk is mounted for writing"),
        (scratched, "(database disk image is malformed); put back a copy"),
        (replaced, "cannot be opened (unable to open database file); see that the folder is there"),
    ],
)
def test_each_thing_that_keeps_from_writing_has_its_own_remedy(outbox: Outbox, happens: Callable[[Outbox], None], complaint: str) -> None:
    started(outbox, "a")
    happens(outbox)
    with pytest.raises(HomeError) as caught:
        started(outbox, *(f"b{number}" for number in range(300)))
    assert str(caught.value).startswith(f"{outbox.folder / FILE}: the study's ledger ") and complaint in str(caught.value)


def test_a_ledger_that_another_process_holds_is_an_error_that_says_so(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.tracking.outbox.PATIENCE", 0.05)
    started(outbox, "a")
    with closing(sqlite3.connect(outbox.folder / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(HomeError, match=r"cannot be written \(database is locked\); end the other process that holds the file"):
            started(outbox, "b")
    started(outbox, "b")
    assert len(outbox.running()) == 2


def test_a_bug_is_not_blamed_on_the_disk(outbox: Outbox) -> None:
    started(outbox, "a")
    outbox._db.execute("DROP TABLE events")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        started(outbox, "b")


def test_the_first_note_of_a_silence_keeps_its_time_until_the_store_answers(outbox: Outbox) -> None:
    assert outbox.silence() is None
    outbox.note_silence("connection refused")
    first = outbox.silence()
    outbox.note_silence("timed out")
    assert outbox.silence() == first and first is not None and first[1] == "connection refused"
    outbox.note_silence()
    assert outbox.silence() is None
