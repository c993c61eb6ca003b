"""Status: where a study stands, read from its folder alone, whether or not it runs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from study.budget import Meter
from study.home import StudyFolder
from study.measurement import TrialRecord
from study.results.best import choose_best
from study.space import arm_label
from study.spec import ObjectiveSpec, StudySpec
from study.tracking.outbox import RUNNING, Entry, Outbox, record_of
from study.tuning.points import planned

if TYPE_CHECKING:
    from study.results.arms import ArmResult

COUNTS = ("completed", "stopped", "diverged", "failed", "interrupted", "running", "waiting")


def status(folder: StudyFolder) -> dict[str, Any]:
    """The JSON document of `study status`."""
    spec, card, outbox = folder.load_spec(), folder.card(), Outbox(folder.path)
    entries, ended = outbox.entries(), outbox.ended()
    records = [record_of(entry) for entry in entries if entry.state != RUNNING]
    shares = planned(spec)
    undelivered, silence = outbox.progress()["undelivered"], outbox.silence()
    outbox.close()
    searched = [entry for entry in entries if not entry.replicate_of]
    arms = {}
    for arm in map(arm_label, spec.arms):
        mine = [entry for entry in searched if entry.arm == arm]
        arms[arm] = {**_counts(mine, shares[arm]), "best": _best([record for record in records if record.arm == arm], spec)}
    return {
        "study_id": card.study_id,
        "name": card.name,
        "state": card.state,
        "trials": _counts(searched, sum(shares.values())),
        "arms": arms,
        "best": _best(records, spec),
        **_replicates(entries, records, spec),
        "undelivered": undelivered,
        "store": f"silent since {datetime.fromtimestamp(silence[0] / 1000, UTC).isoformat(timespec='seconds')}" if silence else "ok",
        "budget": meter_of(spec, entries, ended).document(card.wall()),
    }


def meter_of(spec: StudySpec, entries: Sequence[Entry], ended: Sequence[str]) -> Meter:
    """What a study has spent, as its ledger tells: all entries, and the ids of those that have ended, in the order of ending."""
    known = {entry.trial_id: entry for entry in entries if not entry.replicate_of}
    endings = [(known[trial_id].state, known[trial_id].value) for trial_id in ended if trial_id in known]
    return Meter.of(spec, endings, sum(entry.seconds for entry in entries))


def _counts(entries: list[Entry], planned: int) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    for entry in entries:
        counts[entry.state] += 1
    counts["waiting"] = max(0, planned - len(entries))
    return counts


def _replicates(entries: list[Entry], records: list[TrialRecord], spec: StudySpec) -> dict[str, Any]:
    """How many trials were trained again, and what they say of the arms."""
    again = [entry for entry in entries if entry.replicate_of]
    if not again:
        return {"replicates": _counts([], 0), "comparison": None}
    from study.results.arms import compare_records

    return {"replicates": _counts(again, 0), "comparison": compare_records(records, spec.objective).document()}


def _best(records: list[TrialRecord], spec: StudySpec) -> dict[str, Any] | None:
    found = _recommended(records, spec.objective)
    if found is None:
        return None
    best, fresh = found
    own = {"trial_id": best.trial_id, "arm": best.arm, "value": best.value, "metric": spec.objective.metric, "run_id": best.run_id}
    known = (fresh.mean, fresh.interval and list(fresh.interval), fresh.seeds) if fresh is not None else (None, None, 0)
    return {**own, **dict(zip(("mean", "interval", "seeds"), known, strict=True))}


def _recommended(records: list[TrialRecord], objective: ObjectiveSpec) -> "tuple[TrialRecord, ArmResult | None] | None":
    """As `ranking.recommended`, whose statistics take a moment to load and are not needed before there are replicates."""
    if not any(record.replicate_of for record in records):
        alone = choose_best(records, objective)
        return None if alone is None else (alone, None)
    from study.results.ranking import recommended

    return recommended(records, objective)
