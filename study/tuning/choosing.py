"""Choosing: which engine trains a study's trials, with how many slots, and why.

spec ─┬─ asks for solo, or its trials differ in structure ──────────────> solo
      └─ one fusion key ─ self-test, measured gain (kept in the home) ──> fused where it pays, with slots to fit the machine
                          on this machine's CPU, or on a GPU (`gpus.py`)
"""

import os
import platform
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

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

FEWEST_SLOTS, MOST_SLOTS = 2, 6
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
    team = _team(spec, work)
    if not asked_for and spec.search.trials < team.engines * team.slots:
        return solo_engine("there are too few trials to fill the rows of fused engines")
    found = _examined(spec, team.slots, home)
    if found.why:
        return solo_engine(f"its model cannot be fused: {found.why}")
    if asked_for or _pays(work, team, found.gain):
        why = f"{team.slots} trials in one step train {found.gain:.1f} times as fast per core"
        if team.engines < team.cores:
            why += f"; on {team.engines} of {team.cores} cores, as so short a study ends before engines on more of them would have started"
        return Choice("fused", team.slots, found.arithmetic, found.gain, why, engines=0 if team.engines == team.cores else team.engines)
    why = f"{team.slots} trials in one step would train {found.gain:.1f} times as fast per core, which does not make up for their start"
    return Choice("solo", 1, "", found.gain, why)


class Team(NamedTuple):
    """Fused engines on the cores of a machine."""

    engines: int
    slots: int
    """Of each engine, and so many processes of Ray Tune."""
    cores: int

    def seconds(self, work: float, gain: float) -> float:
        """From the start of the processes to the end of the trials.

        Args:
            work: CPU seconds that all epochs take on solo engines.
            gain: How many times as fast an engine trains as a solo one.
        """
        processes = self.engines * (1 + self.slots)
        return START_SECONDS * max(1.0, processes / self.cores) + work / (gain * self.engines)


def _pays(work: float, team: Team, gain: float) -> bool:
    """Whether fused trials are expected to end enough earlier than solo ones, whose processes each load torch beside Ray Tune."""
    return 2 * START_SECONDS + work / team.cores >= LEAST_GAIN * team.seconds(work, gain)


def _team(spec: StudySpec, work: float) -> Team:
    """As many engines and slots as are expected to end first: more of them train faster, and start later. All have trials, and fit into memory.

    Where the spec says how many slots, and on a cluster, every core has an engine.

    Args:
        work: CPU seconds that all epochs take on solo engines.
    """
    asked, cores, trials = spec.resources.slots, _cores(), spec.search.trials
    engines = [cores] if asked != "auto" or os.environ.get("RAY_ADDRESS") else range(1, cores + 1)
    room = int(_memory() * MEMORY_SHARE / PROXY_BYTES)
    slots = range(FEWEST_SLOTS, MOST_SLOTS + 1) if asked == "auto" else [asked]
    teams = [Team(*each, cores) for each in product(engines, slots)]
    fitting = [team for team in teams if team.slots <= min(room // team.engines, -(-trials // team.engines))]
    return min(fitting or teams[:1], key=lambda team: team.seconds(work, 1 / (1 - SHARED_COST + SHARED_COST / team.slots)))


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


def _examined(spec: StudySpec, slots: int, home: Path) -> Admission:
    """The admission of the study's trials, from the home if this machine found it before."""
    trial = typical(spec)
    return Measurements(home, trial, slots, platform.machine(), os.cpu_count()).admission(lambda: examine(trial, [slots]))
