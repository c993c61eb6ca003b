"""Choosing: which engine trains a study's trials, with how many slots, and why.

spec ─┬─ asks for solo, or its trials differ in structure ──────────────> solo
      └─ one fusion key ─ self-test, measured gain (kept in the home) ──> fused where it pays, with slots to fit the machine
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from study.engines.admission import Admission, examine, solo_seconds
from study.engines.bank import fusion_key
from study.errors import InputError
from study.spec import StudySpec

START_SECONDS = 2.0
"""CPU seconds that one process of Ray Tune takes to start."""

STOPPED_SHARE = 0.4
"""Share of all epochs that a study with early stopping is expected to train."""

LEAST_GAIN = 1.1
"""How many times as long `auto` must expect the trials to take on solo engines, starting included, to fuse them."""

MOST_SLOTS = 6
"""Rows of one engine on a core: more of them gain little and spill its caches, and each is a process of Ray Tune to start."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a study's trials are trained."""

    engine: str
    slots: int
    arithmetic: str
    gain: float
    """Trial-epochs per CPU second, fused over solo; 0 where it was not measured."""
    why: str

    def document(self) -> dict[str, object]:
        """The part of `study plan --json` that tells of it."""
        return {"name": self.engine, "slots": self.slots, "arithmetic": self.arithmetic, "gain": round(self.gain, 2), "why": self.why}


def choose(spec: StudySpec, home: Path) -> Choice:
    """The engine of a study.

    Args:
        home: Where measurements are kept, by fusion key.

    Raises:
        InputError: if the spec asks for the fused engine, and its trials cannot be fused.
    """
    wanted = spec.resources.engine
    if wanted == "solo":
        return _solo("the spec says so")
    reason = _why_not(spec)
    if not reason and wanted == "auto":
        reason = _too_short(spec)
    if not reason:
        slots = _slots(spec)
        found = _examined(spec, slots, home)
        reason = f"its model cannot be fused: {found.why}" if found.why else ""
        if not reason and (wanted == "fused" or _pays(spec, slots, found.gain)):
            return Choice("fused", slots, found.arithmetic, found.gain, f"{slots} trials in one step train {found.gain:.1f} times as fast per core")
        reason = reason or f"trials in one step would train {found.gain:.1f} times as fast per core, which starting them would eat up"
    if wanted == "fused":
        raise InputError(f"these trials cannot be fused: {reason}", where="resources.engine", remedy="use auto or solo")
    return _solo(reason)


def _too_short(spec: StudySpec) -> str:
    """Why no gain could pay for the processes of fused trials; empty where one could."""
    return "" if _pays(spec, _slots(spec), float("inf")) else "the study is so short that starting more processes would take longer"


def _pays(spec: StudySpec, slots: int, gain: float) -> bool:
    """Whether fused trials are expected to end enough earlier than solo ones, all processes' starts counted."""
    cores = _cores()
    work = _work(spec)
    solo = work + 2 * START_SECONDS * cores
    fused = work / gain + START_SECONDS * cores * (2 + slots)
    return solo >= LEAST_GAIN * fused


def _work(spec: StudySpec) -> float:
    """CPU seconds that the study's epochs are expected to take on solo engines."""
    share = 1.0 if spec.stopping.scheduler == "none" else STOPPED_SHARE
    return spec.search.trials * spec.trial.schedule.epochs * share * solo_seconds(spec.trial)


def _cores() -> int:
    return max(1, os.cpu_count() or 1)


def _solo(why: str) -> Choice:
    return Choice("solo", 1, "", 0.0, why)


def _why_not(spec: StudySpec) -> str:
    """What speaks against fusing, apart from the model."""
    if spec.resources.engine == "auto" and spec.resources.gpus_per_trial:
        return "fusing on GPUs is not measured yet; ask for it with resources.engine: fused"
    base = fusion_key(spec.trial)
    for path, axis in spec.space.items():
        for value in axis.endpoints():
            try:
                varied = spec.trial_for({path: value})
            except InputError:  # a value that is only legal together with others says nothing about structure
                continue
            if fusion_key(varied) != base:
                return f"trials that differ in {path} cannot share a step"
    return ""


def _slots(spec: StudySpec) -> int:
    asked = spec.resources.slots
    if asked != "auto":
        return asked
    return max(2, min(MOST_SLOTS, -(-spec.search.trials // _cores())))


def _examined(spec: StudySpec, slots: int, home: Path) -> Admission:
    """The admission of the study's trials, from the home if this machine found it before."""
    about = [fusion_key(spec.trial), slots, torch.__version__, platform.machine(), os.cpu_count()]
    path = home / ".engines" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    if path.exists() and "import:" not in fusion_key(spec.trial):
        return Admission(**json.loads(path.read_text()))
    found = examine(spec.trial, slots)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found)))
    return found
