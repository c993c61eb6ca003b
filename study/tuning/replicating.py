"""Replicating: trains the replicates that are wanted, after the search and for `study best --confirm`.

ledger ─plan─> Tune ─> ledger ─plan─> ... ─> none is wanted       whatever ends it early: interrupted ones go on, others are stopped
"""

import threading
import time
from collections.abc import Callable, Sequence

from study.home import StudyFolder
from study.measurement import Ending, Outcome, TrialRecord
from study.results.arms import Kind, replicate_number
from study.spec import BudgetSpec, StudySpec
from study.tracking.outbox import Outbox
from study.tuning.choice import Choice
from study.tuning.hosting import tune_replicates
from study.tuning.replication import Replicate, confirmations, wanted


def train_replicates(spec: StudySpec, folder: StudyFolder, choice: Choice, interrupt: threading.Event, began: float) -> None:
    """Races the best few of each arm, until the order is settled, all seeds are trained or the budget is spent.

    Args:
        began: When this start of the study began, on the monotonic clock.
    """
    most = spec.replicate.top * spec.replicate.seeds * len(spec.arms)
    budget = _left(spec, began)
    if budget is None:
        return
    spec = spec.model_copy(update={"budget": budget})
    _train(spec, folder, choice, interrupt, lambda records: wanted(spec, records), most, "r")


def train_confirmations(spec: StudySpec, folder: StudyFolder, choice: Choice, interrupt: threading.Event, seeds: int) -> None:
    """Trains the best few trials again with seeds of their own; whoever asks for that is not held to the budget of the search."""
    spec = spec.model_copy(update={"budget": BudgetSpec(same_failures=0)})
    left = len(confirmations(spec, Outbox(folder.path).records(), seeds))
    _train(spec, folder, choice, interrupt, lambda records: confirmations(spec, records, seeds), left, "c")


def _left(spec: StudySpec, began: float) -> BudgetSpec | None:
    """What the search left of the budget; None where no time is left. What ends a search, such as its target, does not end a race."""
    wall = spec.budget.wall
    if wall is not None:
        wall -= time.monotonic() - began
        if wall <= 0:
            return None
    return spec.budget.model_copy(update={"wall": wall, "target": None, "no_improvement": None, "same_failures": 0})


def _train(
    spec: StudySpec,
    folder: StudyFolder,
    choice: Choice,
    interrupt: threading.Event,
    plan: Callable[[Sequence[TrialRecord]], Sequence[Replicate]],
    most: int,
    kind: Kind,
) -> None:
    from study.tuning.callbacks import settle
    from study.tuning.trial_files import snapshot_path

    outbox = Outbox(folder.path)
    if plan(outbox.records()):
        tune_replicates(spec, folder.path, outbox, lambda: plan(outbox.records()), interrupt, choice, most)
    cut_short = Ending(Outcome.INTERRUPTED) if interrupt.is_set() else Ending(Outcome.STOPPED, "budget")
    for entry in outbox.running():
        if entry.replicate_of:
            ours = replicate_number(entry.trial_id, kind) is not None
            settle(outbox, folder.path, entry.trial_id, cut_short if ours else Ending(Outcome.INTERRUPTED), None)
    for record in outbox.records():
        # An engine may write a trial's snapshot once more before it hears that the trial was stopped.
        if record.replicate_of and record.outcome is not Outcome.INTERRUPTED:
            snapshot_path(folder.path, record.trial_id).unlink(missing_ok=True)
