"""A small study and its trials, as the tests of the tracking ring tell them."""

import math
from typing import Any

from study.measurement import LayerSample, Measurement
from study.spec import StudySpec, check

LAYERS = ("layer1.0.conv1", "fc")


def study_spec(**more: Any) -> StudySpec:
    """Two arms, validation error to be minimized."""
    space = {"optimizer.lr": {"low": 0.001, "high": 1.0, "log": True}, "optimizer.gamma": {"choices": ["none", "last"], "role": "scientific"}}
    return check({"name": "roles", "question": "Which gains should decay touch?", "space": space, "search": {"trials": 4}, **more})


def layer(step: int, name: str, **more: Any) -> LayerSample:
    """A sample whose numbers follow from its step."""
    known: dict[str, Any] = {
        "role": "weight",
        "place": "inner",
        "scale_invariant": name != "fc",
        "equilibrated": False,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "weight_norm": 2.0,
        "grad_norm": 0.5,
        "effective_lr": 0.1 / step,
        "rotation": 0.02 * step,
        "rotation_expected": 0.01 if name != "fc" else None,
    }
    return LayerSample(step, name, **{**known, **more})


def measurement(epoch: int, error: float | None = None, steps: int = 20) -> Measurement:
    """An epoch of *steps* optimizer steps, sampled every ten."""
    last = epoch * steps
    samples = tuple(layer(step, name) for step in range(last - steps + 10, last + 1, 10) for name in LAYERS)
    values = {"train/loss": 1.0 / epoch, "val/error": 0.5 / epoch if error is None else error, "lr": 0.1, "val/loss": math.nan if epoch == 1 else 0.3}
    return Measurement(last, epoch, values, samples, seconds=0.5)
