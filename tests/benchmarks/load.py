"""Load: 200 trials that report 200 times a second, through the real callback, ledger and recorder; no engines, no Ray.

python -m tests.benchmarks.load [--store URI] [--seconds 60]

A report is an epoch of a small network: its metrics, and one sample of each of three layers. The lag is the time from a report's being
written into the ledger to MLflow's having it, as seen twice a second; the callback's cost is what Tune's controller waits for. Prints
one line, with the lag's median and maximum while reports come in, and the time that it took to bring the rest.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from study.measurement import Ending, Measurement, Outcome
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.tracking.recorder import Recorder
from study.tuning.callbacks import LedgerCallback
from study.tuning.failures import FirstFailures
from study.tuning.trainables import ENDING, MEASUREMENT
from tests.tracking.scenes import layer

TRIALS, RATE, LAYERS = 200, 200, 3
TARGET = 5.0
"""Seconds of lag."""


def report(epoch: int) -> Measurement:
    """What a small network says of one epoch of 20 steps."""
    step = 20 * epoch
    samples = tuple(layer(step, f"layer{number}") for number in range(LAYERS))
    names = ("train/loss", "train/error", "val/loss", "val/error", "lr", "weight_decay", "intrinsic_lr", "gamma_rms/last")
    return Measurement(step, epoch, dict.fromkeys(names, 1.0 / epoch), samples, seconds=1.0)


def measure(uri: str, seconds: float) -> dict[str, float]:
    """Reports for so many seconds, and the lag meanwhile."""
    spec = check(
        {
            "name": "load",
            "trial": {"schedule": {"epochs": int(seconds * RATE / TRIALS)}},
            "space": {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}},
            "search": {"trials": TRIALS},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "load"
        recorder = Recorder(folder, uri or f"sqlite:///{scratch}/mlflow.db", spec, "load-1", engine="solo")
        recorder.open()
        recorder.start()
        lags, done = [], threading.Event()
        watcher = threading.Thread(target=_watch, args=(Outbox(folder), lags, done))
        watcher.start()
        cost, late = _play(LedgerCallback(recorder.outbox, folder, spec.objective, FirstFailures(0)), spec, int(seconds * RATE))
        done.set()
        watcher.join()
        start = time.monotonic()
        recorder.close()
        return {
            "lag, median": statistics.median(lags),
            "lag, highest": max(lags),
            "callback, ms": 1000 * cost,
            "late, s": late,
            "the rest, s": time.monotonic() - start,
        }


def _play(callback: LedgerCallback, spec: StudySpec, reports: int) -> tuple[float, float]:
    """Plays Tune: every trial in turn, at the rate. The mean cost of a call in seconds, and how late the last one was."""
    trials = [_trial(number, spec) for number in range(TRIALS)]
    for trial in trials:
        callback.on_trial_start(0, [], trial)
    start, spent = time.monotonic(), 0.0
    for number in range(reports):
        time.sleep(max(0.0, start + number / RATE - time.monotonic()))
        before = time.perf_counter()
        callback.on_trial_result(0, [], trials[number % TRIALS], {MEASUREMENT: report(1 + number // TRIALS)})
        spent += time.perf_counter() - before
    late = time.monotonic() - start - reports / RATE
    for trial in trials:
        callback.on_trial_complete(0, [], trial)
    return spent / reports, late


def _trial(number: int, spec: StudySpec) -> Any:
    config = {"trial_id": f"load-{number:04d}", "arm": "all", "trial": spec.trial.model_dump_json(), "tags": {}}
    return SimpleNamespace(config=config, num_failures=0, max_failures=3, last_result={ENDING: Ending(Outcome.COMPLETED)})


def _watch(outbox: Outbox, lags: list[float], done: threading.Event) -> None:
    """How old the oldest report is that MLflow has not heard of, twice a second."""
    while not done.wait(0.5):
        waiting = outbox.pending(limit=1)
        lags.append(time.time() - waiting[0].time / 1000 if waiting else 0.0)
    outbox.close()


def main() -> None:
    """Prints the figures of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="", help="a tracking URI; by default a SQLite file of its own")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    found = measure(given.store, given.seconds)
    print(f"{TRIALS} trials, {RATE} reports a second, {given.seconds:.0f} s; target: lag under {TARGET:.0f} s")
    print("; ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
