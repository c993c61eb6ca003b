"""Status: where a study stands, read from its folder alone, whether or not it runs."""

from typing import Any

from study.home import StudyFolder
from study.measurement import Outcome, TrialRecord
from study.results.best import choose_best
from study.space import arm_label
from study.spec import StudySpec
from study.tracking.outbox import RUNNING, Entry, Outbox

COUNTS = ("completed", "stopped", "diverged", "failed", "interrupted", "running", "waiting")


def status(folder: StudyFolder) -> dict[str, Any]:
    """The JSON document of `study status`."""
    spec, card = folder.load_spec(), folder.card()
    entries = Outbox(folder.path).entries()
    per_arm = spec.search.trials // len(spec.arms)
    arms = {}
    for arm in map(arm_label, spec.arms):
        mine = [entry for entry in entries if entry.arm == arm]
        arms[arm] = {**_counts(mine, per_arm), "best": _best(mine, spec)}
    return {
        "study_id": card.study_id,
        "name": card.name,
        "state": card.state,
        "trials": _counts(entries, spec.search.trials),
        "arms": arms,
        "best": _best(entries, spec),
        "budget": {"trials": spec.search.trials, "wall": spec.budget.wall, "gpu_hours": spec.budget.gpu_hours, "trial_seconds": sum(entry.seconds for entry in entries)},
    }


def records_of(entries: list[Entry]) -> list[TrialRecord]:
    """The ended trials among a ledger's entries."""
    return [
        TrialRecord(entry.trial_id, entry.arm, Outcome(entry.state), entry.reason, entry.trial, entry.value, entry.step, entry.epoch, entry.metrics, entry.run_id)
        for entry in entries
        if entry.state != RUNNING
    ]


def _counts(entries: list[Entry], planned: int) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    for entry in entries:
        counts[entry.state] += 1
    counts["waiting"] = max(0, planned - len(entries))
    return counts


def _best(entries: list[Entry], spec: StudySpec) -> dict[str, Any] | None:
    best = choose_best(records_of(entries), spec.objective)
    if best is None:
        return None
    return {"trial_id": best.trial_id, "arm": best.arm, "value": best.value, "metric": spec.objective.metric, "run_id": best.run_id}
