"""Scale: what a trial costs when there are thousands of them, and whether the ten-thousandth costs more than the first.

python -m tests.benchmarks.scale [TRIALS ...]                    by default 1000 10000
python -m tests.benchmarks.scale --search SAMPLER TRIALS         the search alone: CPU time of a trial in each tenth of them over the second

Trials of one trivial epoch go through the whole stack: Searcher (random sampler), Ray Tune with reused actors, ledger, Recorder into
SQLite. Each number of trials runs in a process of its own, for its memory. Printed: memory that the driver gained per trial, the share of
the time that the searcher took, seconds per trial, and of the last quarter of trials over the first.
"""

import itertools
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from study.measurement import Ending, Measurement, Outcome
from study.spec import StudySpec, check

DEFAULT = (1_000, 10_000)


def spec_of(trials: int, sampler: str = "random") -> StudySpec:
    """Two axes, two arms, one epoch."""
    space = {
        "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True},
        "optimizer.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
        "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"},
    }
    search = {"sampler": sampler, "trials": trials}
    return check({"name": "scale", "trial": {"schedule": {"epochs": 1}}, "space": space, "search": search, "stopping": {"scheduler": "none"}})


def trivial_trainable() -> Any:
    """A trial whose only epoch is a formula."""
    from study.measurement import Progress
    from study.trial import TrialSpec
    from study.tuning.trainables import StudyTrainable

    class Trivial(StudyTrainable):
        def _advance(self) -> Progress:
            lr = TrialSpec.model_validate_json(self._config["trial"]).optimizer.lr
            return Progress(self._trial_id, Measurement(1, 1, {"val/error": lr}, seconds=1e-3), Ending(Outcome.COMPLETED))

    return Trivial


class Clock:
    """Adds up the time that calls take, and remembers when the first of them began in each trial."""

    def __init__(self) -> None:
        self.spent, self.starts = 0.0, list[float]()

    def around(self, call: Callable[..., Any], starts: bool = False) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            if starts:
                self.starts.append(begun)
            try:
                return call(*arguments, **more)
            finally:
                self.spent += time.perf_counter() - begun

        return timed


def measured(trials: int, sampler: str) -> dict[str, float]:
    """One study of so many trials, in this process."""
    from study.tracking.outbox import Outbox
    from study.tracking.recorder import Recorder
    from study.tuning import hosting
    from study.tuning.choice import Choice
    from study.tuning.search import Search
    from study.tuning.searcher import JournalSearcher

    clock = Clock()
    for name in ("suggest", "on_trial_result", "on_trial_complete"):
        setattr(JournalSearcher, name, clock.around(getattr(JournalSearcher, name), starts=name == "suggest"))
    spec, trainable = spec_of(trials, sampler), trivial_trainable()
    hosting._trained_by = _always(trainable)
    hosting._tags = lambda trial: {}
    with TemporaryDirectory() as folder:
        path = Path(folder)
        recorder = Recorder(path / "scale", f"sqlite:///{path / 'mlflow.db'}", spec, "scale-1", engine="none")
        recorder.open()
        recorder.start()
        search, outbox = Search(spec, path / "scale" / "journal.log"), Outbox(path / "scale")
        watch = Memory(clock)
        with watch:
            hosting.tune_study(spec, path / "scale", search, outbox, [], threading.Event(), Choice("solo", 1, "", 0.0, ""))
        done = time.perf_counter()
        behind = outbox.progress()["undelivered"]
        recorder.close()
        assert len(outbox.records()) == trials
    quarter = trials // 4
    first, last = clock.starts[quarter] - clock.starts[0], clock.starts[-1] - clock.starts[-1 - quarter]
    whole = done - clock.starts[0]
    return {
        "trials": trials,
        "seconds per trial": whole / trials,
        "last quarter over first": last / first,
        "searcher's share": clock.spent / whole,
        "searcher's ms per trial": 1e3 * clock.spent / trials,
        "kB per trial": watch.growth / (trials * (1 - Memory.WARM)) / 1024,
        "undelivered at the end": behind,
        "seconds until delivered": time.perf_counter() - done,
    }


class Memory:
    """What this process gains between its first trials and its last."""

    WARM = 0.2
    """Share of the trials after which growth counts: imports and caches come first."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._done, self.growth = clock, threading.Event(), 0

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._look)
        self._trials = int(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT[0]
        self._thread.start()

    def _look(self) -> None:
        warm = 0
        while not self._done.wait(0.2):
            if not warm and len(self._clock.starts) >= self.WARM * self._trials:
                warm = resident()
        self.growth = resident() - warm

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _always(trainable: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def trained_by(choice: Any, spec: Any, settings: Any, wanted: int) -> Any:
        yield trainable, {"cpu": 1.0, "gpu": 0.0}, 2

    return trained_by


def growth(sampler: str, trials: int) -> list[float]:
    """CPU time that proposing and telling a trial takes in each tenth of the trials, over the second tenth: the first one starts the sampler."""
    from study.tuning.search import Search

    times = [time.process_time()]
    with TemporaryDirectory() as folder:
        search = Search(spec_of(trials, sampler), Path(folder) / "journal.log")
        for number in range(1, trials + 1):
            proposal = search.ask()
            assert proposal is not None
            search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), proposal.trial.optimizer.lr)
            if number % (trials // 10) == 0:
                times.append(time.process_time())
    spans = [later - earlier for earlier, later in itertools.pairwise(times)]
    return [span / spans[1] for span in spans]


def main(numbers: list[int]) -> None:
    """Prints one line for each number of trials, and the ratios between the last and the first."""
    found = []
    for trials in numbers:
        command = [sys.executable, "-m", "tests.benchmarks.scale", "--one", str(trials)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()), flush=True)
    if len(found) > 1:
        ratios = {name: found[-1][name] / found[0][name] for name in found[0] if found[0][name]}
        print("ratios: " + ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(measured(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "random")))
    elif "--search" in sys.argv:
        print(" ".join(f"{ratio:.2f}" for ratio in growth(sys.argv[2], int(sys.argv[3]))))
    else:
        main([int(word) for word in sys.argv[1:]] or list(DEFAULT))
