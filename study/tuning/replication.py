"""Replication: which trials are trained again with fresh seeds, and when enough is known. Pure functions of the ledger's records.

    search ─top of each arm─> finalists ─seeds 1-3─> look ─seeds 4-5─> look ─> ...     until `replicate.seeds`, or the order is settled
                                                      └─ a finalist that is settled to be behind its arm's leader gets no more seeds

Nothing else is remembered: whatever was interrupted, the records say what is next.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from study.measurement import Outcome, TrialRecord
from study.results.arms import ArmResult, Kind, candidates, compare_records, place, ranked, replicate_number, replicated
from study.results.best import contenders
from study.results.intervals import CONFIDENCE, interval
from study.spec import ObjectiveSpec, StudySpec
from study.trial import TrialSpec

FIRST_LOOK = 3
"""Seeds that every finalist gets."""

BETWEEN_LOOKS = 2
"""Seeds between two looks at the race: trials of one look are trained side by side."""

CONFIRMED = 3
"""How many trials `study best --confirm` trains again, at most."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """A trial of the search with other seeds."""

    trial_id: str
    replicate_of: str
    arm: str
    trial: TrialSpec


def wanted(spec: StudySpec, records: Sequence[TrialRecord]) -> list[Replicate]:
    """The replicates to be trained until the next look that have not ended, in order; none when the race is over.

    A look gives up finalists that are settled to be behind, and ends the race when the arms' leaders are settled to be in order. Settled
    means that the interval of the paired difference does not hold 0; the more looks there are, the wider the interval: with n looks its
    confidence is 1 - 0.05/n.
    """
    ended = {record.trial_id for record in records if record.outcome is not Outcome.INTERRUPTED}
    racing = finalists(records, spec.objective, spec.replicate.top)
    for first, last in _stages(spec.replicate.seeds):
        if first > 1:
            seen = [record for record in records if (replicate_number(record.trial_id) or first) < first]
            leaders, racing = _looked(spec, seen, racing)
            if _in_order(leaders, spec):
                return []
        batch = [replicate(spec, record, number) for number in range(first, last + 1) for record in racing]
        if left := [one for one in batch if one.trial_id not in ended]:
            return left
    return []


def finalists(records: Iterable[TrialRecord], objective: ObjectiveSpec, top: int) -> list[TrialRecord]:
    """The best completed trials of each arm by their own values, arms taking turns."""
    by_arm: dict[str, list[TrialRecord]] = {}
    for record in contenders(records, objective):
        by_arm.setdefault(record.arm, []).append(record)
    return [by_arm[arm][number] for number in range(top) for arm in sorted(by_arm) if number < len(by_arm[arm])]


def confirmed(spec: StudySpec, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that `study best --confirm` trains again: the best few, by their replicates where there are some."""
    known = {record.trial_id: record for record in records}
    leading = sorted(compare_records(records, spec.objective).candidates, key=lambda one: place(one, spec.objective))
    best = [known[one.trial_id] for one in leading if one.trial_id in known] or contenders(records, spec.objective)
    return best[:CONFIRMED]


def confirmations(spec: StudySpec, records: Sequence[TrialRecord], seeds: int) -> list[Replicate]:
    """The solo replicates of `study best --confirm` that have not ended."""
    ended = {record.trial_id for record in records if record.outcome is not Outcome.INTERRUPTED}
    batch = [replicate(spec, record, number, "c") for number in range(1, seeds + 1) for record in confirmed(spec, records)]
    return [one for one in batch if one.trial_id not in ended]


def replicate(spec: StudySpec, record: TrialRecord, number: int, kind: Kind = "r") -> Replicate:
    """A trial with the seeds of a replicate's number: `seed` and `data.seed` follow from `search.seed` and the number, in every arm alike."""
    tree = TrialSpec.model_validate(record.trial).canonical()
    tree["seed"], tree["data"]["seed"] = seeds_of(spec.search.seed, number, kind)
    return Replicate(f"{record.trial_id}-{kind}{number}", record.trial_id, record.arm, TrialSpec.model_validate(tree))


def seeds_of(search_seed: int, number: int, kind: Kind = "r") -> tuple[int, int]:
    """`seed` and `data.seed` of a replicate: drawn once for all trials of a study, and others for `--confirm`."""
    digest = hashlib.sha256(f"{search_seed}/{kind}/{number}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1, int.from_bytes(digest[4:8]) >> 1


def _stages(seeds: int) -> Iterator[tuple[int, int]]:
    """First and last number of the replicates between two looks: (1, 3), (4, 5), (6, 7), ..."""
    first = 1
    while first <= seeds:
        last = min(seeds, FIRST_LOOK if first == 1 else first + BETWEEN_LOOKS - 1)
        yield first, last
        first = last + 1


def _looked(spec: StudySpec, seen: Sequence[TrialRecord], racing: list[TrialRecord]) -> tuple[list[ArmResult], list[TrialRecord]]:
    """The leader of each arm, and those that go on."""
    here = {record.trial_id for record in racing}
    found = [one for one in candidates(map(replicated, seen)) if one.trial_id in here]
    leaders: list[ArmResult] = []
    given_up: set[str] = set()
    for arm in dict.fromkeys(one.arm for one in found):
        first, *others = ranked([one for one in found if one.arm == arm], spec.objective)
        leaders.append(first)
        given_up |= {one.trial_id for one in others if (one.lost and not first.lost) or is_settled(first, one, spec.replicate.seeds)}
    return leaders, [record for record in racing if record.trial_id not in given_up]


def _in_order(leaders: list[ArmResult], spec: StudySpec) -> bool:
    """Whether each arm's leader is settled to be ahead of the next one's; a single arm has no order to settle."""
    ordered = sorted(leaders, key=lambda one: place(one, spec.objective))
    return len(ordered) > 1 and all(is_settled(one, other, spec.replicate.seeds) for one, other in pairwise(ordered))


def is_settled(one: ArmResult, other: ArmResult, seeds: int) -> bool:
    """Whether the paired difference of two candidates is told from 0, at a look of a race over so many seeds."""
    common = sorted(one.values.keys() & other.values.keys())
    looks = max(1, ceil((seeds - FIRST_LOOK) / BETWEEN_LOOKS))
    if len(common) < FIRST_LOOK:
        return False
    apart = np.array([one.values[seed] - other.values[seed] for seed in common])
    # Differences that are all the same, as errors of few images may be, say nothing about the noise.
    found = interval((apart,), 1 - (1 - CONFIDENCE) / looks) if np.ptp(apart) else None
    return found is not None and not found[0] <= 0 <= found[1]
