"""A whole study against plain Ray Tune with its own OptunaSearch and MLflow callback: processes from beginning to end, in turn.

Both search the same space with ASHA, in the same number of trials of the same network on the same data. Plain Tune trains the bare loop
and reports three metrics an epoch; ours traces every layer as well, and asks its own Optuna sampler, so the trials are alike, not equal.
`all` is the whole process, `warm` what follows its first result, `cpu` CPU seconds of all processes, which other work on the machine
disturbs least. Every study has a home of its own, so that what a machine remembers between studies (MLflow's tables, a model's
self-test) is counted each time.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIALS, GRACE, REDUCTION = 27, 1, 3
EPOCHS = {"resnet": 9, "mlp": 9, "mlp, batch 16, long": 243}
"""Of a trial that is not stopped."""

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1]}, "data": {"label_noise": 0.1}},
    "mlp": {"model": {"name": "mlp", "width": 128}, "data": {"label_noise": 0.1}},
    "mlp, batch 16, long": {"model": {"name": "mlp", "width": 128}, "data": {"label_noise": 0.1, "batch_size": 16}},
}
ROOT = Path(__file__).parents[2]
TARGETS = {("resnet", "all"): ">= 1.5", ("mlp", "all"): ">= 2.5", ("resnet", "warm"): ">= 2.5", ("mlp", "warm"): ">= 10"}
REUSED, DEFAULT = "plain Tune, reused actors", "plain Tune, its default"


def measure(rounds: int = 1) -> Iterator[tuple[str, list[float], str]]:
    """How many times as fast as plain Tune: in all and after the first result, with MLflow and without; then as its default, without reuse."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = _Runs(Path(scratch))
        for network in NETWORKS:
            for flags in ([], ["--mlflow"]):
                with_mlflow = "MLflow" if flags else "no MLflow"
                pairs = [(runs.plain(network, *flags, "--reuse"), runs.ours(network, "fused", *flags)) for _ in range(rounds)]
                for part in ("all", "warm", "cpu"):
                    title = f"{REUSED} / fused: {network}, {with_mlflow}, {part}"
                    yield title, [plain[part] / ours[part] for plain, ours in pairs], TARGETS.get((network, part), "")
            # What `study run` does unless it is told otherwise, against the last of the plain ones.
            auto = runs.ours(network, "auto", "--mlflow")
            yield f"{REUSED} / auto: {network}, MLflow, all", [pairs[-1][0]["all"] / auto["all"]], ">= 1"
            yield f"occupancy of the fused engines: {network}", [ours["occupancy"] for _, ours in pairs], ">= 0.9"
        default, fused = runs.plain("mlp"), runs.ours("mlp", "fused")
        for part in ("all", "warm", "cpu"):
            yield f"{DEFAULT} / fused: mlp, no MLflow, {part}", [default[part] / fused[part]], ">= 8" if part == "all" else ""


class _Runs:
    """Studies in processes of their own, each in its folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0

    def plain(self, network: str, *flags: str) -> dict[str, float]:
        return self._run("plain_tune", network, *flags)

    def ours(self, network: str, engine: str, *flags: str) -> dict[str, float]:
        return self._run("our_tune", network, engine, *flags)

    def _run(self, module: str, *arguments: str) -> dict[str, float]:
        """What a benchmark's process printed last."""
        self._count += 1
        command = [sys.executable, "-m", f"tests.benchmarks.{module}", str(self._scratch / str(self._count)), *arguments]
        done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
