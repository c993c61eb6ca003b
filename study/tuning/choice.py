"""Choice: the engine that trains a study's trials; and what was measured to choose it, which the home keeps for each fusion key."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study.engines.admission import Admission
from study.engines.bank import fusion_key
from study.errors import InputError
from study.space import Axis, Scalar
from study.spec import StudySpec
from study.trial import IMPORT, TrialSpec

LEAST_GAIN = 1.1
"""How many times as long `auto` must expect the trials to take on solo engines, to fuse them."""

PROXY_BYTES, MEMORY_SHARE = 125_000_000, 0.25
"""Memory that a process of Ray Tune takes by itself, and the share of the machine's that those of fused trials may take together."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a study's trials are trained."""

    engine: str
    """`solo` or `fused`; `auto` in a plan, where it will be measured when the study starts."""
    slots: int
    """Trials in one step; 0 where that will be measured."""
    arithmetic: str
    gain: float
    """Trial-epochs in the time that a solo engine takes for one, on one core or one GPU; 0 where it was not measured."""
    why: str
    engines_per_gpu: int = 1
    """Fused engines that share one GPU, where there is one."""
    engines: int = 0
    """Fused engines on the CPU of this machine; 0 for one on each core, as on every node of a cluster."""

    def document(self) -> dict[str, object]:
        """The part of `study plan --json` that tells of it."""
        told = {"name": self.engine, "slots": self.slots, "engines_per_gpu": self.engines_per_gpu}
        return {**told, "arithmetic": self.arithmetic, "gain": self.gain, "why": self.why}


def solo_engine(why: str) -> Choice:
    """The plain engine, and why."""
    return Choice("solo", 1, "", 0.0, why)


def typical(spec: StudySpec) -> TrialSpec:
    """A trial from the middle of the space: what the axes replace in the base trial may be nothing to train with."""
    try:
        return spec.trial_for({path: _middle(axis) for path, axis in spec.space.items() if not axis.when and path != "schedule.epochs"})
    except InputError:  # middles that do not go together
        return spec.trial


def _middle(axis: Axis) -> Scalar:
    low, *_, high = axis.endpoints() if axis.choices is None else (axis.choices[0],) * 2
    if not axis.log or not isinstance(low, float) or not isinstance(high, float):
        return low
    return math.sqrt(low * high)


class Measurements:
    """What was measured of a trial's fusion key, in a study home. The user's own code may change, and is measured every time."""

    def __init__(self, home: Path, trial: TrialSpec, *where: object) -> None:
        """Names the file.

        Args:
            where: What else it depends on.
        """
        key = fusion_key(trial)
        about = [key, *where, version("effective-lr-study"), version("torch")]
        self._path = home / ".engines" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
        self._is_kept = IMPORT not in key

    def read(self) -> dict[str, Any] | None:
        """What was kept; None where nothing was."""
        return json.loads(self._path.read_text()) if self._is_kept and self._path.exists() else None

    def keep(self, found: Mapping[str, Any]) -> None:
        """Writes it down, whole or not at all."""
        if not self._is_kept:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(found))
        draft.replace(self._path)

    def admission(self, examine: Callable[[], Admission]) -> Admission:
        """What was kept, or is found now."""
        if kept := self.read():
            return Admission(**kept)
        found = examine()
        self.keep(asdict(found))
        return found
