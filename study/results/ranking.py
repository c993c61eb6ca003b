"""Ranking: which trial a study recommends. Fresh seeds count before the value that a trial was found by.

confirmed solo (`study best --confirm`)  >  replicated (`replicate`)  >  a single trial's own value
"""

from collections.abc import Sequence

from study.measurement import TrialRecord
from study.results.arms import ArmResult, candidates, compare_records, ranked, replicated
from study.results.best import choose_best
from study.spec import ObjectiveSpec


def recommended(records: Sequence[TrialRecord], objective: ObjectiveSpec) -> tuple[TrialRecord, ArmResult | None] | None:
    """The study's best trial, with the fresh seeds that made it so; None without a completed trial.

    The best mean of those that `--confirm` trained again counts first, then the best arm's best candidate by its replicates, then a single
    trial's own value.
    """
    known = {record.trial_id: record for record in records}
    confirmed = ranked([one for one in candidates(map(replicated, records), "c") if one.mean is not None], objective)
    winner = confirmed[0] if confirmed else compare_records(records, objective).winner
    if winner is not None and winner.trial_id in known:
        return known[winner.trial_id], winner
    alone = choose_best(records, objective)
    return None if alone is None else (alone, None)
