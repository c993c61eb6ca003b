"""Fused trials against solo ones, on all cores: a process on each core with one thread, what they train in the same time.

For each network three kinds of processes take turns, so that they meet the same machine: the solo engine; the fastest loop that one
trial can have by itself (channels-last where it has images, torch.compile), untraced; and the fused engine with several numbers of rows.
"""

import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from study.tuning.hosting import WORKERS
from tests.benchmarks.solo import TRIALS

NETWORKS = {
    "resnet, batch 64": (TRIALS["resnet, batch 64"], 64, (4, 8), ">= 1.4"),
    "resnet, batch 16": (TRIALS["resnet, batch 64"], 16, (8, 16), ">= 2.2"),
    "mlp, batch 64": (TRIALS["mlp, batch 64"], 64, (8, 16), ">= 0.97"),
    "mlp, batch 16": (TRIALS["mlp, batch 64"], 16, (16, 32), ">= 2.5"),
    "transformer, batch 16": (TRIALS["transformer, batch 64"], 16, (8,), ">= 0.97"),
    "transformer, batch 64": (TRIALS["transformer, batch 64"], 64, (8,), ">= 0.97 where fused"),
}
"""Name to trial, batch size, rows of the fused engine, and what its ratio to the solo engine is to be."""

ROUNDS = 5
SECONDS = 1.0
"""How long every kind trains in each round, at least."""

Epoch = Callable[[], object]


def measure() -> Iterator[tuple[str, list[float], str]]:
    """Trial-epochs per second on all cores, fused over solo, round by round; then over the best loop of one trial."""
    for name, (sections, batch, rows, target) in NETWORKS.items():
        trial = {**sections, "data": {"batch_size": batch}, "schedule": {"epochs": 100_000, "shape": "constant"}}
        kinds = {"solo": ("solo", 1), "best": ("best", 1), **{f"fused {count}": ("fused", count) for count in rows}}
        rates = _rates(trial, kinds)
        fastest = max((kind for kind in kinds if kind.startswith("fused")), key=lambda kind: statistics.median(rates[kind]))
        title = f"{name}: {fastest.removeprefix('fused ')} rows fused"
        yield f"{title} / solo engine", _ratios(rates[fastest], rates["solo"]), target
        yield f"{title} / compiled loop of one trial", _ratios(rates[fastest], rates["best"]), ""


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _rates(trial: dict[str, Any], kinds: dict[str, tuple[str, int]]) -> dict[str, list[float]]:
    """Trial-epochs per second of every kind in every round."""
    os.environ.update(WORKERS)  # read by the processes as they start
    context = mp.get_context("spawn")
    teams: dict[str, list[Connection]] = {}
    started = []
    for kind, (engine, rows) in kinds.items():
        for core in range(os.cpu_count() or 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, engine, rows, trial, core), daemon=True)
            process.start()
            started.append(process)
            # One after the other: what the first process compiles, the next ones find on disk.
            ours.recv()
            teams.setdefault(kind, []).append(ours)
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, team in teams.items():
            for member in team:
                member.send(SECONDS)
            rates[kind].append(sum(member.recv() for member in team))
    for process in started:
        process.kill()
        process.join()
    return rates


def _work(channel: Connection, engine: str, rows: int, trial: dict[str, Any], seed: int) -> None:
    """A process of one kind: trains for as long as it is told, and says how many trial-epochs per second that were."""
    import torch

    torch.set_num_threads(1)
    epoch = _epoch(engine, rows, trial, seed)
    epoch()
    channel.send("ready")
    while True:
        seconds = channel.recv()
        start, epochs = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            epoch()
            epochs += rows
        channel.send(epochs / (time.perf_counter() - start))


def _epoch(engine: str, rows: int, sections: dict[str, Any], seed: int) -> Epoch:
    from study.engines.fused import FusedEngine
    from study.engines.solo import SoloEngine
    from study.trial import TrialSpec
    from tests.benchmarks.solo import bare_loop

    trial = TrialSpec.model_validate({**sections, "seed": seed})
    if engine == "best":
        return bare_loop(trial, compiled=True)
    if engine == "solo":
        solo = SoloEngine()
        solo.admit("solo", trial)
        return solo.advance
    fused = FusedEngine(rows)
    for row in range(rows):
        fused.admit(str(row), trial.model_copy(update={"seed": row}))
    return fused.advance
