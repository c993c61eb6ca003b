"""Facts about trace.parquet: nobody sees half of it, a crash keeps what was written, and no run is too long for it."""

import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import study
from study.errors import InputError, NotFound
from study.measurement import LayerSample
from study.traces import GROUP, ROWS, TraceFile, read_trace, write_trace
from tests.conftest import ROOT

COLUMNS = [column.name for column in fields(LayerSample)]


def row(step: int, layer: str = "conv", **more: Any) -> LayerSample:
    """A sample whose rotation tells its step."""
    known: dict[str, Any] = {"rotation": float(step), "rotation_expected": None, "effective_lr": 0.1, "source": "update", **more}
    return LayerSample(step, layer, "weight", "inner", True, False, 0.1, 5e-4, 2.0, 0.5, **known)


def sample(step: int, layers: Iterable[str] = ("conv", "fc"), **more: Any) -> dict[str, LayerSample]:
    """What a tracer says at one step."""
    return {layer: row(step, layer, **more) for layer in layers}


def steps_of(path: Path, layer: str = "conv") -> list[int]:
    table = read_trace(path)
    return [int(step) for step in table[table["layer"] == layer]["step"]]


def abandoned(path: Path, steps: Iterable[int]) -> Path:
    """What a process leaves behind that is killed after each of these steps was handed over; returns the unfinished file."""
    trace = TraceFile(path)
    for step in steps:
        trace.append(sample(step))
        trace.flush()
    trace._stream.close()
    return path.with_name(f"{path.name}.unfinished")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.parquet"


def test_columns_are_the_fields_of_a_sample_in_their_order(path: Path) -> None:
    write_trace(path, [row(10), row(20, relaxation_time=99.0, coordinate_rate=0.5)])
    table = read_trace(path)
    assert list(table.columns) == COLUMNS
    assert COLUMNS[13:] == ["source", "relaxation_time", "coordinate_rate"]
    assert tuple(table.iloc[1])[:10] == astuple(row(20))[:10]
    assert (table["relaxation_time"].isna().tolist(), table["coordinate_rate"][1]) == ([True, False], 0.5)
    pd.testing.assert_frame_equal(table, pd.read_parquet(path))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(path: Path, broken: float) -> None:
    write_trace(path, [row(10, rotation=broken, effective_lr=broken), row(20)])
    with TraceFile(path) as trace:
        trace.append({"conv": row(30, rotation=broken, effective_lr=broken)})
    table = pq.read_table(path)
    assert [(table[name].null_count, table["rotation"].to_pylist()) for name in ("rotation", "effective_lr")] == [(2, [None, 20.0, None])] * 2


def test_a_trace_without_samples_is_an_empty_table(path: Path) -> None:
    write_trace(path, [])
    assert (len(read_trace(path)), list(read_trace(path).columns)) == (0, COLUMNS)
    with TraceFile(path.with_name("mine.parquet")):
        pass
    assert len(read_trace(path.with_name("mine.parquet"))) == 0


def test_rows_come_in_groups_of_bounded_size(path: Path) -> None:
    write_trace(path, (row(step) for step in range(1, GROUP + 101)))
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [GROUP, 100]
    assert file.read(["step"])["step"].to_pylist() == list(range(1, GROUP + 101))


def test_a_long_trace_is_written_and_continued_in_the_memory_of_a_short_one(tmp_path: Path) -> None:
    def most(rows: int) -> tuple[int, int]:
        path = tmp_path / f"{rows}.parquet"
        tracemalloc.start()
        write_trace(path, (row(step) for step in range(rows)))
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with TraceFile(path) as trace:
            for step in range(rows, 2 * rows):
                trace.append({"conv": row(step)})
        appended = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pq.read_metadata(path).num_rows == 2 * rows
        return written, appended

    most(ROWS)
    short, long = most(2 * ROWS), most(20 * ROWS)
    assert long[0] < 2 * short[0] and long[1] < 2 * short[1]


def test_a_reader_sees_the_old_trace_until_the_new_one_is_whole(path: Path) -> None:
    seen = []

    def watched() -> Iterator[LayerSample]:
        for step in range(1, 2 * ROWS):
            if step % ROWS == 0:
                seen.append(path.exists() and steps_of(path))
            yield row(step)

    write_trace(path, watched())
    write_trace(path, [row(7)])
    write_trace(path, watched())
    assert seen == [False, [7]]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_trace_that_cannot_be_written_to_its_end_leaves_the_old_one_and_no_draft(path: Path) -> None:
    def broken() -> Iterator[LayerSample]:
        yield row(1)
        raise RuntimeError("the ledger is gone")

    write_trace(path, [row(7)])
    with pytest.raises(RuntimeError, match="the ledger is gone"):
        write_trace(path, broken())
    assert steps_of(path) == [7]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_training_loop_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "trace.parquet"
    with study.TraceFile(str(path)) as trace:
        for step in range(10, 60, 10):
            trace.append(sample(step))
        assert not path.exists()
    assert steps_of(path) == steps_of(path, "fc") == [10, 20, 30, 40, 50]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    trace.close()
    with pytest.raises(InputError, match="the trace is closed"):
        trace.append(sample(60))


def test_rows_wait_until_they_are_many(path: Path) -> None:
    with TraceFile(path) as trace:
        for step in range(1, ROWS // 2):
            trace.append(sample(step))
        assert len(read_trace(path)) == 0
        trace.append(sample(ROWS // 2))
        assert len(read_trace(path)) == ROWS
        trace.append(sample(ROWS))
        trace.flush()
        assert len(read_trace(path)) == ROWS + 2


def test_an_error_in_the_loop_keeps_every_row(path: Path) -> None:
    def train() -> None:
        with TraceFile(path) as trace:
            trace.append(sample(10))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    assert steps_of(path) == [10]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_stream_cut_anywhere_is_read_and_continued_from_its_last_whole_batch(tmp_path: Path) -> None:
    ends, whole = [], tmp_path / "whole.parquet"
    for number in range(5):
        unfinished = abandoned(whole.with_name(f"{number}.parquet"), range(1, number + 1))
        ends.append(unfinished.stat().st_size)
    data = unfinished.read_bytes()
    for cut in (*range(0, len(data), 37), *(end + off for end in ends for off in (-1, 0, 1) if end + off <= len(data))):
        path = tmp_path / f"cut-{cut}.parquet"
        path.with_name(f"{path.name}.unfinished").write_bytes(data[:cut])
        kept = list(range(1, sum(end <= cut for end in ends)))
        assert steps_of(path) == kept
        with TraceFile(path) as trace:
            trace.append(sample(5))
        assert steps_of(path) == steps_of(path, "fc") == [*kept, 5]


def test_a_killed_process_leaves_what_it_handed_over_and_nothing_stands_in_the_way(path: Path) -> None:
    program = f"""
import os, signal
from study import TraceFile
from tests.test_traces import sample
trace = TraceFile({str(path)!r})
for step in range(1, 101):
    trace.append(sample(step))
trace.flush()
trace.append(sample(101))
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not path.exists()
    assert steps_of(path) == list(range(1, 101))
    with TraceFile(path) as trace:
        trace.append(sample(101))
    assert steps_of(path) == list(range(1, 102))


def test_steps_repeated_from_a_checkpoint_are_not_in_a_trace_twice(path: Path) -> None:
    abandoned(path, range(10, 60, 10))
    with TraceFile(path) as trace:
        for step in range(30, 80, 10):
            trace.append(sample(step, layers=("conv",)))
            trace.append(sample(step, layers=("conv", "new")))
    assert steps_of(path) == [10, 20, 30, 40, 50, 60, 70]
    assert (steps_of(path, "fc"), steps_of(path, "new")) == ([10, 20, 30, 40, 50], [30, 40, 50, 60, 70])


def test_a_finished_trace_is_kept_and_goes_on(path: Path) -> None:
    write_trace(path, [row(10), row(20), row(20, "fc")])
    for last in (40, 40, 50):
        with TraceFile(path) as trace:
            for step in range(10, last + 1, 10):
                trace.append(sample(step))
    assert (steps_of(path), steps_of(path, "fc")) == ([10, 20, 30, 40, 50], [20, 30, 40, 50])


def test_a_crash_between_finishing_and_cleaning_up_doubles_nothing(path: Path) -> None:
    unfinished = abandoned(path, range(1, 6))
    left = unfinished.read_bytes()
    TraceFile(path).close()
    unfinished.write_bytes(left)
    assert steps_of(path) == [1, 2, 3, 4, 5]
    with TraceFile(path) as trace:
        trace.append(sample(6))
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_a_trace_that_cannot_be_finished_is_finished_next_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = TraceFile(path)
    trace.append(sample(10))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            trace.close()
    assert [file.name for file in path.parent.iterdir()] == ["trace.parquet.unfinished"]
    TraceFile(path).close()
    assert steps_of(path) == [10]


def test_a_trace_has_one_writer(path: Path) -> None:
    with TraceFile(path) as trace:
        trace.append(sample(10))
        with pytest.raises(InputError, match=r"trace\.parquet\.unfinished: another study\.TraceFile writes this trace; .*rank 0"):
            TraceFile(path)
        trace.append(sample(20))
    assert steps_of(path) == [10, 20]


def test_an_older_trace_without_the_newest_columns_is_read_and_continued(path: Path) -> None:
    write_trace(path, [row(10)])
    pq.write_table(pq.read_table(path).drop_columns(["source", "relaxation_time", "coordinate_rate"]), path)
    assert read_trace(path)[["source", "relaxation_time"]].fillna(0).to_numpy().tolist() == [["weights", 0]]
    with TraceFile(path) as trace:
        trace.append(sample(20, coordinate_rate=0.5))
    assert read_trace(path)["coordinate_rate"].fillna(0).tolist() == [0, 0.5, 0.5]


def test_a_trace_that_does_not_exist_is_not_found(path: Path) -> None:
    with pytest.raises(NotFound, match=r"no such trace \(got '.*trace\.parquet'\); name a trial's trace\.parquet"):
        read_trace(path)


@pytest.mark.parametrize("use", [read_trace, TraceFile])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,layer\n1,conv\n", r"trace\.parquet: cannot be read as a Parquet file of a trace \(.*\); name a trace\.parquet"),
        (pa.table({"step": [1], "layer": ["conv"]}), r"trace\.parquet: is no trace: columns are missing \(role, place, .*rotation_expected\); "),
        (pa.table({column: ["x"] for column in COLUMNS}), r"trace\.parquet: cannot be read as a Parquet file of a trace \(.*int64"),
    ],
)
def test_what_is_no_trace_is_an_error_that_says_so_and_stays_as_it_is(path: Path, use: Any, content: Any, message: str) -> None:
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        use(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/trace\.parquet\.unfinished: cannot be written \(.*\); choose a folder"):
        TraceFile(tmp_path / "file" / "trace.parquet")
    with pytest.raises(InputError, match=r"is a directory"):
        read_trace(tmp_path)


def test_importing_traces_loads_no_library() -> None:
    program = "import sys; import study.traces; print([name for name in ('pandas', 'pyarrow', 'torch', 'mlflow') if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
