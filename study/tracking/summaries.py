"""Summaries: what a trial's layers and measurements come down to, as numbers that MLflow can show.

    samples of one step ──> effective_lr/<layer>  rotation/<layer>  weight_norm/<layer>  and the medians over layers
    the last 30% of them ──> final/rotation/*  final/rotation_ratio/*  (root mean square)   final/effective_lr/*  final/equilibrated  (mean)
    measurements ──────────> final/<metric>  (the last value)          best/<objective>     (the best value)

Nothing here is ever inf or NaN: a value that is not finite is left out. Nothing here takes more memory for a longer trial: whatever
is said of a whole trial comes of reading its measurements one by one, at most twice.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple

from study.measurement import LayerSample, Measurement, finite, layer_medians
from study.spec import ObjectiveSpec

MANY_LAYERS = 64
"""With more traced layers than this, only medians and extremes are metrics."""

MOST_POINTS = 1000
"""Points of one metric over a whole trial, about; `trace.parquet` has every sample."""

TAIL = 3, 10
"""The share of a trial's last samples that its final values are taken over."""

QUANTITIES = ("effective_lr", "rotation", "weight_norm")
"""What becomes a series per layer."""

RATIO = "rotation_ratio"
"""Measured over expected rotation."""

EQUILIBRATED = "equilibrated"
"""Share of scale-invariant layers that had five relaxation times; 1 over the tail where all of them had, throughout."""

AVERAGED = ("effective_lr/", EQUILIBRATED)
"""Final values that are means; the others are root mean squares."""

FINAL = "final/"
"""Where the values of a trial's end are; a trial may measure some of them itself, at its last epoch."""


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of a trial, without its points."""

    points: int
    last: Point
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Overview:
    """What a trial's measurements come down to."""

    series: Mapping[str, Series]
    """Every metric that has a point."""
    sampled: int
    """Steps at which layers were sampled."""
    all_layers: bool
    """Whether the medians are over all layers, as none of them is scale-invariant."""
    whole: Measurement
    """The trial as one interval: its last step, epoch and values, no samples, the seconds of all."""

    def latest(self) -> dict[str, float]:
        """The value of every metric at its last step."""
        return {name: series.last.value for name, series in self.series.items()}


def points(measurement: Measurement, epochs: int) -> list[Point]:
    """The series that one measurement adds to, layers first; each metric once per step.

    A measurement's own medians over layers are left out where its samples give the same series, step by step; so are `final/...`
    values, which are no series: `summary` has them. With many sampled steps each series keeps its extremes and what fits between.

    Args:
        measurement: One of a trial's.
        epochs: How many epochs the trial is to have: its measurements share MOST_POINTS evenly.
    """
    series = [Point(name, step, value) for step, layers in _steps(measurement.samples) for name, value in _logged(layers).items()]
    known = {point.name for point in series}
    own = {name: value for name, value in finite(measurement.values).items() if name not in known and not name.startswith(FINAL)}
    return _thinned(series, max(2, MOST_POINTS // epochs)) + [Point(name, measurement.step, value) for name, value in own.items()]


def overview(measurements: Iterable[Measurement], epochs: int) -> Overview:
    """All that a trial measured, oldest first, in one reading.

    Args:
        measurements: May be read once only.
        epochs: As in `points`.
    """
    series: dict[str, Series] = {}
    sampled, invariant, whole = 0, False, Measurement(0, 0, {})
    for measurement in measurements:
        for point in points(measurement, epochs):
            series[point.name] = _longer(series.get(point.name), point)
        sampled += len({sample.step for sample in measurement.samples})
        invariant = invariant or any(sample.scale_invariant for sample in measurement.samples)
        whole = Measurement(measurement.step, measurement.epoch, measurement.values, seconds=whole.seconds + measurement.seconds)
    return Overview(series, sampled, sampled > 0 and not invariant, whole)


def summary(seen: Overview, measurements: Iterable[Measurement], objective: ObjectiveSpec) -> dict[str, float]:
    """The `final/...` and `best/...` metrics of a trial, from all that it measured, oldest first.

    `final/rotation/median` is the root mean square of the series `rotation/median` over the last 30% of the sampled steps (at least
    one), not a median over layers of their root mean squares; so are the extremes.

    Args:
        seen: The overview of the same measurements.
        measurements: May be read once only.
        objective: What the trial is ranked by.
    """
    found = _tail(measurements, seen.sampled)
    for name, value in finite(seen.whole.values).items():
        found.setdefault(name if name.startswith(FINAL) else f"{FINAL}{name}", value)
    if (ranked := seen.series.get(objective.metric)) is not None:
        found[f"best/{objective.metric}"] = min(ranked.lowest, ranked.highest, key=objective.rank)
    return finite(found)


def _longer(series: Series | None, point: Point) -> Series:
    if series is None:
        return Series(1, point, point.value, point.value)
    return Series(series.points + 1, point, min(series.lowest, point.value), max(series.highest, point.value))


def _thinned(series: Sequence[Point], quota: int) -> list[Point]:
    """At most *quota* points of each metric: its smallest and its largest value in each of quota / 2 stretches of the sampled steps."""
    steps = sorted({point.step for point in series})
    if len(steps) <= quota:
        return list(series)
    stretches = {step: index * (quota // 2) // len(steps) for index, step in enumerate(steps)}
    value = attrgetter("value")
    ends: dict[tuple[str, int], tuple[Point, Point]] = {}
    for point in series:
        stretch = point.name, stretches[point.step]
        low, high = ends.get(stretch, (point, point))
        ends[stretch] = min(low, point, key=value), max(high, point, key=value)
    kept = {point for pair in ends.values() for point in pair}
    return [point for point in series if point in kept]


def _steps(samples: Iterable[LayerSample]) -> list[tuple[int, list[LayerSample]]]:
    return [(step, list(layers)) for step, layers in groupby(sorted(samples, key=attrgetter("step")), attrgetter("step"))]


def _tail(measurements: Iterable[Measurement], sampled: int) -> dict[str, float]:
    """Root mean squares and means over the last samples, of as many sampled steps as there are."""
    share, whole = TAIL
    every = (layers for measurement in measurements for _, layers in _steps(measurement.samples))
    kept = -(-share * sampled // whole)
    sums: dict[str, tuple[int, float]] = {}
    for layers in islice(every, sampled - kept, None):
        for name, value in (_logged(layers) | _ratios(layers) | _settled(layers)).items():
            count, total = sums.get(name, (0, 0.0))
            sums[name] = count + 1, total + (value if name.startswith(AVERAGED) else value * value)
    means = {name: total / count for name, (count, total) in sums.items()}
    return {
        f"{FINAL}{name}": mean if name.startswith(AVERAGED) else math.sqrt(mean)
        for name, mean in means.items()
        if name.startswith((*AVERAGED, "rotation/", f"{RATIO}/"))
    }


def _logged(layers: Sequence[LayerSample]) -> dict[str, float]:
    """The metrics of one sampled step."""
    medians = layer_medians(layers)
    if len(layers) > MANY_LAYERS:
        return _extremes(layers) | medians
    return (
        finite({f"{quantity}/{layer.layer}": value for quantity in QUANTITIES for layer in layers if (value := _of(layer, quantity)) is not None})
        | medians
    )


def _extremes(layers: Sequence[LayerSample]) -> dict[str, float]:
    """Smallest and largest over the layers that the medians are over."""
    rows = [layer for layer in layers if layer.scale_invariant] or list(layers)
    found: dict[str, float] = {}
    for quantity in (*QUANTITIES, RATIO):
        values = [value for row in rows if (value := _of(row, quantity)) is not None and math.isfinite(value)]
        if values:
            found |= {f"{quantity}/min": min(values), f"{quantity}/max": max(values)}
    return found


def _ratios(layers: Sequence[LayerSample]) -> dict[str, float]:
    if len(layers) > MANY_LAYERS:
        return {}
    return finite({f"{RATIO}/{layer.layer}": value for layer in layers if (value := _of(layer, RATIO)) is not None})


def _settled(layers: Sequence[LayerSample]) -> dict[str, float]:
    """The share of scale-invariant layers in equilibrium; nothing where there are none."""
    flags = [layer.equilibrated for layer in layers if layer.scale_invariant]
    return {EQUILIBRATED: sum(flags) / len(flags)} if flags else {}


def _of(layer: LayerSample, quantity: str) -> float | None:
    value: float | None = getattr(layer, quantity)
    return value
