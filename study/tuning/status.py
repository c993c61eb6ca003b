"""Status: where a study stands, read from its folder alone, whether or not it runs."""

from typing import Any

from study.home import StudyFolder
from study.measurement import TrialRecord
from study.results.best import choose_best
from study.space import arm_label
from study.spec import StudySpec
from study.tracking.outbox import Entry, Outbox
from study.tuning.points import planned

COUNTS = ("completed", "stopped", "diverged", "failed", "interrupted", "running", "waiting")


def status(folder: StudyFolder) -> dict[str, Any]:
    """The JSON document of `study status`."""
    spec, card, outbox = folder.load_spec(), folder.card(), Outbox(folder.path)
    entries, records = outbox.entries(), outbox.records()
    shares = planned(spec)
    outbox.close()
    arms = {}
    for arm in map(arm_label, spec.arms):
        mine = [entry for entry in entries if entry.arm == arm]
        arms[arm] = {**_counts(mine, shares[arm]), "best": _best([record for record in records if record.arm == arm], spec)}
    return {
        "study_id": card.study_id,
        "name": card.name,
        "state": card.state,
        "trials": _counts(entries, sum(shares.values())),
        "arms": arms,
        "best": _best(records, spec),
        "budget": {
            "trials": spec.search.trials,
            "wall": spec.budget.wall,
            "gpu_hours": spec.budget.gpu_hours,
            "trial_seconds": sum(entry.seconds for entry in entries),
        },
    }


def _counts(entries: list[Entry], planned: int) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    for entry in entries:
        counts[entry.state] += 1
    counts["waiting"] = max(0, planned - len(entries))
    return counts


def _best(records: list[TrialRecord], spec: StudySpec) -> dict[str, Any] | None:
    best = choose_best(records, spec.objective)
    if best is None:
        return None
    return {"trial_id": best.trial_id, "arm": best.arm, "value": best.value, "metric": spec.objective.metric, "run_id": best.run_id}
