"""What a trial says and how it ended: the plain values that cross every boundary.

running ──> completed     trained its last epoch; its value counts
        ├─> stopped       by the scheduler, its patience or the budget
        ├─> diverged      its numbers became nan or inf, or exploded
        ├─> failed        an error in code or machine
        └─> interrupted   by the user or a crash; the study's next start continues it
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Literal, TypeAlias

Reason = Literal["", "scheduler", "patience", "budget", "nan", "inf", "exploded", "user-code", "out-of-memory", "worker-lost"]


EXPLOITS = "pbt/exploits"
"""Metric: how often a trial of a population has gone on with the state of a better one; absent before the first time."""


class Outcome(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class LayerSample:
    """One layer at one optimizer step. Angles in radians; quantities that do not exist are None."""

    step: int
    """Optimizer steps since the trial began."""
    layer: str
    """Name of the parameter's layer."""
    role: str
    place: str
    """Place of the norm gain that follows, as far as it is known; empty otherwise."""
    scale_invariant: bool
    equilibrated: bool
    """Whether rate x steps since lr x decay last changed is at least 5."""
    lr: float
    weight_decay: float
    weight_norm: float
    """|w| before the step."""
    grad_norm: float
    """|g| at the step, decay not included."""
    effective_lr: float | None
    """lr/|w|^2 for sgd, lr/|w| for normalized rules, None for rules that are not known."""
    rotation: float
    """Angle between the weights before and after the step."""
    rotation_expected: float | None
    """The angle at equilibrium, where theory gives one."""
    source: str = "weights"
    """`weights`: the rotation was measured on the weights before and after the step; `update`: on dot products of weights and update."""
    relaxation_time: float | None = None
    """Steps in which a deviation from equilibrium falls by a factor e; None where theory gives none."""
    coordinate_rate: float | None = None
    """Of adam and adamw: the mean over coordinates of lr / (sqrt(v) + eps), the step per unit of gradient."""

    @property
    def unit_gradient(self) -> float:
        """|w| |g|: the gradient's norm as seen at w/|w|, whatever the scale of w."""
        return self.weight_norm * self.grad_norm

    @property
    def rotation_ratio(self) -> float | None:
        """Measured over expected rotation."""
        return self.rotation / self.rotation_expected if self.rotation_expected else None


@dataclass(frozen=True, slots=True)
class GainSample:
    """The gains of one norm."""

    place: str
    rms: float
    """Root mean square over channels."""
    distance: float
    """Root mean square of gain - 1 over channels: 0 as most norms begin."""
    dead: int
    """Channels whose gain is so small that they carry nothing."""
    channels: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one trial says at the end of one epoch. Losses in nats, errors in [0, 1], all steps absolute."""

    step: int
    """Optimizer steps since the trial began, never since a restart."""
    epoch: int
    """Epochs since the trial began."""
    values: Mapping[str, float]
    """Metric to finite value, such as `{"val/error": 0.071}`."""
    samples: Sequence[LayerSample] = ()
    """The layers' samples since the measurement before."""
    seconds: float = 0.0
    """Time that this interval took."""


@dataclass(frozen=True, slots=True)
class Ending:
    """An outcome with its reason."""

    outcome: Outcome
    reason: Reason = ""
    error: str = ""
    """The user's traceback, where the outcome is `failed`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one trial did in one interval (an epoch)."""

    trial_id: str
    measurement: Measurement
    ending: Ending | None = None
    """Set when the trial ended by itself: completed or diverged."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial as it is remembered: what it was, how it ended, what it measured last."""

    trial_id: str
    arm: str
    outcome: Outcome
    reason: str
    trial: Mapping[str, Any]
    """The trial's spec as plain values."""
    value: float | None
    """The objective; None unless it completed or was stopped with a finite one."""
    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    seconds: float = 0.0
    replicate_of: str = ""


History: TypeAlias = Sequence[tuple[int, float]]
"""Epoch and objective of what a trial measured, in the order of measuring."""


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Only the values that are numbers: MLflow shows inf and NaN as if they were results."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def layer_medians(samples: Sequence[LayerSample]) -> dict[str, float]:
    """Medians over the layers at the latest sampled step: over scale-invariant weights, or over all when there are none.

    `rotation_ratio/median` is measured over expected rotation, where an expectation exists.
    """
    if not samples:
        return {}
    latest = [sample for sample in samples if sample.step == samples[-1].step]
    rows = [sample for sample in latest if sample.scale_invariant] or latest
    columns = {
        "effective_lr/median": [row.effective_lr for row in rows if row.effective_lr is not None],
        "rotation/median": [row.rotation for row in rows],
        "rotation_ratio/median": [row.rotation_ratio for row in rows if row.rotation_ratio is not None],
    }
    seen = {name: [value for value in column if math.isfinite(value)] for name, column in columns.items()}
    return {name: median(column) for name, column in seen.items() if column}
