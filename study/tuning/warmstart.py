"""Warm start: what another study's trials are worth to this one.

    a trial of the other study ─┬─ one that this study could propose, field by field ──> its result is added, under its own name
                                └─ another one, but it completed with a good value ────> its values on shared axes are tried first

Added results inform the sampler. They are no trials of this study: not in its table, never its best, and not counted.
"""

from collections.abc import Sequence

from study.measurement import Outcome
from study.spec import ObjectiveSpec
from study.tuning.earlier import Earlier, overlap
from study.tuning.points import key_of
from study.tuning.search import Search


def warm_start(search: Search, found: Sequence[Earlier]) -> str:
    """Lets a search take over what it can from another study's trials; doing so again changes nothing.

    Returns:
        What was taken over, in a sentence; empty where there is nothing.
    """
    spec = search.spec
    others = [earlier for earlier in found if not search.add(earlier)]
    wishes = [point for earlier in best_first(others, spec.objective) if (point := overlap(spec, earlier.trial))]
    points = list({key_of(point): point for point in wishes}.values())[: search.startup]
    for point in points:
        search.enqueue(point)
    if not found:
        return ""
    return f"from {spec.search.from_}: {len(found) - len(others)} of {len(found)} results added, {len(points)} points to be tried first"


def best_first(found: Sequence[Earlier], objective: ObjectiveSpec) -> list[Earlier]:
    """Those that completed, the best ones first."""
    completed = [(objective.rank(one.value), one) for one in found if one.ending.outcome is Outcome.COMPLETED and one.value is not None]
    return [one for _, one in sorted(completed, key=lambda pair: pair[0])]
