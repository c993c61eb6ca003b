"""A whole study against plain Ray Tune with its own OptunaSearch and MLflow callback: the same trials in processes from beginning to end, in turn.

Both are given one list of assignments, drawn once, and train the same network with them on the same data, with the same decay and a
constant learning rate, under one ASHA of the same grace and reduction that compares all trials (gamma is no arm here): only its order of
results differs, and with it how many trials reach the next rung, which is a matter of luck among 27: `epochs` says how alike the work
was. As the points are known, neither side's sampler models anything. Plain Tune trains the bare loop and reports three metrics an epoch;
ours traces every layer as well, and records that. With MLflow, ours is all that `study run` does: table, figures, report, and what a run
holds beside its metrics; without, it is the trials and the ledger.

Of a process, as `stopwatch` draws it:

    all       from its start until it prints, which is before Python itself ends
    counted   all but the seconds in which it waits for `ray.init` and `ray.shutdown`: imports, choice and self-test of the engine, starts of workers
              and engines, trials, what follows them
    fit       from Ray's being up to the end of Tune's run: starts of workers, pool and engines, and the trials; without imports, and
              without the choice and self-test of the engine, which a home remembers
    warm      from the first result to the end of the last trial; with MLflow, until that has everything. Our first result waits until
              all processes are there, and plain Tune's does not wait for its second actor, so that ours is also measured against
              plain Tune's `fit`: engines that are warm, against actors that are started
    cpu       CPU seconds of all its processes, which other work on the machine disturbs least
    epochs    how many epochs of trials it trained

Every process has a home of its own, so that what a machine remembers between studies (MLflow's tables, a model's self-test) is counted
each time. What each printed goes to stderr: a study on `auto` with one slot was trained solo.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

GRACE, REDUCTION, EPOCHS = 1, 3, 9
"""Of ASHA; and of a trial that is not stopped."""

LR, DECAY, GAMMAS = (1e-2, 1.0), (1e-4, 1e-1), ("none", "all")
"""The space: two intervals in the logarithm, and a list."""

WIDE = "mlp, batch 16, 500 trials"
TRIALS = {"resnet": 27, "mlp": 27, WIDE: 500}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1]}, "data": {"label_noise": 0.1}},
    "mlp": {"model": {"name": "mlp", "width": 128}, "data": {"label_noise": 0.1}},
    WIDE: {"model": {"name": "mlp", "width": 128}, "data": {"label_noise": 0.1, "batch_size": 16}},
}

REUSED, DEFAULT = "plain, reused", "plain, default"
"""Plain Tune with `reuse_actors`, and as it is by default: a process for each trial."""

PARTS = {
    "all": ("all", "all"),
    "counted": ("counted", "counted"),
    "fit": ("fit", "fit"),
    "warm": ("warm", "warm"),
    "fit / warm": ("fit", "warm"),
    "cpu": ("cpu", "cpu"),
    "epochs": ("epochs", "epochs"),
}
"""What is compared: of plain Tune, over which of ours."""

DEFAULT_PARTS = ("all", "counted", "fit")
"""Of plain Tune by default, whose processes are never warm."""

TARGETS = {("resnet", "fit"): ">= 1.5", ("mlp", "fit"): ">= 2.5", ("resnet", "fit / warm"): ">= 2.5", ("mlp", "fit / warm"): ">= 10"}

ROOT = Path(__file__).parents[2]


class Turn(NamedTuple):
    """Processes that follow each other, so that they meet the same machine; each of plain Tune's is compared with each of ours."""

    network: str
    mlflow: bool
    plain: tuple[str, ...] = (REUSED,)
    engines: tuple[str, ...] = ("fused", "auto")
    """`auto` is what `study run` does."""


TURNS = [
    Turn("resnet", mlflow=False, plain=(REUSED, DEFAULT)),
    Turn("resnet", mlflow=True),
    Turn("mlp", mlflow=False, plain=(REUSED, DEFAULT)),
    Turn("mlp", mlflow=True),
    Turn(WIDE, mlflow=False),
    Turn(WIDE, mlflow=True, engines=("auto",)),
]
QUICK_TURNS = [turn for turn in TURNS if turn.network == "mlp"]


def assignments(network: str) -> list[dict[str, Any]]:
    """Fields of the optimizer for each trial, in the order of trials: the same in every process."""
    draw = Random(0)

    def value(ends: tuple[float, float]) -> float:
        low, high = ends
        return float(min(high, low * (high / low) ** draw.random()))

    return [{"lr": value(LR), "weight_decay": value(DECAY), "gamma": GAMMAS[number % len(GAMMAS)]} for number in range(TRIALS[network])]


def trial_of(network: str) -> dict[str, Any]:
    """What all trials have in common."""
    return {**NETWORKS[network], "schedule": {"epochs": EPOCHS, "shape": "constant"}}


def check(network: str, trained: list[dict[str, Any]]) -> None:
    """Makes sure that a process trained what it was given, each once."""
    wanted, found = (sorted(json.dumps(one, sort_keys=True) for one in each) for each in (assignments(network), trained))
    assert wanted == found, f"{len(set(wanted) - set(found))} of {len(wanted)} assignments were not trained as given, {len(found)} trials ran"


def measure(rounds: int = 1) -> Iterator[tuple[str, list[float], str]]:
    """How many times as fast as plain Tune, part by part, and how full the fused engines were."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = _Runs(Path(scratch))
        for turn in TURNS:
            found = [runs.of(turn) for _ in range(rounds)]
            settings = f"{turn.network}, {'MLflow' if turn.mlflow else 'no MLflow'}"
            for engine in turn.engines:
                for plain in turn.plain:
                    for part in PARTS if plain == REUSED else DEFAULT_PARTS:
                        above, below = PARTS[part]
                        ratios = [times[plain][above] / times[engine][below] for times in found]
                        yield f"{plain} / {engine}: {settings}, {part}", ratios, _target(turn.network, plain, engine, part)
            if "fused" in turn.engines:
                yield f"occupancy of the fused engines: {settings}", [times["fused"]["occupancy"] for times in found], ">= 0.9"


def _target(network: str, plain: str, engine: str, part: str) -> str:
    if plain == DEFAULT:
        return ">= 8" if part == "fit" else ""
    return ">= 1" if (engine, part) == ("auto", "all") else TARGETS.get((network, part), "")


class _Runs:
    """Studies in processes of their own, each in its folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0

    def of(self, turn: Turn) -> dict[str, dict[str, float]]:
        """What each process of a turn measured."""
        flags = ["--mlflow"] if turn.mlflow else []
        plain = {kind: self._run("plain_tune", turn.network, *flags, *(["--reuse"] if kind == REUSED else [])) for kind in turn.plain}
        return plain | {engine: self._run("our_tune", turn.network, engine, *flags) for engine in turn.engines}

    def _run(self, module: str, *arguments: str) -> dict[str, float]:
        """What a benchmark's process printed last, which is shown, too."""
        self._count += 1
        command = [sys.executable, "-m", f"tests.benchmarks.{module}", str(self._scratch / str(self._count)), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        found = done.stdout.splitlines()[-1]
        print(f"{' '.join([module, *arguments])}: {found}", file=sys.stderr)
        return dict(json.loads(found))
