"""Summaries: what a trial's layers and measurements come down to, as numbers that MLflow can show.

    samples of one step ──> effective_lr/<layer>  rotation/<layer>  weight_norm/<layer>  and the medians over layers
    the last 30% of them ──> final/rotation/*  final/rotation_ratio/*  (root mean square)   final/effective_lr/*  (mean)
    measurements ──────────> final/<metric>  (the last value)          best/<objective>     (the best value)

Nothing here is ever inf or NaN: a value that is not finite is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from study.measurement import LayerSample, Measurement, finite, layer_medians
from study.spec import ObjectiveSpec

MANY_LAYERS = 64
"""With more traced layers than this, only medians and extremes are metrics."""

TAIL = 3, 10
"""The share of a trial's last samples that its final values are taken over."""

QUANTITIES = ("effective_lr", "rotation", "weight_norm")
"""What becomes a series per layer."""

RATIO = "rotation_ratio"
"""Measured over expected rotation."""


FINAL = "final/"
"""Where the values of a trial's end are; a trial may measure some of them itself, at its last epoch."""


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float


def points(measurement: Measurement) -> list[Point]:
    """The series that one measurement adds to, layers first; each metric once per step.

    A measurement's own medians over layers are left out where its samples give the same series, step by step; so are `final/...`
    values, which are no series: `summary` has them.
    """
    series = [Point(name, step, value) for step, layers in _steps(measurement.samples) for name, value in _logged(layers).items()]
    known = {point.name for point in series}
    own = {name: value for name, value in finite(measurement.values).items() if name not in known and not name.startswith(FINAL)}
    return series + [Point(name, measurement.step, value) for name, value in own.items()]


def summary(measurements: Sequence[Measurement], objective: ObjectiveSpec) -> dict[str, float]:
    """The `final/...` and `best/...` metrics of a trial, from all that it measured, oldest first.

    `final/rotation/median` is the root mean square of the series `rotation/median` over the last 30% of the sampled steps (at least
    one), not a median over layers of their root mean squares; so are the extremes.
    """
    if not measurements:
        return {}
    found = _tail(sample for measurement in measurements for sample in measurement.samples)
    for name, value in finite(measurements[-1].values).items():
        found.setdefault(name if name.startswith(FINAL) else f"{FINAL}{name}", value)
    history = [point.value for measurement in measurements for point in points(measurement) if point.name == objective.metric]
    if history:
        found[f"best/{objective.metric}"] = min(history, key=objective.rank)
    return finite(found)


def all_layers_count(samples: Sequence[LayerSample]) -> bool:
    """Whether the medians are over all layers, as none of them is scale-invariant."""
    return bool(samples) and not any(sample.scale_invariant for sample in samples)


def _steps(samples: Iterable[LayerSample]) -> list[tuple[int, list[LayerSample]]]:
    return [(step, list(layers)) for step, layers in groupby(sorted(samples, key=attrgetter("step")), attrgetter("step"))]


def _tail(samples: Iterable[LayerSample]) -> dict[str, float]:
    """Root mean squares and means over the last samples."""
    steps = _steps(samples)
    share, whole = TAIL
    kept = -(-share * len(steps) // whole)
    series: dict[str, list[float]] = {}
    for _, layers in steps[len(steps) - kept :]:
        for name, value in (_logged(layers) | _ratios(layers)).items():
            series.setdefault(name, []).append(value)
    found = {}
    for name, values in series.items():
        if name.startswith("effective_lr/"):
            found[f"{FINAL}{name}"] = sum(values) / len(values)
        elif name.startswith(("rotation/", f"{RATIO}/")):
            found[f"{FINAL}{name}"] = math.sqrt(sum(value * value for value in values) / len(values))
    return found


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


def _of(layer: LayerSample, quantity: str) -> float | None:
    value: float | None = getattr(layer, quantity)
    return value


def latest(series: Iterable[Point], finals: Mapping[str, float]) -> dict[str, float]:
    """The value of every metric at its last step, and the final ones: what an MLflow run shows."""
    last: dict[str, Point] = {}
    for point in series:
        if point.name not in last or point.step >= last[point.name].step:
            last[point.name] = point
    return {name: point.value for name, point in last.items()} | dict(finals)
