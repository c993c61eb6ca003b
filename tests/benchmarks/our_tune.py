"""The same study through this project, in a process of its own; prints how long it took in all, and after its first result, CPU seconds
of all its processes, and how full its fused engines were.

python -m tests.benchmarks.our_tune FOLDER NETWORK ENGINE [--mlflow]
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.home import StudyFolder
from study.spec import StudySpec
from study.tracking.outbox import Outbox
from tests.benchmarks.processes import total, watched
from tests.benchmarks.study_run import EPOCHS, GRACE, NETWORKS, REDUCTION, TRIALS


def spec_of(network: str, engine: str) -> StudySpec:
    """The study: learning rate, decay and two gamma policies, under ASHA."""
    return StudySpec.model_validate(
        {
            "name": "ours",
            "trial": {**NETWORKS[network], "schedule": {"epochs": EPOCHS[network]}},
            "space": {
                "optimizer.lr": {"low": 1e-2, "high": 1.0, "log": True},
                "optimizer.weight_decay": {"low": 1e-4, "high": 1e-1, "log": True},
                "optimizer.gamma": {"choices": ["none", "all"]},
            },
            "search": {"trials": TRIALS, "seed": 0},
            "objective": {"metric": "val/error", "direction": "minimize"},
            "stopping": {"scheduler": "asha", "grace": GRACE, "reduction": REDUCTION},
            "resources": {"engine": engine},
        }
    )


def main(folder: str, network: str, engine: str, mlflow: bool) -> None:
    """Runs the study, with its records in MLflow or in the ledger alone."""
    start = time.time()
    spec, home = spec_of(network, engine), Path(folder)
    ticks, processes = counted_ticks(), watched()
    if mlflow:
        from study.tuning.driver import run

        run(spec, home=home)
    else:
        _without_mlflow(spec, home)
    measured = [when for _, when in _measurements(StudyFolder.find(home, spec.name).path)]
    times = {"all": time.time() - start, "warm": time.time() - min(measured) / 1000, "cpu": total(processes)}
    print(json.dumps({**times, "occupancy": _occupancy(ticks)}))


def counted_ticks() -> list[list[int]]:
    """Will hold the trials in every tick of each fused engine, once the study has ended."""
    import ray

    from study.tuning import actor

    found: list[list[int]] = []
    original = actor.pool

    @contextmanager
    def counted(*arguments: Any) -> Iterator[str]:
        with original(*arguments) as name:
            yield name
            found.extend(ray.get(ray.get_actor(name).occupancy.remote()))

    actor.pool = counted
    return found


def _occupancy(ticks: list[list[int]]) -> float:
    """Share of the rows that trained, from each engine's first full tick to its last: later, no trial is left to fill a row with."""
    spans = []
    for counts in filter(None, ticks):
        full = [tick for tick, count in enumerate(counts) if count == max(counts)]
        spans.append(counts[full[0] : full[-1] + 1])
    rows = sum(len(span) * max(span) for span in spans)
    return sum(map(sum, spans)) / rows if rows else 0.0


def _without_mlflow(spec: StudySpec, home: Path) -> None:
    from study.tuning.choosing import choose
    from study.tuning.hosting import tune_study
    from study.tuning.search import Search

    folder = StudyFolder.prepare(home, spec)
    tune_study(spec, folder.path, Search(spec, folder.journal), Outbox(folder.path), [], threading.Event(), choose(spec, home))


def _measurements(folder: Path) -> list[tuple[str, int]]:
    """Trial and time, in ms, of everything that was measured."""
    outbox = Outbox(folder)
    return [(entry.trial_id, when) for entry in outbox.entries() for _, when in outbox.measured(entry.trial_id, before=1 << 62)]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], "--mlflow" in sys.argv)
