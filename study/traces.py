"""Traces: every sample of every layer as one table, `trace.parquet`, never seen half written and never whole in memory.

    a trial's samples ────────────write_trace────────────> trace.parquet ──────────────┐
    anybody's training loop ──TraceFile──> trace.parquet.unfinished ──close──┘         ├──read_trace──> one row per layer and step
                                               └── after a crash: up to the last whole batch ──────────┘

An unfinished trace is an Arrow stream: it grows by whole batches, and whatever a crash cut off at its end is known to be cut off.
Both files may lie side by side; of the unfinished one only rows count whose step is greater than their layer's last finished one.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from study.errors import InputError, NotFound
from study.measurement import LayerSample

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ROWS = 2_000
"""Rows that are held as Python objects, at most."""

GROUP = 50_000
"""Rows of a row group: what is written to a Parquet file at once."""

UNFINISHED = ".unfinished"
"""What follows the name of a trace that is still being written."""


class TraceFile:
    """A trace written while a training loop runs: any loop, of any length. It survives a crash, and takes little memory.

    >>> with study.TraceFile("trace.parquet") as trace:           # doctest: +SKIP
    ...     for images, labels in batches:
    ...         train(images, labels)
    ...         if sample := tracer.sample():
    ...             trace.append(sample)

    Opened again on the same path, after a crash or after its end, it goes on behind the rows that are there. Rows of a layer up to
    its last step there are left out, so that steps repeated from a checkpoint are not in it twice; a new run needs a new path.

    Args:
        path: The Parquet file that it becomes when it is closed; until then its rows are in `<path>.unfinished`.

    Raises:
        InputError: if the path holds something else, another TraceFile writes to it, or it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[LayerSample] = []
        self._stream = _locked(_unfinished(self.path))
        try:
            if _unfinished(self.path).stat().st_size:
                _write(self.path, _batches(self.path))
            self._last = _last_steps(_finished(self.path))
            self._stream.truncate(0)
            self._send(_schema().serialize())
        except BaseException:
            self._forsake()
            raise

    def append(self, sample: Mapping[str, LayerSample]) -> None:
        """Adds what `EffectiveLR.sample` returned: one row for each layer.

        Raises:
            InputError: if the trace is closed.
        """
        if self._stream.closed:
            raise InputError("the trace is closed", where=str(self.path), remedy="append before it is closed, or open it again")
        for row in sample.values():
            if row.step > self._last.get(row.layer, -1):
                self._last[row.layer] = row.step
                self._waiting.append(row)
        if len(self._waiting) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Hands every row to the operating system; worth it where a checkpoint is saved, as a crash loses rows that wait."""
        rows, self._waiting = self._waiting, []
        if rows:
            self._send(_batch(rows).serialize())

    def close(self) -> None:
        """Turns the unfinished trace into the finished one."""
        if self._stream.closed:
            return
        with self._stream:
            self.flush()
            _write(self.path, _batches(self.path))
            _unfinished(self.path).unlink()

    def __enter__(self) -> "TraceFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _send(self, message: Any) -> None:
        self._stream.write(message)
        self._stream.flush()

    def _forsake(self) -> None:
        """Leaves behind what was found, and no empty file."""
        with self._stream:
            if not _unfinished(self.path).stat().st_size:
                _unfinished(self.path).unlink()


def write_trace(path: Path, samples: Iterable[LayerSample]) -> None:
    """Writes samples as a Parquet table, one row per layer and sampled step; numbers that are not finite are null.

    The samples are asked for as they are written; under its name the file appears once it is whole.
    """
    rest = iter(samples)
    _write(path, (_batch(rows) for rows in iter(lambda: list(islice(rest, ROWS)), [])))


def read_trace(path: str | Path) -> "pd.DataFrame":
    """The rows of a trace, finished or not; the columns are the fields of `LayerSample`.

    Raises:
        NotFound: if there is none.
        InputError: if it is something else.
    """
    import pyarrow as pa

    path = Path(path)
    if not (path.exists() or _unfinished(path).exists()):
        raise NotFound(f"no such trace (got {str(path)!r})", remedy="name a trial's trace.parquet, or the path of a study.TraceFile")
    return pa.Table.from_batches(list(_batches(path)), _schema()).to_pandas()


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


@cache
def _schema() -> "pa.Schema":
    import pyarrow as pa

    types: dict[Any, Any] = {int: pa.int64(), str: pa.string(), bool: pa.bool_(), float: pa.float64(), float | None: pa.float64()}
    return pa.schema([(column.name, types[column.type]) for column in fields(LayerSample)])


def _batch(samples: list[LayerSample]) -> "pa.RecordBatch":
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays = [pa.array([getattr(sample, column.name) for sample in samples], column.type) for column in _schema()]
    finite = [pc.if_else(pc.is_finite(array), array, None) if array.type == pa.float64() else array for array in arrays]
    return pa.record_batch(finite, schema=_schema())


def _write(path: Path, batches: Iterable["pa.RecordBatch"]) -> None:
    """Writes a Parquet file, whole or not at all, one row group at a time."""
    import pyarrow.parquet as pq

    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            with pq.ParquetWriter(file, _schema()) as writer:
                for group in _groups(batches):
                    writer.write_table(group)
            file.flush()
            os.fsync(file.fileno())  # what it was made from is removed next
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _groups(batches: Iterable["pa.RecordBatch"]) -> Iterator["pa.Table"]:
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(part.num_rows for part in held) >= GROUP:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _batches(path: Path) -> Iterator["pa.RecordBatch"]:
    """All rows of a trace, finished ones first."""
    # Opened before the finished trace is read, as closing a trace replaces the one and removes the other.
    with _opened(_unfinished(path)) as stream:
        last: dict[str, int] = {}
        for batch in _finished(path):
            last = _last_steps([batch], last)
            yield batch
        for batch in _whole(stream):
            yield _later(batch, last)


def _finished(path: Path) -> Iterator["pa.RecordBatch"]:
    """The rows of a finished trace; none where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS):
                yield _conformed(batch)
    except (OSError, pa.ArrowException) as error:
        remedy = f"name a trace.parquet; an unfinished trace is read without `{UNFINISHED}` in its name"
        raise InputError(f"cannot be read as a Parquet file of a trace ({error})", where=str(path), remedy=remedy) from error


def _check_columns(path: Path, names: list[str]) -> None:
    missing = [column.name for column in fields(LayerSample) if column.default is MISSING and column.name not in names]
    if missing:
        remedy = "name a trace.parquet that a study or study.TraceFile wrote"
        raise InputError(f"is no trace: columns are missing ({', '.join(missing)})", where=str(path), remedy=remedy)


def _opened(unfinished: Path) -> BinaryIO:
    try:
        return unfinished.open("rb")
    except FileNotFoundError:
        return BytesIO()


def _whole(stream: BinaryIO) -> Iterator["pa.RecordBatch"]:
    """The batches of an Arrow stream before the point at which it was cut."""
    import pyarrow as pa

    try:
        for batch in pa.ipc.open_stream(stream):
            yield _conformed(batch)
    except (OSError, pa.ArrowInvalid):
        return


def _conformed(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The rows in the present columns: those that an older trace lacks have the values that a sample has by itself."""
    import pyarrow as pa

    wanted = zip(fields(LayerSample), _schema(), strict=True)
    columns = [
        batch[column.name].cast(column.type) if column.name in batch.schema.names else pa.array([known.default] * batch.num_rows, column.type)
        for known, column in wanted
    ]
    return pa.record_batch(columns, schema=_schema())


def _last_steps(batches: Iterable["pa.RecordBatch"], before: Mapping[str, int] | None = None) -> dict[str, int]:
    """Layer to its last step."""
    import pyarrow as pa

    last = dict(before or {})
    for batch in batches:
        latest = pa.table(batch).group_by("layer").aggregate([("step", "max")])
        for layer, step in zip(latest["layer"].to_pylist(), latest["step_max"].to_pylist(), strict=True):
            last[layer] = max(step, last.get(layer, step))
    return last


def _later(batch: "pa.RecordBatch", last: Mapping[str, int]) -> "pa.RecordBatch":
    """The rows whose step is greater than the last one of their layer."""
    import pyarrow as pa

    rows = zip(batch["layer"].to_pylist(), batch["step"].to_pylist(), strict=True)
    return batch.filter(pa.array([step > last.get(layer, -1) for layer, step in rows], pa.bool_()))


def _locked(unfinished: Path) -> BinaryIO:
    """The file of an unfinished trace, made if need be, for one writer at a time; the lock goes with the process, however it ends."""
    import fcntl

    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        stream = unfinished.open("ab")
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=str(unfinished), remedy="choose a folder that you may write to") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        remedy = "close that one; of several processes only one may trace, such as rank 0"
        raise InputError("another study.TraceFile writes this trace", where=str(unfinished), remedy=remedy) from None
    except OSError:
        pass  # a network file system without locks
    return stream
