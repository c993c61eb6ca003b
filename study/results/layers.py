"""Layers: what became of each layer of a trial, read from its trace.

    first 30% of a layer's samples ──> how strong its gradient was ──┐
    last 30%, the tail ──> norm, effective lr, rotation, ratio ──────┴──> state

    dying         the gradient at w/|w|, or the norm, has all but vanished: the layer no longer learns
    free          not scale-invariant, so theory expects nothing of it
    equilibrium   five relaxation times have passed, and it turns as theory expects
    off           they have passed, and it does not
    growing       they have not passed, and the norm grows; or shrinking
    settling      they have not passed, and the norm is level

The first line that holds is the state. All steps are optimizer steps since the trial began, all angles radians per step.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import pandas as pd

State = Literal["equilibrium", "off", "growing", "shrinking", "settling", "dying", "free"]

TAIL = 3, 10
"""The share of a layer's last samples that its state and its final values are read from."""

BAND = (0.9, 1.1)
"""Rotation over expected rotation that passes for equilibrium."""

LEVEL = 0.01
"""Relative change of the norm over the tail up to which it is level."""

VANISHED_GRADIENT = 1e-3
"""Unit gradient |w| |g| in the tail, over that in the first samples, from which on downwards a layer is dying."""

VANISHED_NORM = 1e-6
"""Last over first weight norm below which a layer is dying."""

SAME_PRODUCT = 0.01
"""Relative change of lr x weight_decay up to which it counts as unchanged, as in the tracer."""


@dataclass(frozen=True, slots=True)
class LayerEnd:
    """One layer at the end of its trace. What does not exist is None."""

    layer: str
    role: str
    place: str
    scale_invariant: bool
    state: State
    weight_norm: float
    """At the last sample."""
    norm_change: float | None
    """Relative change of the norm from the first to the last sample of the tail."""
    effective_lr: float | None
    """Mean over the tail."""
    rotation: float | None
    """Root mean square over the tail."""
    rotation_expected: float | None
    """Root mean square over the tail."""
    rotation_ratio: float | None
    """Root mean square, over the tail, of measured over expected rotation."""
    relaxation_times: float | None
    """Relaxation times that have passed since lr x weight_decay last changed, at the last sample."""


def layer_ends(trace: "pd.DataFrame") -> list[LayerEnd]:
    """Every layer of a trace, in the network's order; samples whose norm is not finite count for nothing.

    Args:
        trace: What `study.traces.read_trace` returns.
    """
    finite = trace[trace["weight_norm"].notna()].sort_values("step", kind="stable")
    names = dict.fromkeys(trace["layer"])
    groups = dict(iter(finite.groupby("layer", sort=False)))
    return [_end(groups[name]) for name in names if name in groups]


def trace_document(trial_id: str, trace: "pd.DataFrame") -> dict[str, Any]:
    """The JSON document of `study trace`; `steps` is the last sampled one."""
    ends = layer_ends(trace)
    return {
        "trial_id": trial_id,
        "steps": int(trace["step"].max()) if len(trace) else 0,
        "layers": [asdict(end) for end in ends],
        "states": {state: sum(end.state == state for end in ends) for state in get_args(State)},
    }


def verdict(document: Mapping[str, Any]) -> str:
    """A trace document in one line: `8 of 9 scale-invariant layers in equilibrium; median rotation 1.01 of expected`."""
    layers = document["layers"]
    if not layers:
        return "no layer was sampled"
    invariant = [layer for layer in layers if layer["scale_invariant"]]
    settled = sum(layer["state"] == "equilibrium" for layer in invariant)
    ratios = [layer["rotation_ratio"] for layer in invariant if layer["rotation_ratio"] is not None]
    parts = [f"{settled} of {len(invariant)} scale-invariant layers in equilibrium" if invariant else "no layer is scale-invariant"]
    if invariant:
        parts.append(f"median rotation {median(ratios):.2f} of expected" if ratios else "theory expects no rotation here")
    dying = document["states"]["dying"]
    if dying:
        parts.append(f"{dying} of all {len(layers)} layers dying")
    return "; ".join(parts)


def _end(rows: "pd.DataFrame") -> LayerEnd:
    tail, last = rows.tail(_share(len(rows))), rows.iloc[-1]
    invariant, first_norm = bool(last["scale_invariant"]), float(tail["weight_norm"].iloc[0])
    change = float(last["weight_norm"]) / first_norm - 1 if first_norm else None
    expected = tail["rotation_expected"].where(tail["rotation_expected"] > 0)
    ratio = _rms(tail["rotation"] / expected)
    return LayerEnd(
        layer=str(last["layer"]),
        role=str(last["role"]),
        place=str(last["place"]),
        scale_invariant=invariant,
        state=_state(rows, tail, invariant, ratio, change or 0.0),
        weight_norm=float(last["weight_norm"]),
        norm_change=change,
        effective_lr=_number(tail["effective_lr"].mean()),
        rotation=_rms(tail["rotation"]),
        rotation_expected=_rms(expected),
        rotation_ratio=ratio,
        relaxation_times=_relaxation_times(rows) if invariant else None,
    )


def _state(rows: "pd.DataFrame", tail: "pd.DataFrame", invariant: bool, ratio: float | None, change: float) -> State:
    if _is_dying(rows, tail):
        return "dying"
    if not invariant:
        return "free"
    if tail["equilibrated"].all() and ratio is not None:
        return "equilibrium" if BAND[0] <= ratio <= BAND[1] else "off"
    if abs(change) > LEVEL:
        return "growing" if change > 0 else "shrinking"
    return "settling"


def _is_dying(rows: "pd.DataFrame", tail: "pd.DataFrame") -> bool:
    head = rows.head(_share(len(rows)))
    before, now = (_rms(part["weight_norm"] * part["grad_norm"]) for part in (head, tail))
    vanished = before is not None and now is not None and now <= VANISHED_GRADIENT * before
    return vanished or float(rows["weight_norm"].iloc[-1]) < VANISHED_NORM * float(rows["weight_norm"].iloc[0])


def _relaxation_times(rows: "pd.DataFrame") -> float | None:
    """Counted from the first sample with the present lr x weight_decay: up to one interval between samples too few, never too many."""
    time = _number(rows["relaxation_time"].iloc[-1])
    if time is None:
        return None
    products = (rows["lr"] * rows["weight_decay"]).tolist()
    reference, since = products[0], 0
    for step, product in zip(rows["step"].tolist(), products, strict=True):
        if abs(product - reference) > SAME_PRODUCT * reference:
            reference, since = product, step
    return (int(rows["step"].iloc[-1]) - since) / time


def _share(count: int) -> int:
    """How many samples the tail has: at least one."""
    share, whole = TAIL
    return -(-share * count // whole)


def _rms(values: "pd.Series") -> float | None:
    """The root mean square of the values that are known; None where none is."""
    return _number((values**2).mean() ** 0.5)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if math.isfinite(value) else None
