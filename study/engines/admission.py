"""Admission: whether a model may be fused, and whether it pays.

    trial ──self-test in float64──> converted, looped, or why not          fused against solo, a few steps, one trial joining late
          ──a few epochs of each──> gain                                   trial-epochs per CPU second, fused over solo

No model that fails the self-test is ever fused: state outside buffers, randomness of its own, a computation that depends on values.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from study.engines.course import data_on
from study.engines.engine import Engine
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.errors import InputError
from study.measurement import Progress
from study.optimizer import OptimizerSpec
from study.trial import TrialSpec

TOLERANCE = 1e-10
"""Largest difference between fused and solo that the self-test lets pass, relative to the larger of 1 and the value, in float64."""

TESTED_LR = 0.02
"""Learning rate of the first trial of the self-test."""

TESTED_STEPS, MEASURED_STEPS = 3, 20
"""Optimizer steps in an epoch of the self-test, and of the measurement of the gain."""

ROUNDS = 2
"""Epochs of which the faster one is taken as an engine's time."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What the self-test and the measurement found of one fusion key."""

    arithmetic: str
    """`converted` or `looped`; empty where the model must not be fused."""
    gain: float
    """Trial-epochs per CPU second, fused over solo, to two decimals; 0 where it was not measured."""
    why: str
    """Why it must not be fused; empty where it may."""


def examine(trial: TrialSpec, slots: int, device: str = "cpu") -> Admission:
    """Tests and measures a trial's model.

    Args:
        slots: Rows to measure with.
        device: Where the measurement runs; the self-test runs on the CPU.
    """
    why = ""
    for arithmetic in ("converted", "looped"):
        why = self_test(trial, arithmetic)
        if not why:
            return Admission(arithmetic, gain(trial, slots, arithmetic, device), "")
    return Admission("", 0.0, why)


def self_test(trial: TrialSpec, arithmetic: str) -> str:
    """Why a model must not be fused; empty where fused and solo agree."""
    try:
        return _disagreement(_variants(trial), arithmetic)
    except InputError:
        raise
    except Exception as error:  # the user's model may raise anything when it is run in another way than it was written for
        return f"{type(error).__name__}: {error}".splitlines()[0]


def gain(trial: TrialSpec, slots: int, arithmetic: str, device: str = "cpu") -> float:
    """Trial-epochs per CPU second, fused over solo, to two decimals, so that it is rounded in one place only."""
    short = _shortened(trial, MEASURED_STEPS, epochs=ROUNDS + 1)
    fused = FusedEngine(slots, device, arithmetic)
    for slot in range(slots):
        fused.admit(str(slot), short.model_copy(update={"seed": slot}))
    solo = SoloEngine(device)
    solo.admit("solo", short)
    return round(slots * _fastest(solo.advance) / _fastest(fused.advance), 2)


def solo_seconds(trial: TrialSpec, device: str = "cpu") -> float:
    """CPU seconds that one epoch of a trial takes on a solo engine, from a short one."""
    short = _shortened(trial, MEASURED_STEPS, epochs=ROUNDS + 1)
    solo = SoloEngine(device)
    solo.admit("solo", short)
    return _fastest(solo.advance) * _images(trial) / _images(short)


def _fastest(epoch: Callable[[], object]) -> float:
    epoch()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        epoch()
        times.append(time.process_time() - start)
    return min(times)


def _variants(trial: TrialSpec) -> list[TrialSpec]:
    """Three short trials that differ as trials of one study do.

    Under plain sgd, whatever the trial's rule: what is tested is the model's arithmetic, and rules that divide by tiny numbers or take
    their signs turn rounding into large differences between any two engines.
    """
    short = _shortened(trial, TESTED_STEPS, epochs=2).canonical()
    plain = [OptimizerSpec(lr=TESTED_LR / 2**number, weight_decay=0.01, gamma=trial.optimizer.gamma) for number in range(3)]
    return [
        TrialSpec.model_validate({**short, "optimizer": one.model_dump(mode="json"), "seed": number, "precision": "float64"})
        for number, one in enumerate(plain)
    ]


def _shortened(trial: TrialSpec, steps: int, epochs: int) -> TrialSpec:
    size = min(_images(trial), steps * trial.data.batch_size)
    return _with(trial, data={"train_size": size}, schedule={"epochs": epochs}, trace={"every": 2}, metrics=[], probes=[])


def _images(trial: TrialSpec) -> int:
    return len(data_on(trial.data.model_dump_json(), torch.device("cpu"), torch.float32).train_labels)


def _with(trial: TrialSpec, **changes: Any) -> TrialSpec:
    fields = trial.canonical()
    for section, change in changes.items():
        fields[section] = {**fields[section], **change} if isinstance(change, dict) else change
    if "optimizer" in changes:
        fields["optimizer"].pop("intrinsic_lr", None)
    return TrialSpec.model_validate(fields)


def _disagreement(trials: list[TrialSpec], arithmetic: str) -> str:
    """What differs first between the trials on one fused engine, where the last joins late, and each on a solo engine."""
    fused = FusedEngine(len(trials), arithmetic=arithmetic)
    solos = {str(number): SoloEngine() for number in range(len(trials))}
    for number, trial in enumerate(trials):
        solos[str(number)].admit(str(number), trial)
    late = len(trials) - 1
    for number in range(late):
        fused.admit(str(number), trials[number])
    found = _difference(fused, solos, fused.advance())
    if found:
        return found
    fused.admit(str(late), trials[late])
    return _difference(fused, solos, fused.advance())


def _difference(fused: FusedEngine, solos: dict[str, SoloEngine], progress: list[Progress]) -> str:
    for one in progress:
        solo = solos[one.trial_id]
        (expected,) = solo.advance()
        for name, value in expected.measurement.values.items():
            if not _agree(value, one.measurement.values.get(name, float("nan"))):
                return f"its {name} is not the one that a trial by itself has"
        if far := _far(fused, solo, one.trial_id):
            return f"its {far} is not trained as in a trial by itself"
    return ""


def _far(fused: FusedEngine, solo: Engine, trial_id: str) -> str:
    """A parameter or buffer that differs; empty where none does."""
    theirs = solo.weights(trial_id)
    for name, value in fused.weights(trial_id).items():
        difference = (value.double() - theirs[name].double()).abs()
        # Not "any above": a NaN must count as a difference.
        if value.numel() and not bool((difference <= TOLERANCE * theirs[name].double().abs().clamp(min=1)).all()):
            return name
    return ""


def _agree(value: float, other: float) -> bool:
    return abs(value - other) <= TOLERANCE * max(1.0, abs(value))
