"""Fused trials and solo ones: whether the errors of many random trials are drawn from one distribution.

Two engines round differently, and training amplifies it: single trials end up with other images wrong. What must not differ is how
errors are distributed over trials. Two sets of random trials, with other hyperparameters and seeds in each, so that every pair is
independent; Kolmogorov and Smirnov's two-sample test gives the probability of so large a difference between equal distributions.
"""

import random
from collections.abc import Iterator

import torch
from scipy.stats import ks_2samp

from study.engines.engine import Engine
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.trial import TrialSpec

TRIALS, ROWS, EPOCHS = 200, 8, 8
SIGNIFICANT = 0.01


def measure() -> Iterator[tuple[str, list[float], str]]:
    """The p-value of the test between solo and fused trials; then, as a check of its power, between solo trials of two ranges of lr."""
    torch.set_num_threads(1)
    solo, fused = errors("solo", seed=1), errors("fused", seed=2)
    yield f"p of equal errors: {TRIALS} solo, {TRIALS} fused trials", [p_value(solo, fused)], f"> {SIGNIFICANT}"
    yield f"p of equal errors: {TRIALS} solo trials, {TRIALS} at a third of their lr", [p_value(solo, errors("fused", seed=3, scale=1 / 3))], ""


def p_value(one: list[float], other: list[float]) -> float:
    """The probability of so large a difference between two samples of one distribution."""
    return float(ks_2samp(one, other).pvalue)


def errors(engine: str, seed: int, scale: float = 1.0, trials: int = TRIALS) -> list[float]:
    """The validation errors of random trials."""
    drawn = random_trials(seed, scale, trials)
    if engine == "fused":
        return [error for start in range(0, trials, ROWS) for error in _final(FusedEngine(ROWS), drawn[start : start + ROWS])]
    return [error for trial in drawn for error in _final(SoloEngine(), [trial])]


def random_trials(seed: int, scale: float, trials: int) -> list[TrialSpec]:
    """Small MLPs on digits with random lr, decay, gamma policy and seed."""
    draw = random.Random(seed)
    return [
        TrialSpec.model_validate(
            {
                "model": {"name": "mlp", "width": 16},
                "data": {"train_size": 512, "batch_size": 32},
                "optimizer": {
                    "lr": scale * 10 ** draw.uniform(-2.5, 0),
                    "weight_decay": 10 ** draw.uniform(-4, -1),
                    "gamma": draw.choice(["none", "all"]),
                },
                "schedule": {"epochs": EPOCHS},
                "seed": draw.randrange(1 << 30),
            }
        )
        for _ in range(trials)
    ]


def _final(engine: Engine, trials: list[TrialSpec]) -> list[float]:
    """The last validation error of each trial; 1 where it diverged."""
    for number, trial in enumerate(trials):
        engine.admit(str(number), trial)
    found: dict[str, float] = {}
    while len(found) < len(trials):
        for progress in engine.advance():
            if progress.ending is not None:
                found[progress.trial_id] = progress.measurement.values.get("val/error", 1.0)
                engine.release(progress.trial_id)
    return [found[str(number)] for number in range(len(trials))]
