"""Choosing: which engine trains a study's trials, with how many slots, and why.

spec ─┬─ asks for solo, or its trials differ in structure ──────────────> solo
      └─ one fusion key ─ self-test, measured gain (kept in the home) ──> fused where it pays, with slots to fit the machine
"""

import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from study.engines.admission import Admission, examine, solo_seconds
from study.engines.bank import OWN, fusion_key
from study.errors import InputError
from study.space import Axis, Scalar
from study.spec import StudySpec
from study.trial import TrialSpec

START_SECONDS = 2.0
"""CPU seconds that one process of Ray Tune takes to start."""

STOPPED_SHARE = 0.4
"""Share of all epochs that a study with early stopping is expected to train."""

LEAST_GAIN = 1.1
"""How many times as long `auto` must expect the trials to take on solo engines, starting included, to fuse them."""

MOST_SLOTS = 6
"""Rows of one engine on a core: more of them gain little and spill its caches, and each is a process of Ray Tune to start."""

PROXY_BYTES, MEMORY_SHARE = 125_000_000, 0.25
"""Memory that a process of Ray Tune takes by itself, and the share of the machine's that those of fused trials may take together."""

SHARED_COST = 0.65
"""Share of a solo step's time that fusing divides by the number of rows, as it was found for ResNets and MLPs on a CPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a study's trials are trained."""

    engine: str
    slots: int
    arithmetic: str
    gain: float
    """Trial-epochs per CPU second, fused over solo; 0 where it was not measured."""
    why: str
    engines_per_gpu: int = 1
    """Fused engines that share one GPU, where there is one."""

    def document(self) -> dict[str, object]:
        """The part of `study plan --json` that tells of it."""
        told = {"name": self.engine, "slots": self.slots, "engines_per_gpu": self.engines_per_gpu}
        return {**told, "arithmetic": self.arithmetic, "gain": self.gain, "why": self.why}


def choose(spec: StudySpec, home: Path) -> Choice:
    """The engine of a study.

    Args:
        home: Where measurements are kept, by fusion key.

    Raises:
        InputError: if the spec asks for the fused engine, and its trials cannot be fused.
    """
    wanted = spec.resources.engine
    if wanted == "solo":
        return solo_engine("the spec says so")
    choice = _tried(spec, home, wanted == "fused")
    if wanted == "fused" and choice.engine != wanted:
        raise InputError(f"these trials cannot be fused: {choice.why}", where="resources.engine", remedy="use auto or solo")
    return choice


def _tried(spec: StudySpec, home: Path, asked_for: bool) -> Choice:
    """The fused engine where the trials can be fused and it pays, or is asked for; else the solo engine."""
    if reason := _why_not(spec):
        return solo_engine(reason)
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
        return Choice("fused", slots, found.arithmetic, found.gain, why, spec.resources.engines_per_gpu)
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
    return spec.search.trials * spec.trial.schedule.epochs * share * solo_seconds(_typical(spec))


def _typical(spec: StudySpec) -> TrialSpec:
    """A trial from the middle of the space: what the axes replace in the base trial may be nothing to train with."""
    try:
        return spec.trial_for({path: _middle(axis) for path, axis in spec.space.items() if not axis.when and path != "schedule.epochs"})
    except InputError:  # middles that do not go together
        return spec.trial


def pilot_seconds(spec: StudySpec) -> float | None:
    """CPU seconds of an epoch of a typical trial on a solo engine, from a pilot of a few steps; None where the user's own code raises."""
    try:
        return solo_seconds(_typical(spec))
    except InputError:
        raise
    except Exception:  # of the user's code, which will raise it in the trials again, where its traceback is kept
        return None


def _middle(axis: Axis) -> Scalar:
    low, *_, high = axis.endpoints() if axis.choices is None else (axis.choices[0],) * 2
    if not axis.log or not isinstance(low, float) or not isinstance(high, float):
        return low
    return math.sqrt(low * high)


def _cores() -> int:
    return max(1, os.cpu_count() or 1)


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def solo_engine(why: str) -> Choice:
    """The plain engine, and why."""
    return Choice("solo", 1, "", 0.0, why)


def _why_not(spec: StudySpec) -> str:
    """What speaks against fusing, apart from the model."""
    if spec.resources.engine == "auto" and spec.resources.gpus_per_trial:
        return "fusing on GPUs is not measured yet; ask for it with resources.engine: fused"
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
    """The admission of the study's trials, from the home if this machine found it before; the user's own code is examined every time."""
    trial = _typical(spec)
    key = fusion_key(trial)
    if "import:" in key:
        return examine(trial, slots)
    about = [key, slots, version("effective-lr-study"), torch.__version__, platform.machine(), os.cpu_count()]
    path = home / ".engines" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return Admission(**json.loads(path.read_text()))
    found = examine(trial, slots)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(asdict(found)))
    draft.replace(path)
    return found
