"""Wording: how numbers and lists read in sentences for people."""

import math
from collections.abc import Sequence


def number(value: float | None) -> str:
    """A value to four significant digits; `-` for none.

    >>> number(0.013927)
    '0.01393'
    """
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def span(interval: Sequence[float] | None) -> str:
    """An interval as `0.01 to 0.02`; `-` for none."""
    return "-" if interval is None else " to ".join(map(number, interval))


def listed(words: Sequence[str], most: int = 4) -> str:
    """Words as `a, b and c`; of more than *most*, the first ones and how many others there are.

    >>> listed(["none", "last", "all"])
    'none, last and all'
    """
    kept = list(words) if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} others"]
    return " and ".join(part for part in (", ".join(kept[:-1]), *kept[-1:]) if part)


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 trial`, `3 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
