"""Earlier: the trials of another study, and whether this study could have proposed them.

another study's ledger ──> Earlier ─┬─ matching ──> the point of an arm that makes exactly this trial
                                    └─ overlap ───> its values on the axes that both studies have
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.errors import InputError
from study.home import StudyFolder
from study.measurement import EXPLOITS, Ending, History, Outcome
from study.space import Assignment
from study.spec import StudySpec
from study.tracking.outbox import Outbox
from study.trial import TrialSpec, flatten
from study.tuning.points import exists, lies_on, parents_first, snapped

SAME = 1e-9
"""Relative difference of numbers that count as the same: products and quotients are rounded."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """A trial of another study that has ended."""

    source: str
    """Its study's id and its own."""
    trial: TrialSpec
    ending: Ending
    value: float | None
    """This study's objective."""
    history: History


def earlier_trials(spec: StudySpec, home: Path) -> list[Earlier]:
    """The trials that the study which `search.from` names completed, stopped or saw diverge.

    Left out are replicates, and trials that population based training mutated: their results are not those of the values of their launch.

    Raises:
        InputError: if there is no such study, or it is this one, or it did not measure this study's objective.
    """
    name, objective = spec.search.from_, spec.objective
    if name is None:
        return []
    folder = StudyFolder(Path(name)) if (Path(name) / "study.json").exists() else StudyFolder.find(home, name)
    if folder.path.resolve() == (home / spec.name).resolve():
        raise InputError(f"a study cannot start from itself (got {name!r})", where="search.from", remedy="name another study")
    card, outbox = folder.card(), Outbox(folder.path)
    found, measured = [], set[str]()
    for record in outbox.records():
        if record.replicate_of or record.outcome in (Outcome.FAILED, Outcome.INTERRUPTED):
            continue
        seen = outbox.history(record.trial_id)
        if any(EXPLOITS in each.values for each in seen):
            continue
        history = [(each.epoch, each.values[objective.metric]) for each in seen if objective.metric in each.values]
        measured |= {name for each in seen for name in each.values}
        value = objective.value([number for _, number in history]) if history else None
        if record.outcome is Outcome.DIVERGED or value is not None:
            ending = Ending(record.outcome, record.reason)  # type: ignore[arg-type]  # the ledger holds reasons only
            found.append(Earlier(f"{card.study_id}/{record.trial_id}", TrialSpec.model_validate(record.trial), ending, value, history))
    outbox.close()
    if measured and objective.metric not in measured:
        raise InputError(
            f"the study {name} did not measure this study's objective (got {objective.metric!r})",
            where="search.from",
            remedy=f"use one of {', '.join(sorted(measured))}",
        )
    return found


def matching(spec: StudySpec, arm: Assignment, trial: TrialSpec) -> Assignment | None:
    """The point of an arm that makes exactly this trial; None where no point does."""
    point = overlap(spec, trial, arm)
    if any(path not in point for path, axis in spec.nuisance.items() if exists(axis, {**arm, **point})):
        return None
    try:
        made = spec.trial_for({**arm, **point})
    except InputError:
        return None
    return point if _same(flatten(made.canonical()), flatten(trial.canonical())) else None


def overlap(spec: StudySpec, trial: TrialSpec, arm: Assignment | None = None) -> Assignment:
    """The values of a trial that lie on nuisance axes, where these exist."""
    point: Assignment = {}
    for path in parents_first(spec.nuisance):
        axis, value = spec.space[path], _field(trial, path)
        known = {**(arm or {}), **point}
        there = exists(axis, known if arm is not None else {**axis.when, **known})
        if there and lies_on(axis, spec.integer(path), value):
            point[path] = snapped(axis, spec.integer(path), value)
    return point


def _field(trial: TrialSpec, path: str) -> Any:
    value: Any = trial
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[path], other[path]) for path in one)


def _equal(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=SAME) if numbers else one == other
