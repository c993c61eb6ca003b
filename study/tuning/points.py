"""Points: what a search can propose before it has learnt anything, and what it must not propose twice. Knows nothing of Optuna.

    axes ─┬─ exists ───────> whether an axis is there at a point (`when`)
          ├─ lies_on ──────> whether a value lies on an axis
          ├─ combinations ─> every point of a finite space, each once
          └─ sobol_point ──> points that fill a space evenly

A *point* is an assignment of the nuisance axes; it is complete when every axis that exists at it has a value.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from study.document import parse_value
from study.errors import Problem, SpecError
from study.fields import stored
from study.problems import shown
from study.space import Assignment, Axis, arm_label
from study.spec import StudySpec

MOST_COMBINATIONS = 20_000
"""Points that a finite space may have to be enumerated; a larger one is not expected to run out."""

_MISSING = object()


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for each trial: Optuna does not store the state of its samplers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


def parents_first(axes: Mapping[str, Axis]) -> list[str]:
    """Paths in an order in which every condition is decided before the axis that it governs."""
    order: list[str] = []
    waiting = list(axes)
    while waiting:
        ready = [path for path in waiting if not any(parent in waiting for parent in axes[path].when)] or waiting[:1]
        order += ready
        waiting = [path for path in waiting if path not in ready]
    return order


def exists(axis: Axis, known: Assignment) -> bool:
    """Whether an axis is there, where its parents have these values."""
    return all(known.get(parent, _MISSING) == value for parent, value in axis.when.items())


def key_of(point: Assignment) -> str:
    """Equal for equal points only: 1, 1.0 and true differ."""
    return json.dumps(point, sort_keys=True)


def values_on(axis: Axis, integer: bool) -> Sequence[Any] | None:
    """The values of an axis in order; None where there are more than can be listed."""
    if axis.choices is not None:
        return axis.choices
    assert axis.low is not None and axis.high is not None
    if axis.step is None and not integer:
        return None
    step = axis.step or 1
    number = int((axis.high - axis.low) / step + 1e-9) + 1
    if number > MOST_COMBINATIONS:
        return None
    return [snapped(axis, integer, axis.low + step * index) for index in range(number)]


def snapped(axis: Axis, integer: bool, value: Any) -> Any:
    """A value of an axis as this axis writes it: one form for each point, so that points can be compared."""
    if axis.choices is not None:
        return axis.choices[index_of(axis.choices, value) or 0]
    if integer:
        return round(value)
    assert axis.low is not None and axis.high is not None
    return min(float(axis.high), float(axis.low + axis.step * round((value - axis.low) / axis.step))) if axis.step else float(value)


def lies_on(axis: Axis, integer: bool, value: Any) -> bool:
    """Whether a search may draw this value of an axis."""
    if axis.choices is not None:
        return index_of(axis.choices, value) is not None
    assert axis.low is not None and axis.high is not None
    if (
        isinstance(value, bool)
        or not isinstance(value, int if integer else int | float)
        or not axis.low <= value <= axis.high + (axis.step or 0) * 1e-9
    ):
        return False
    steps = (value - axis.low) / axis.step if axis.step else 0.0
    return math.isclose(steps, round(steps), rel_tol=1e-9, abs_tol=1e-9)


def index_of(choices: Sequence[Any], value: Any) -> int | None:
    """Which choice a value is: by type, too, as `true == 1` in Python. A whole number stands for a float."""
    same = [index for index, choice in enumerate(choices) if type(choice) is type(value) and choice == value]
    near = [index for index, choice in enumerate(choices) if not isinstance(choice, bool) and not isinstance(value, bool) and choice == value]
    return next(iter(same or near), None)


def combinations(spec: StudySpec, arm: Assignment) -> list[Assignment] | None:
    """Every point of an arm, the last axis fastest; None where they cannot be listed."""
    values_of = {path: values_on(spec.space[path], spec.integer(path)) for path in parents_first(spec.nuisance)}
    if None in values_of.values():
        return None
    points: list[Assignment] = [{}]
    for path, values in values_of.items():
        axis = spec.space[path]
        if values is None or len(points) * len(values) > MOST_COMBINATIONS:
            return None
        points = [drawn for point in points for drawn in ([{**point, path: value} for value in values] if exists(axis, arm | point) else [point])]
    return points


def planned(spec: StudySpec) -> dict[str, int]:
    """How many trials each arm can have: its share of `search.trials`, or fewer where its space has no more points."""
    share = spec.search.trials // len(spec.arms)
    sizes = {arm_label(arm): combinations(spec, arm) for arm in spec.arms}
    return {label: share if points is None else min(share, len(points)) for label, points in sizes.items()}


def size_warnings(spec: StudySpec) -> Iterator[str]:
    """What a careful colleague says of a finite space and a number of trials that do not fit."""
    share = spec.search.trials // len(spec.arms)
    sizes = {arm_label(arm): len(points) for arm in spec.arms if (points := combinations(spec, arm)) is not None}
    for label, size in sizes.items():
        where = "the space" if len(spec.arms) == 1 else f"arm {label}"
        if size < share:
            yield f"{where} has {size} combinations: its search ends after these, before its {share} trials"
        elif size > share and spec.search.sampler == "grid":
            yield f"{where} has a grid of {size} points: {share} of them are tried, drawn at random and the same in every arm"


def grid(points: list[Assignment], share: int, seed: int) -> list[Assignment]:
    """A grid in the order of trying: as listed where all of it is tried, else shuffled, so that what is tried lies all over it."""
    return points if len(points) <= share else random.Random(seed_of(seed, -2)).sample(points, len(points))


def sobol_point(spec: StudySpec, local: int) -> Assignment:
    """Point number `local` of a scrambled Sobol sequence over the nuisance axes, the same in every arm."""
    from scipy.stats import qmc  # takes a second to import, which commands that only read need not wait for

    axes = spec.nuisance
    sequence = qmc.Sobol(len(axes), scramble=True, rng=seed_of(spec.search.seed, -1))
    unit = sequence.fast_forward(local).random(1)[0] if local else sequence.random(1)[0]
    return {path: _at(axis, spec.integer(path), float(share)) for (path, axis), share in zip(axes.items(), unit, strict=True)}


def _at(axis: Axis, integer: bool, share: float) -> Any:
    """The value at a share in [0, 1) of an axis."""
    if axis.choices is not None:
        return axis.choices[int(share * len(axis.choices))]
    assert axis.low is not None and axis.high is not None
    low, high = float(axis.low), float(axis.high)
    step = float(axis.step or (1 if integer else 0))
    if step:
        value = low + step * int(share * (int((high - low) / step + 1e-9) + 1)) if not axis.log else low * ((high + 1) / low) ** share
    else:
        value = low * (high / low) ** share if axis.log else low + (high - low) * share
    return int(value) if integer else min(value, high)


def wished(spec: StudySpec, texts: Sequence[str]) -> list[tuple[Assignment, Assignment]]:
    """Points that the user wants tried first, each with the scientific values that it names, from text such as `{"optimizer.lr": 0.1}`.

    Raises:
        SpecError: with every problem of all of them.
    """
    found, problems = [], []
    for text in texts:
        point, wrong = _wish(spec, text)
        problems += wrong
        found.append((_part(spec, point, "nuisance"), _part(spec, point, "scientific")))
    if problems:
        raise SpecError(problems)
    return found


def _wish(spec: StudySpec, text: str) -> tuple[Assignment, list[Problem]]:
    try:
        tree = parse_value(text)
    except ValueError as error:
        return {}, [Problem("enqueue", f"is not valid YAML or JSON: {error}", "--enqueue", "write {path: value}")]
    if not isinstance(tree, Mapping) or not tree:
        return {}, [Problem("enqueue", f"must be a mapping of axes to values (got {shown(tree)})", "--enqueue", "write {path: value}")]
    problems = []
    point: Assignment = {}
    for path, given in tree.items():
        where, axis, value = f"--enqueue {path}", spec.space.get(str(path)), stored(str(path), given)
        if axis is None:
            problems.append(Problem("enqueue", f"is no axis of this study (got {shown(path)})", "--enqueue", f"name one of {', '.join(spec.space)}"))
        elif not lies_on(axis, spec.integer(path), value):
            ends = f"one of {', '.join(map(shown, axis.choices))}" if axis.choices else f"a value on {axis.low} to {axis.high}"
            problems.append(Problem("enqueue", f"does not lie on its axis (got {shown(given)})", where, f"use {ends}"))
        else:
            point[path] = snapped(axis, spec.integer(path), value)
    return point, problems or [*_unfit(spec, point)]


def _unfit(spec: StudySpec, point: Assignment) -> Iterator[Problem]:
    """What speaks against a point whose values lie on their axes: a condition that does not hold, or a trial that it does not make."""
    for path in point:
        for parent, value in spec.space[path].when.items():
            if point.get(parent, value) != value:
                yield Problem(
                    "enqueue", f"exists only where {parent} is {shown(value)} (got {shown(point[parent])})", f"--enqueue {path}", "leave one out"
                )
    if set(point) == set(spec.space):
        try:
            spec.trial_for(point)
        except SpecError as error:
            yield Problem("enqueue", f"does not make a trial: {error.problems[0].message}", "--enqueue", "change its values")


def _part(spec: StudySpec, point: Assignment, role: str) -> Assignment:
    return {path: value for path, value in point.items() if spec.space[path].role == role}
