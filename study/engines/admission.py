"""Admission: whether a model may be fused, and whether it pays.

    trial ──self-test in float64──> converted, looped, or why not          fused against solo, a few steps, one trial joining late
          ──a few epochs of each──> gain, slots                            trial-epochs per second, fused over solo

No model that fails the self-test is ever fused: state outside buffers, randomness of its own, a computation that depends on values.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from study.engines.course import data_on
from study.engines.engine import Engine
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine, give_back_memory
from study.errors import InputError
from study.measurement import Progress
from study.optimizer import OptimizerSpec
from study.training.data import Data
from study.trial import TrialSpec

TOLERANCE = 1e-10
"""Largest difference between fused and solo that the self-test lets pass, relative to the larger of 1 and the value, in float64."""

TESTED_LR = 0.02
"""Learning rate of the first trial of the self-test."""

TESTED_STEPS, MEASURED_STEPS = 3, 20
"""Optimizer steps in an epoch of the self-test, and of the measurement of the gain."""

TESTED_BATCH, TESTED_IMAGES = 16, 320
"""Images in a step of the self-test, and to validate on, at most: more than fused engines evaluate at once, and fewer than the solo engine does."""

ROUNDS = 2
"""Epochs of which the faster one is taken as an engine's time."""


WORTH = 1.1
"""More rows are taken where they train this many times as much: each is a process of Ray Tune, and makes its neighbours' epochs longer."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What the self-test and the measurement found of one fusion key."""

    arithmetic: str
    """`converted` or `looped`; empty where the model must not be fused."""
    gain: float
    """Trial-epochs per second, of a core's own or of a GPU, fused over solo, to two decimals; 0 where it was not measured."""
    why: str
    """Why it must not be fused; empty where it may."""
    slots: int = 0
    """Rows with which the gain was measured."""


def examine(trial: TrialSpec, slots: Sequence[int], device: str = "cpu") -> Admission:
    """Tests and measures a trial's model.

    Args:
        slots: Rows to measure with, fewest first; the next ones are tried as long as they fit into memory and gain enough.
        device: Where the measurement runs; the self-test runs on the CPU.
    """
    why = ""
    for arithmetic in ("converted", "looped"):
        why = self_test(trial, arithmetic)
        if not why:
            return _measured(trial, slots, arithmetic, device)
    return Admission("", 0.0, why)


def self_test(trial: TrialSpec, arithmetic: str) -> str:
    """Why a model must not be fused; empty where fused and solo agree."""
    try:
        return _disagreement(_variants(trial), arithmetic)
    except InputError:
        raise
    except Exception as error:  # the user's model may raise anything when it is run in another way than it was written for
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _measured(trial: TrialSpec, slots: Sequence[int], arithmetic: str, device: str) -> Admission:
    """The gain of the number of rows from which on more of them train no more."""
    best = Admission("", 0.0, f"{slots[0]} trials together do not fit into memory")
    try:
        solo = _solo_seconds(_shortened(trial, MEASURED_STEPS, epochs=ROUNDS + 1), device)
    except torch.OutOfMemoryError:  # which the trials will say, too
        return best
    for rows in slots:
        try:
            # Rounded here, so that it is in one place only.
            found = Admission(arithmetic, round(rows * solo / _fused_seconds(trial, rows, arithmetic, device), 2), "", rows)
        except torch.OutOfMemoryError:
            break
        finally:
            give_back_memory()
        if found.gain < WORTH * best.gain:
            break
        best = found
    return best


def solo_seconds(trial: TrialSpec) -> float:
    """CPU seconds that one epoch of a trial takes on a solo engine, from a short one."""
    short = _shortened(trial, MEASURED_STEPS, epochs=ROUNDS + 1)
    return _solo_seconds(short, "cpu") * _images(trial) / _images(short)


def _solo_seconds(short: TrialSpec, device: str) -> float:
    solo = SoloEngine(device)
    solo.admit("solo", short)
    return _fastest(solo.advance, device)


def _fused_seconds(trial: TrialSpec, rows: int, arithmetic: str, device: str) -> float:
    short = _shortened(trial, MEASURED_STEPS, epochs=ROUNDS + 1)
    fused = FusedEngine(rows, device, arithmetic)
    for slot in range(rows):
        fused.admit(str(slot), short.model_copy(update={"seed": slot}))
    return _fastest(fused.advance, device)


def _fastest(epoch: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few epochs: of the CPU's own time, or, as epochs end with numbers that a GPU is waited for, of the clock's."""
    now = time.process_time if device == "cpu" else time.perf_counter
    epoch()
    times = []
    for _ in range(ROUNDS):
        start = now()
        epoch()
        times.append(now() - start)
    return min(times)


def _variants(trial: TrialSpec) -> list[TrialSpec]:
    """Three short trials that differ as trials of one study do.

    Under plain sgd, whatever the trial's rule: what is tested is the model's arithmetic, and rules that divide by tiny numbers or take
    their signs turn rounding into large differences between any two engines.
    """
    short = _reduced(trial).canonical()
    plain = [OptimizerSpec(lr=TESTED_LR / 2**number, weight_decay=0.01, gamma=trial.optimizer.gamma) for number in range(3)]
    return [
        TrialSpec.model_validate({**short, "optimizer": one.model_dump(mode="json"), "seed": number, "precision": "float64"})
        for number, one in enumerate(plain)
    ]


def _reduced(trial: TrialSpec) -> TrialSpec:
    """As short as it can be, on few images."""
    data = _data(trial)
    share = min(1.0, TESTED_IMAGES / max(1, len(data.validation_labels)))
    small = _with(trial, data={"batch_size": min(trial.data.batch_size, TESTED_BATCH), "validation": trial.data.validation * share})
    return _shortened(small, TESTED_STEPS, epochs=2)


def _shortened(trial: TrialSpec, steps: int, epochs: int) -> TrialSpec:
    size = min(_images(trial), steps * trial.data.batch_size)
    return _with(trial, data={"train_size": size}, schedule={"epochs": epochs}, trace={"every": 2}, metrics=[], probes=[])


def _images(trial: TrialSpec) -> int:
    return len(_data(trial).train_labels)


def _data(trial: TrialSpec) -> Data:
    return data_on(trial.data.model_dump_json(), torch.device("cpu"), torch.float32)


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
