"""Fused trials against solo ones, on all cores: a process on each core with one thread, what they train in the same time.

Every process holds all kinds of a network, and all processes train the same kind at the same time, one kind after the other, round by
round, so that they meet the same machine. Each has one thread, and is timed by its CPU time: on an idle machine that is the clock's.

solo            the solo engine
channels-last   a bare loop of one trial, channels-last, one kernel for the update; untraced, without any of our code
compiled        the same through torch.compile; the better one of the two is the best that one trial can do by itself
fused           the fused engine
"""

import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from study.tuning.starting import WORKERS
from tests.benchmarks.solo import TRIALS

NETWORKS = {
    "resnet, batch 64": (TRIALS["resnet, batch 64"], 64, 8, ">= 1.4"),
    "resnet, batch 16": (TRIALS["resnet, batch 64"], 16, 32, ">= 2.2"),
    "mlp, batch 64": (TRIALS["mlp, batch 64"], 64, 16, ">= 0.97"),
    "mlp, batch 16": (TRIALS["mlp, batch 64"], 16, 32, ">= 2.5"),
    "transformer, batch 16": (TRIALS["transformer, batch 64"], 16, 8, ">= 0.97 where auto fuses"),
}
"""Name to trial, batch size, rows of the fused engine, and what its ratio to the solo engine is to be."""

ROUNDS, QUICK_ROUNDS = 5, 3
SECONDS = 0.8
"""CPU time that every process trains each kind in each round, at least."""

BEST = ("channels-last", "compiled")
KINDS = ("solo", *BEST, "fused")

Epoch = Callable[[], object]


def measure() -> Iterator[tuple[str, list[float], str]]:
    """Trial-epochs per CPU second on all cores, fused over solo, round by round; then over the best of one trial by itself."""
    os.environ.update(WORKERS)  # read by the processes as they start
    team = [_Worker(core) for core in range(os.cpu_count() or 1)]
    for name, (sections, batch, rows, target) in NETWORKS.items():
        trial = {**sections, "data": {"batch_size": batch}, "schedule": {"epochs": 100_000, "shape": "constant"}}
        rates = _rates(team, trial, rows)
        best = max(BEST, key=lambda kind: statistics.median(rates[kind]))
        yield f"{rows} rows fused / solo engine: {name}", _ratios(rates["fused"], rates["solo"]), target
        yield f"{rows} rows fused / best solo ({best}): {name}", _ratios(rates["fused"], rates[best]), ""
    for worker in team:
        worker.stop()


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _rates(team: "list[_Worker]", trial: dict[str, Any], rows: int) -> dict[str, list[float]]:
    """Trial-epochs per second of every kind in every round, all cores together."""
    for worker in team:
        # One after the other: what the first one compiles, the next ones find on disk.
        worker.prepare(trial, rows)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind in KINDS:
            for worker in team:
                worker.begin(kind)
            rates[kind].append(sum(worker.rate() for worker in team))
    return rates


class _Worker:
    """A process that trains what it is told."""

    def __init__(self, core: int) -> None:
        context = mp.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, core), daemon=True)
        self._process.start()

    def prepare(self, trial: dict[str, Any], rows: int) -> None:
        self._channel.send((trial, rows))
        self._channel.recv()

    def begin(self, kind: str) -> None:
        self._channel.send(kind)

    def rate(self) -> float:
        return float(self._channel.recv())

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _work(channel: Connection, seed: int) -> None:
    """Trains one kind for as long as a turn takes, and says how many trial-epochs per CPU second that were; or takes another network."""
    import torch

    torch.set_num_threads(1)
    epochs: dict[str, Epoch] = {}
    rows = 1
    while True:
        task = channel.recv()
        if isinstance(task, tuple):
            sections, rows = task
            epochs = _kinds({**sections, "seed": seed}, rows)
            for epoch in epochs.values():
                epoch()
            channel.send("ready")
            continue
        start, done = time.process_time(), 0
        while time.process_time() - start < SECONDS:
            epochs[task]()
            done += rows if task == "fused" else 1
        channel.send(done / (time.process_time() - start))


def _kinds(sections: dict[str, Any], rows: int) -> dict[str, Epoch]:
    from study.engines.fused import FusedEngine
    from study.engines.solo import SoloEngine
    from study.trial import TrialSpec
    from tests.benchmarks.solo import bare_loop

    trial = TrialSpec.model_validate(sections)
    solo, fused = SoloEngine(), FusedEngine(rows)
    solo.admit("solo", trial)
    for row in range(rows):
        fused.admit(str(row), trial.model_copy(update={"seed": row}))
    loops = {"channels-last": bare_loop(trial, channels_last=True), "compiled": bare_loop(trial, channels_last=True, compiled=True)}
    return {"solo": solo.advance, **loops, "fused": fused.advance}
