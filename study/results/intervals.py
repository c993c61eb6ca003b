"""Intervals: how far the mean of a few values can be trusted.

    fewer than 30 values   Student's t; of two samples Welch's, whose variances may differ
    30 and more            BCa bootstrap, the same for the same values

Source: Efron, Better bootstrap confidence intervals, JASA 82 (1987), https://doi.org/10.1080/01621459.1987.10478410.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

MANY = 30
"""Values from which on the bootstrap takes over; of two samples, those of the smaller one."""

RESAMPLES = 9_999

BATCH = 1_000
"""Resamples that are in memory at once."""

Values: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]


def interval(samples: tuple[Values] | tuple[Values, Values], confidence: float = CONFIDENCE) -> Interval | None:
    """The confidence interval of a mean, or of the first sample's mean minus the second's; None where a sample has fewer than two values."""
    if min(map(len, samples)) < 2:
        return None
    center = difference(*samples)
    if all(np.ptp(sample) == 0 for sample in samples):
        return center, center
    return _bootstrapped(samples, confidence) if min(map(len, samples)) >= MANY else _student(samples, center, confidence)


def difference(first: Values, second: Values | None = None) -> float:
    """The mean, or the first mean minus the second."""
    return float(first.mean()) - (0.0 if second is None else float(second.mean()))


def _student(samples: tuple[Values, ...], center: float, confidence: float) -> Interval:
    """Student's t with the degrees of freedom of Welch and Satterthwaite; of one sample these are its size less one."""
    parts = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    variance = sum(parts)
    freedom = variance**2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, samples, strict=True))
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return center - reach, center + reach


def _bootstrapped(samples: tuple[Values, ...], confidence: float) -> Interval:
    def statistic(*drawn: Values, axis: int) -> Values:
        means = [sample.mean(axis=axis) for sample in drawn]
        return np.asarray(means[0] if len(means) == 1 else means[0] - means[1])

    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=BATCH, confidence_level=confidence, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)
