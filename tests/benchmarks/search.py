"""How many trials each way of searching needs, on surfaces with the ridge of lr x weight decay.

python -m tests.benchmarks.search            prints the tables of docs/coordinates.md; some minutes on one core

surface     value at (lr, weight decay)                                                                       trials
ridge       a parabola: steep across lr x weight decay, flat along it                                         computed
cliff       a ridge of error rates that saturates away from it, and diverges beyond a learning rate            computed
digits      validation error of a ResNet, interpolated between trials that were trained once (digits.csv)     looked up

All searches are this project's own: `study.tuning.search.Search` on a journal, PARALLEL trials asked before the first of them is told.
Both pairs of coordinates have boxes of equal size (in decades) and equal center; a wide one holds all products of the other pair's. A level
of 95% is 95% of the way from a surface's median over the box of lr and weight decay to its best value over that box and the one of equal
size. The first ten trials of tpe are a Sobol sequence in either box.
"""

import csv
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from study.measurement import Ending, Outcome
from study.spec import StudySpec, check
from study.tuning.search import Search
from tests.benchmarks.search_table import TABLE

SEEDS = range(24)
TRIALS, PARALLEL = 64, 4
LEVELS = 0.95, 0.99
RESAMPLES = 2000
SHOWN = 8, 16, 32, 64

LR, DECAY, PRODUCT, ALL_PRODUCTS = (-3.0, 0.0), (-5.0, -1.0), (-6.5, -2.5), (-8.0, -1.0)
"""Boxes of log10; the third is as wide as the second, and has its center where the first two have theirs; the last has all of their products."""

AXES = {
    "decay": {"optimizer.lr": LR, "optimizer.weight_decay": DECAY},
    "intrinsic": {"optimizer.lr": LR, "optimizer.intrinsic_lr": PRODUCT},
    "wide": {"optimizer.lr": LR, "optimizer.intrinsic_lr": ALL_PRODUCTS},
}

WAYS = {
    "random": ("random", "decay"),
    "sobol": ("sobol", "decay"),
    "tpe": ("tpe", "decay"),
    "tpe, intrinsic": ("tpe", "intrinsic"),
    "tpe, intrinsic, wide": ("tpe", "wide"),
    "random, intrinsic": ("random", "intrinsic"),
}
"""Sampler and coordinates; the last one tells what the coordinates' box alone does."""

Surface = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values at log10 of lr and log10 of weight decay; NaN where a trial diverges."""


def ridge(lr: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """A parabola that is twelve times as steep across the ridge as along it, so that its axes are oblique to lr and weight decay."""
    return np.asarray(((lr + decay + 4.3) / 0.5) ** 2 + ((lr + 1.2) / 1.7) ** 2)


def cliff(lr: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Errors between 2% and 90%; from lr 0.5 on, less with strong decay, trials diverge."""
    across, along = (lr + decay + 4.6) / 0.8, (lr + 0.9) / 1.5
    error = 0.9 - 0.88 * np.exp(-(across**2) - along**2)
    return np.asarray(np.where(lr + 0.2 * (decay + 5) > 0.1, math.nan, error))


@cache
def _looked_up() -> RegularGridInterpolator:
    with TABLE.open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    axes = [sorted({row[name] for row in rows}) for name in ("lr", "weight_decay")]
    values = {(row["lr"], row["weight_decay"]): row["error"] for row in rows}
    grid = [[values[lr, decay] for decay in axes[1]] for lr in axes[0]]
    return RegularGridInterpolator([np.log10(axis) for axis in axes], np.array(grid))


def digits(lr: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Bilinear in the logarithms. Decay beyond the table counts as its nearest: less does nothing in so few steps, more guesses."""
    low, high = _looked_up().grid[1][[0, -1]]
    return np.asarray(_looked_up()(np.stack((np.clip(lr, -3, 0), np.clip(decay, low, high)), -1)))


SURFACES: dict[str, Surface] = {"ridge": ridge, "cliff": cliff, "digits": digits}

TARGETS = {"ridge": "<= 0.7", "cliff": "<= 0.7", "digits": "<= 1"}
"""Of trials in intrinsic coordinates over trials of tpe on lr and weight decay."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What there is to be found on a surface."""

    best: float
    median: float
    shares: dict[str, float]
    """How much of each pair of coordinates' box reaches the first level."""

    def value(self, level: float) -> float:
        """What a trial must have for a level."""
        return self.median - level * (self.median - self.best)


@cache
def goal(name: str) -> Goal:
    """From a fine grid over either box."""
    side = np.linspace(0, 1, 401)
    one, other = np.meshgrid(side, side, indexing="ij")
    lr = LR[0] + one * (LR[1] - LR[0])
    decay = {name: low + other * (high - low) for name, (low, high) in (("decay", DECAY), ("intrinsic", PRODUCT), ("wide", ALL_PRODUCTS))}
    decay = {name: logarithm if name == "decay" else logarithm - lr for name, logarithm in decay.items()}
    values = {coordinates: np.nan_to_num(SURFACES[name](lr, logarithm), nan=np.inf) for coordinates, logarithm in decay.items()}
    best, median = min(float(values[name].min()) for name in ("decay", "intrinsic")), float(np.median(values["decay"]))
    value = Goal(best, median, {}).value(LEVELS[0])
    return Goal(best, median, {coordinates: float((found <= value).mean()) for coordinates, found in values.items()})


def spec(sampler: str, coordinates: str, seed: int) -> StudySpec:
    """A study that searches a surface."""
    space = {path: {"low": 10**low, "high": 10**high, "log": True} for path, (low, high) in AXES[coordinates].items()}
    return check({"name": "search", "space": space, "search": {"sampler": sampler, "trials": TRIALS, "seed": seed}})


def searched(surface: Surface, study: StudySpec) -> np.ndarray:
    """The best value so far after each trial of one search; infinite before the first that does not diverge."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        search = Search(study, Path(folder) / "journal.log")
        while len(found) < TRIALS:
            asked = [proposal for _ in range(PARALLEL) if (proposal := search.ask()) is not None]
            for proposal in asked:
                optimizer = proposal.trial.optimizer
                value = surface(np.log10(optimizer.lr), np.log10(optimizer.weight_decay)).item()
                if math.isnan(value):
                    search.tell(proposal.trial_id, Ending(Outcome.DIVERGED, "nan"), None)
                else:
                    search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), value)
                found.append(math.inf if math.isnan(value) else value)
    return np.minimum.accumulate(found)


@cache
def curves(name: str, way: str) -> np.ndarray:
    """Best so far after each trial: [seeds, trials]."""
    sampler, coordinates = WAYS[way]
    return np.array([searched(SURFACES[name], spec(sampler, coordinates, seed)) for seed in SEEDS])


def needed(curve: np.ndarray, value: float) -> float:
    """After how many trials a curve is at a value; one more than all where it never is."""
    reached = np.flatnonzero(curve <= value)
    return float(reached[0] + 1) if len(reached) else float(len(curve) + 1)


def averaged(many: np.ndarray, worst: float) -> np.ndarray:
    """The mean best so far; before anything was found, the surface's median counts."""
    return np.asarray(np.minimum(many, worst).mean(0))


def compared(name: str, way: str, level: float, base: str = "tpe") -> tuple[float, tuple[float, float]]:
    """Trials of one way over trials of another until their mean best so far is at the level, with a 95% bootstrap interval over seeds."""
    aim, draw = goal(name), np.random.default_rng(0)
    value = aim.value(level)
    ours, theirs = (np.minimum(curves(name, each), aim.median) for each in (way, base))

    def ratio(seeds: np.ndarray) -> float:
        return needed(ours[seeds].mean(0), value) / needed(theirs[seeds].mean(0), value)

    resampled = [ratio(draw.integers(len(SEEDS), size=len(SEEDS))) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return ratio(np.arange(len(SEEDS))), (float(low), float(high))


def measure() -> Iterator[tuple[str, list[float], str]]:
    """For tests.benchmarks.run: trials of tpe in intrinsic coordinates over trials of tpe until each seed is at the level."""
    for name in SURFACES:
        value = goal(name).value(LEVELS[0])
        pairs = zip(curves(name, "tpe, intrinsic"), curves(name, "tpe"), strict=True)
        yield (
            f"trials to 95%: tpe on (intrinsic_lr, lr) / tpe on (lr, weight_decay): {name}",
            [needed(a, value) / needed(b, value) for a, b in pairs],
            TARGETS[name],
        )


def rows(name: str) -> Iterator[str]:
    """One surface's rows: its mean best so far on the way, and what each way needs."""
    aim = goal(name)
    for way, (_, coordinates) in WAYS.items():
        mean = averaged(curves(name, way), aim.median)
        gone = [(aim.median - float(mean[trials - 1])) / (aim.median - aim.best) for trials in SHOWN]
        trials = [cell for level in LEVELS for cell in (_trials(needed(mean, aim.value(level))), _over_tpe(name, way, level))]
        yield f"| {' | '.join((name, way, f'{aim.shares[coordinates]:.1%}', *(f'{share:.1%}' for share in gone), *trials))} |"


def _trials(number: float) -> str:
    return f"{number:.0f}" if number <= TRIALS else f"more than {TRIALS}"


def _over_tpe(name: str, way: str, level: float) -> str:
    if way == "tpe":
        return "1"
    ratio, (low, high) = compared(name, way, level)
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def main(names: Sequence[str] = tuple(SURFACES)) -> None:
    """Prints the table."""
    heads = ("surface", "way", "box at 95%", *(f"after {trials}" for trials in SHOWN))
    print("|", " | ".join((*heads, *(head for level in LEVELS for head in (f"trials to {level:.0%}", "over tpe")))), "|")
    print("|---" * (len(heads) + 2 * len(LEVELS)) + "|")
    for name in names:
        print(*rows(name), sep="\n", flush=True)


if __name__ == "__main__":
    main()
