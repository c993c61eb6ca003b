"""A whole study against plain Ray Tune with its own OptunaSearch and MLflow callback: processes from beginning to end, alternating.

Both search the same space with ASHA, in the same number of trials of the same network on the same data. Plain Tune trains the bare loop
and reports three metrics an epoch; ours traces every layer as well, and asks its own Optuna sampler, so the trials are alike, not equal.
`all` is the whole process, `warm` what follows its first result.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIALS, EPOCHS, GRACE, REDUCTION = 27, 9, 1, 3
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1]}, "data": {"label_noise": 0.1}},
    "mlp": {"model": {"name": "mlp", "width": 128}, "data": {"label_noise": 0.1}},
}
PAIRS = 1
ROOT = Path(__file__).parents[2]


def measure() -> Iterator[tuple[str, list[float], str]]:
    """How many times as fast as plain Tune: with reused actors and without, in all and after the first result, with MLflow and without."""
    for network in NETWORKS:
        for flags in (["--mlflow"], []):
            yield from _compared(network, flags, ["--reuse"], "plain Tune, reused actors")
    yield from _compared("resnet", ["--mlflow"], [], "plain Tune, its default")


def _compared(network: str, flags: list[str], plain_flags: list[str], against: str) -> Iterator[tuple[str, list[float], str]]:
    times: dict[str, list[dict[str, float]]] = {"auto": [], "fused": [], "plain": []}
    for _ in range(PAIRS):
        with tempfile.TemporaryDirectory() as scratch:
            times["plain"].append(_times("plain_tune", f"{scratch}/plain", network, *flags, *plain_flags))
            for engine in ("auto", "fused"):
                times[engine].append(_times("our_tune", f"{scratch}/{engine}", network, engine, *flags))
    for engine in ("auto", "fused"):
        for part in ("all", "warm"):
            ratios = [plain[part] / ours[part] for plain, ours in zip(times["plain"], times[engine], strict=True)]
            with_mlflow = "MLflow" if flags else "no MLflow"
            yield f"{against} / engine {engine}: {network}, {with_mlflow}, {part}", ratios, TARGETS.get((network, part), "")


TARGETS = {("resnet", "all"): ">= 1.5", ("mlp", "all"): ">= 2.5", ("resnet", "warm"): ">= 2.5", ("mlp", "warm"): ">= 10"}


def _times(module: str, *arguments: str) -> dict[str, float]:
    """What a benchmark's process printed last."""
    done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{module}", *arguments], check=True, cwd=ROOT, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))
