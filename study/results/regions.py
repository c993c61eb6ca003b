"""Regions: parts of a study's space in which something may happen more often than elsewhere.

an interval ───> its lower and its upper third, in logarithms on a log axis
arms ──────────> each
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy import stats

from study.results.wording import number
from study.space import Axis, arm_label
from study.spec import StudySpec

if TYPE_CHECKING:
    import pandas as pd

THIRD = 1 / 3


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the space."""

    words: str
    """Such as `optimizer.lr above 0.46`."""
    holds: "pd.Series"
    """Which trials lie in it."""
    remedy: str
    """What to do where it is a bad one."""

    def chance(self, happened: "pd.Series") -> float:
        """The probability that so many of what happened lie in here by chance alone: Fisher's exact test, one-sided."""
        inside, outside = happened[self.holds], happened[~self.holds]
        counts = [[int(part.sum()), int((~part).sum())] for part in (inside, outside)]
        return float(stats.fisher_exact(counts, alternative="greater").pvalue)


def regions(spec: StudySpec, trials: "pd.DataFrame") -> list[Region]:
    """Every region of a study, those of axes first."""
    found = [
        region for path, axis in spec.nuisance.items() if axis.choices is None and path in trials for region in _thirds(path, axis, trials[path])
    ]
    labels = [arm_label(arm) for arm in spec.arms]
    remedy = "narrow the axes for all arms, as its best is chosen from fewer trials than theirs"
    return found + [Region(label, trials["arm"] == label, remedy) for label in labels if len(labels) > 1]


def _thirds(path: str, axis: Axis, values: "pd.Series") -> list[Region]:
    assert axis.low is not None and axis.high is not None
    if axis.log:
        below, above = (math.exp((1 - share) * math.log(axis.low) + share * math.log(axis.high)) for share in (THIRD, 1 - THIRD))
    else:
        below, above = (axis.low + share * (axis.high - axis.low) for share in (THIRD, 1 - THIRD))
    low, high = float(f"{below:.2g}"), float(f"{above:.2g}")
    values = values.astype(float)
    clip = " or set optimizer.clip" if path.endswith("lr") else ""
    return [
        Region(f"{path} above {number(high)}", values > high, f"lower high in space.{path}{clip}"),
        Region(f"{path} below {number(low)}", values < low, f"raise low in space.{path}"),
    ]
