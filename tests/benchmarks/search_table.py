"""The digits ResNet at every point of a grid of learning rate and decay, trained once: what tests.benchmarks.search looks up.

python -m tests.benchmarks.search_table      writes tests/benchmarks/digits.csv; two minutes on one core

A trial that diverges counts as guessing. Each point is the mean of trials that differ in all seeds.
"""

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from study.engines.fused import FusedEngine
from study.measurement import Outcome
from study.trial import TrialSpec

TABLE = Path(__file__).with_name("digits.csv")

RATES = np.logspace(-3, 0, 10)
DECAYS = np.logspace(-5, 0.5, 12)
SEEDS = (0,)
GUESSING = 0.9
SLOTS = 8

TRIAL = {
    "data": {"name": "digits", "batch_size": 64, "label_noise": 0.1, "validation": 0.2},
    "model": {"name": "resnet", "norm": "batch", "width": 8, "blocks": [1, 1]},
    "optimizer": {"rule": "sgd", "momentum": 0.9, "gamma": "none"},
    "schedule": {"epochs": 16, "warmup": 0.05, "shape": "cosine"},
    "trace": {"every": 1000},
}


def trials() -> Iterator[tuple[str, TrialSpec]]:
    """Every point and seed, by its name in an engine."""
    for lr, decay, seed in itertools.product(RATES, DECAYS, SEEDS):
        point = {"lr": float(f"{lr:.6g}"), "weight_decay": float(f"{decay:.6g}")}
        tree = {**TRIAL, "seed": seed, "data": {**TRIAL["data"], "seed": seed}, "optimizer": {**TRIAL["optimizer"], **point}}
        yield f"{point['lr']:.6g} {point['weight_decay']:.6g} {seed}", TrialSpec.model_validate(tree)


def errors() -> Iterator[tuple[str, float]]:
    """The final validation error of every trial, as trials end."""
    waiting, running, engine = trials(), set[str](), FusedEngine(SLOTS, "cpu", "converted")
    while True:
        for name, trial in itertools.islice(waiting, SLOTS - len(running)):
            engine.admit(name, trial)
            running.add(name)
        if not running:
            return
        for progress in engine.advance():
            if progress.ending is not None:
                engine.release(progress.trial_id)
                running.remove(progress.trial_id)
                completed = progress.ending.outcome is Outcome.COMPLETED
                yield progress.trial_id, progress.measurement.values["val/error"] if completed else math.nan


def main() -> None:
    """Trains, and writes the table."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, error in errors():
        lr, decay, _ = name.split()
        found[lr, decay].append(GUESSING if math.isnan(error) else error)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("lr", "weight_decay", "error"))
        for (lr, decay), values in sorted(found.items(), key=lambda point: tuple(map(float, point[0]))):
            rows.writerow((lr, decay, f"{statistics.fmean(values):.4f}"))


if __name__ == "__main__":
    main()
