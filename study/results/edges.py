"""Edges: whether a value lies at an end of its axis, and how far the axis should be widened then.

low                                             high
 ├──┼───────────────────────────────────────┼──┤          in logarithms on a log axis
 <5%                                       >95%  ───────> a third longer, as far as the field takes it
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from study.fields import refusal, takes_whole_numbers
from study.results.wording import number
from study.space import Axis

NEAR = 0.05
"""The share of an axis that counts as its end."""

LONGER = 1 / 3, 1 / 10, 1 / 30
"""By how much an axis is to be longer: the first of these shares that the field takes."""

LEAST_CHOICES = 3
"""Of fewer numbers to choose from, each is at an end."""


@dataclass(frozen=True, slots=True)
class End:
    """An end of an axis."""

    side: Literal["lower", "upper", "smallest", "largest"]
    bound: float
    """Where the axis ends."""
    remedy: str
    """How to widen it."""


def near_end(path: str, axis: Axis, value: Any) -> End | None:
    """The end of the axis that a value lies at; None where it lies elsewhere, or the field takes nothing beyond.

    Args:
        path: The axis's field.
        axis: The axis.
        value: A value of it, such as that of the best trial.
    """
    if isinstance(value, bool | str) or value is None or not math.isfinite(value):
        return None
    if axis.choices is not None:
        return _end_of_choices(path, axis, float(value))
    assert axis.low is not None and axis.high is not None
    low, high, place = (math.log(end) if axis.log else end for end in (axis.low, axis.high, max(value, axis.low)))
    share = (place - low) / (high - low)
    if NEAR < share < 1 - NEAR:
        return None
    up = share > 0.5
    bound = next((bound for bound in _bounds(path, axis, up) if _takes(path, bound)), None)
    if bound is None:
        return None
    side, field = ("upper", "high") if up else ("lower", "low")
    return End(side, axis.high if up else axis.low, f"set {field} to {number(bound)} in space.{path}")  # type: ignore[arg-type]


def _bounds(path: str, axis: Axis, up: bool) -> Iterator[float]:
    """Round numbers beyond an end, the most generous first."""
    assert axis.low is not None and axis.high is not None
    end = axis.high if up else axis.low
    for share in LONGER:
        if axis.log:
            wider = end * (axis.high / axis.low) ** (share if up else -share)
        else:
            wider = end + (1 if up else -1) * share * (axis.high - axis.low)
        if axis.step is not None or takes_whole_numbers(path, axis):
            step = axis.step or 1
            yield end + (1 if up else -1) * step * max(1, round(abs(wider - end) / step))
            continue
        for digits in (1, 2, 3):
            rounded = float(f"{wider:.{digits}g}")
            if (rounded > end) if up else (rounded < end):
                yield rounded


def _takes(path: str, value: float) -> bool:
    return refusal(path, int(value) if float(value).is_integer() else value) is None


def _end_of_choices(path: str, axis: Axis, value: float) -> End | None:
    numbers = sorted(float(choice) for choice in axis.choices or () if isinstance(choice, int | float) and not isinstance(choice, bool))
    if len(numbers) < LEAST_CHOICES or value not in (numbers[0], numbers[-1]):
        return None
    up = value == numbers[-1]
    end, neighbour = (numbers[-1], numbers[-2]) if up else (numbers[0], numbers[1])
    # Choices of whole orders of magnitude go on by ratios.
    geometric = numbers[0] > 0 and numbers[-1] / numbers[0] >= 10
    beyond = float(f"{end * end / neighbour if geometric else 2 * end - neighbour:.3g}")
    if not _takes(path, beyond):
        return None
    return End("largest" if up else "smallest", end, f"add {number(beyond)} to the choices of space.{path}")
