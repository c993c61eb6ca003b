"""The same study through this project, in a process of its own.

Prints what `study_run` says of a process, as JSON, with the slots of an engine, and how full fused engines were (0 where there were none).

python -m tests.benchmarks.our_tune FOLDER NETWORK ENGINE [--mlflow]
"""

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.study_run import DECAY, GAMMAS, GRACE, LR, REDUCTION, TRIALS, assignments, check, trial_of

if TYPE_CHECKING:
    from study.spec import StudySpec
    from study.tuning.choice import Choice
    from tests.benchmarks.stopwatch import Stopwatch


def spec_of(network: str, engine: str) -> "StudySpec":
    """The study: learning rate, decay and two gamma policies, which are tuned like the rest, so that ASHA compares all trials."""
    from study.spec import StudySpec

    return StudySpec.model_validate(
        {
            "name": "ours",
            "trial": trial_of(network),
            "space": {
                "optimizer.lr": {"low": LR[0], "high": LR[1], "log": True},
                "optimizer.weight_decay": {"low": DECAY[0], "high": DECAY[1], "log": True},
                "optimizer.gamma": {"choices": GAMMAS},
            },
            "search": {"trials": TRIALS[network], "seed": 0},
            "objective": {"metric": "val/error", "direction": "minimize"},
            "stopping": {"scheduler": "asha", "grace": GRACE, "reduction": REDUCTION},
            "resources": {"engine": engine},
        }
    )


def points(network: str) -> list[dict[str, Any]]:
    """The assignments by dotted path."""
    return [{f"optimizer.{name}": value for name, value in one.items()} for one in assignments(network)]


def main(folder: str, network: str, engine: str, mlflow: bool) -> None:
    """Runs the study, with its records in MLflow or in the ledger alone."""
    from study.home import StudyFolder
    from study.measurement import Outcome
    from study.tracking.outbox import Outbox
    from study.tuning.starting import _Start, quiet_hosts

    quiet_hosts()  # which Ray reads when it is imported
    from tests.benchmarks.stopwatch import Stopwatch

    spec, home, watch = spec_of(network, engine), Path(folder), Stopwatch()
    ticks, _Start.wait = counted_ticks(), watch.waits(_Start.wait)
    choice = (_with_mlflow if mlflow else _without_mlflow)(spec, home, points(network), watch)
    times = watch.times()
    outbox = Outbox(StudyFolder.find(home, spec.name).path)
    entries = outbox.entries()
    check(network, [{name: entry.trial["optimizer"][name] for name in ("lr", "weight_decay", "gamma")} for entry in entries])
    assert not [entry.trial_id for entry in entries if entry.state == Outcome.FAILED], "trials failed"
    assert sum(entry.epoch for entry in entries) == times["epochs"], "Tune heard of other epochs than the ledger"
    assert not mlflow or not outbox.progress()["undelivered"], "MLflow has not heard of everything"
    print(json.dumps({**times, "slots": choice.slots, "occupancy": occupancy(ticks, choice.slots)}))


def counted_ticks() -> list[list[int]]:
    """Will hold the trials in every tick of each fused engine, once the study has ended."""
    import ray

    from study.tuning import placement

    found: list[list[int]] = []
    original = placement.pool

    @contextmanager
    def counted(*arguments: Any) -> Iterator[str]:
        with original(*arguments) as name:
            yield name
            found.extend(ray.get(ray.get_actor(name).occupancy.remote()))

    placement.pool = counted
    return found


def occupancy(ticks: Sequence[Sequence[int]], slots: int) -> float:
    """Share of the rows that trained, from each engine's first full tick to its last: later, no trial is left to fill a row with.

    Of an engine that was never full, all ticks count.
    """
    spans = []
    for counts in ticks:
        full = [tick for tick, count in enumerate(counts) if count >= slots]
        spans.append(counts[full[0] : full[-1] + 1] if full else counts)
    rows = slots * sum(map(len, spans))
    return sum(map(sum, spans)) / rows if rows else 0.0


def _with_mlflow(spec: "StudySpec", home: Path, wishes: Sequence[dict[str, Any]], watch: "Stopwatch") -> "Choice":
    """All that `study run` does."""
    from study.tracking.recorder import Recorder
    from study.tuning import driver

    chosen: list[Choice] = []
    choose, start = driver.choose, Recorder.start

    def noted(*arguments: Any) -> "Choice":
        chosen.append(choose(*arguments))
        return chosen[-1]

    def waited_for(recorder: Recorder) -> None:
        start(recorder)
        watch.wait_for(recorder.close)

    driver.choose, Recorder.start = noted, waited_for
    Recorder.close = cache(Recorder.close)  # once, and so not a second time where `study run` does it
    driver.run(spec, home=home, enqueue=[json.dumps(wish) for wish in wishes])
    return chosen[0]


def _without_mlflow(spec: "StudySpec", home: Path, wishes: Sequence[dict[str, Any]], watch: "Stopwatch") -> "Choice":
    """The trials and the ledger alone."""
    from study.home import StudyFolder
    from study.tracking.outbox import Outbox
    from study.tuning.choosing import choose
    from study.tuning.hosting import tune_study
    from study.tuning.search import Search
    from study.tuning.starting import on_ray

    folder = StudyFolder.prepare(home, spec)
    with on_ray():
        choice, search = choose(spec, home), Search(spec, folder.journal)
        for wish in wishes:
            search.enqueue(wish)
        tune_study(spec, folder.path, search, Outbox(folder.path), [], threading.Event(), choice)
    return choice


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], "--mlflow" in sys.argv)
