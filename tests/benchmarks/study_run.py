"""`study run` against plain Ray Tune with its own OptunaSearch and MLflow callback: whole processes, the same trials, alternating.

Both train the same model on the same data for the same number of epochs in the same number of trials, without early stopping, into a
fresh SQLite store. Plain Tune trains the bare loop and reports three metrics an epoch; ours traces every layer as well.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PAIRS = 3
TRIALS, EPOCHS = 16, 9
SPEC = Path(__file__).parents[2] / "search_spaces" / "quickstart.yaml"
OVERRIDES = {
    "search.trials": TRIALS,
    "trial.schedule.epochs": EPOCHS,
    "stopping.scheduler": "none",
    "space.optimizer.gamma": "{choices: [none, all]}",
}


def measure() -> Iterator[tuple[str, list[float], str]]:
    """Wall time of `study run` over that of plain Tune, with and without reused actors."""
    for title, flags in (("reused actors", ["--reuse"]), ("Tune's default", [])):
        pairs = []
        for _ in range(PAIRS):
            with tempfile.TemporaryDirectory() as scratch:
                ours = _seconds([sys.executable, "-m", "study", "run", str(SPEC), "--home", f"{scratch}/ours", *_overrides()])
                plain = _seconds([sys.executable, "-m", "tests.benchmarks.plain_tune", f"{scratch}/plain", str(TRIALS), str(EPOCHS), *flags])
                pairs.append(ours / plain)
        yield f"study run / plain Ray Tune, OptunaSearch, MLflow ({title})", pairs, "<= 1.00"


def _overrides() -> list[str]:
    return [part for path, value in OVERRIDES.items() for part in ("--set", f"{path}={value}")]


def _seconds(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=SPEC.parents[1], capture_output=True)
    return time.monotonic() - start
