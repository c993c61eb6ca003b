"""Choosing: which engine trains a study's trials, with how many slots, and why.

spec ─┬─ asks for solo, or its trials differ in structure ──────────────> solo
      └─ one fusion key ─ self-test, measured gain (kept in the home) ──> fused where it pays, with slots to fit the machine
                          on this machine's CPU, or on a GPU (`gpus.py`)
"""

import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

from study.engines.admission import Admission, examine, solo_seconds
from study.engines.bank import OWN, fusion_key
from study.errors import InputError
from study.spec import StudySpec
from study.tuning.choice import LEAST_GAIN, MEMORY_SHARE, PROXY_BYTES, Choice, Measurements, solo_engine, typical
from study.tuning.gpus import gpu_engine

START_SECONDS = 2.0
"""CPU seconds that one process of Ray Tune takes to start."""

STOPPED_SHARE = 0.4
"""Share of all epochs that a study with early stopping is expected to train."""

MOST_SLOTS = 6
"""Rows of one engine on a core: more of them gain little and spill its caches, and each is a process of Ray Tune to start."""

SHARED_COST = 0.65
"""Share of a solo step's time that fusing divides by the number of rows, as it was found for ResNets and MLPs on a CPU."""


def choose(spec: StudySpec, home: Path, wait: Callable[[], None] | None = None) -> Choice:
    """The engine of a study.

    Args:
        home: Where measurements are kept, by fusion key.
        wait: Returns once Ray is up, on whose GPUs a study for GPUs is measured; None where there is none.

    Raises:
        InputError: if the spec asks for the fused engine, and its trials cannot be fused.
    """
    wanted = spec.resources.engine
    if wanted == "solo":
        return solo_engine("the spec says so")
    if reason := _why_not(spec):
        choice = solo_engine(reason)
    elif spec.resources.gpus_per_trial:
        choice = gpu_engine(spec, home, wanted == "fused", wait)
    else:
        choice = _tried(spec, home, wanted == "fused")
    if wanted == "fused" and choice.engine != wanted:
        raise InputError(f"these trials cannot be fused: {choice.why}", where="resources.engine", remedy="use auto or solo")
    return choice


def _tried(spec: StudySpec, home: Path, asked_for: bool) -> Choice:
    """The fused engine where the model can be fused and it pays, or is asked for; else the solo engine."""
    try:
        work = _work(spec)
    except InputError:
        raise
    except Exception as error:  # of the user's code, which will raise it in the trials again, where its traceback is kept
        if not asked_for:
            return solo_engine(f"a first trial raised {type(error).__name__}: {error}".splitlines()[0])
        work = 0.0
    slots = _slots(spec, work)
    if not asked_for and not _pays(work, slots, float("inf")):
        return solo_engine("the study is so short that starting more processes would take longer")
    found = _examined(spec, slots, home)
    if found.why:
        return solo_engine(f"its model cannot be fused: {found.why}")
    if asked_for or _pays(work, slots, found.gain):
        why = f"{slots} trials in one step train {found.gain:.1f} times as fast per core"
        return Choice("fused", slots, found.arithmetic, found.gain, why)
    why = f"{slots} trials in one step would train {found.gain:.1f} times as fast per core, which does not make up for their start"
    return Choice("solo", 1, "", found.gain, why)


def _pays(work: float, slots: int, gain: float) -> bool:
    """Whether fused trials are expected to end enough earlier than solo ones, all processes' starts counted.

    Args:
        work: CPU seconds that all epochs take on solo engines.
    """
    cores = _cores()
    solo = work + 2 * START_SECONDS * cores
    fused = work / gain + START_SECONDS * cores * (2 + slots)
    return solo >= LEAST_GAIN * fused


def _work(spec: StudySpec) -> float:
    """CPU seconds that the study's epochs are expected to take on solo engines."""
    share = 1.0 if spec.stopping.scheduler == "none" else STOPPED_SHARE
    return spec.search.trials * spec.trial.schedule.epochs * share * solo_seconds(typical(spec))


def pilot_seconds(spec: StudySpec) -> float | None:
    """CPU seconds of an epoch of a typical trial on a solo engine, from a pilot of a few steps; None where the user's own code raises."""
    try:
        return solo_seconds(typical(spec))
    except InputError:
        raise
    except Exception:  # of the user's code, which will raise it in the trials again, where its traceback is kept
        return None


def _cores() -> int:
    return max(1, os.cpu_count() or 1)


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _why_not(spec: StudySpec) -> str:
    """What speaks against fusing, apart from the model."""
    base = fusion_key(spec.trial)
    for path, axis in spec.space.items():
        for value in axis.endpoints():
            try:
                differs = fusion_key(spec.trial_for({path: value})) != base
            except InputError:  # a value that is only legal together with others
                differs = not _may_differ(path)
            if differs:
                return f"trials that differ in {path} cannot share a step"
    return ""


def _may_differ(path: str) -> bool:
    section, _, name = path.partition(".") if "." in path else ("", "", path)
    names = OWN.get(section, ())
    return names is None or name in names


def _slots(spec: StudySpec, work: float) -> int:
    """As many as pay for the start of their processes: another row takes a smaller part of the work off than the one before.

    Args:
        work: CPU seconds that all epochs take on solo engines.
    """
    asked = spec.resources.slots
    if asked != "auto":
        return asked
    # Where the derivative of work x SHARED_COST / slots + START_SECONDS x cores x slots is 0.
    paid = round(math.sqrt(work * SHARED_COST / (START_SECONDS * _cores())))
    room = int(_memory() * MEMORY_SHARE / (PROXY_BYTES * _cores()))
    return max(2, min(MOST_SLOTS, paid, room, -(-spec.search.trials // _cores())))


def _examined(spec: StudySpec, slots: int, home: Path) -> Admission:
    """The admission of the study's trials, from the home if this machine found it before."""
    trial = typical(spec)
    return Measurements(home, trial, slots, platform.machine(), os.cpu_count()).admission(lambda: examine(trial, [slots]))
