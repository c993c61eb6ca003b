"""Reconcile: what a crash left behind, brought together before a study goes on.

    journal.log     a line cut off in the middle ── removed          a lock that nobody holds any more ── removed
    journal         ended there, running in the ledger ── ended in the ledger, too
    ledger          ended there, running in the journal ── told to the journal, with what it measured
    trials/         drafts of snapshots ── removed                   snapshots and saved states of ended trials ── removed

MLflow follows from the ledger: study.tracking brings it there, exactly once.
"""

import logging
from os import SEEK_END
from pathlib import Path

from study.errors import HomeError
from study.measurement import Ending, Outcome
from study.tracking.outbox import FILE, Outbox
from study.tracking.remedies import DAMAGED
from study.tuning.callbacks import history_of, settle
from study.tuning.exploiting import forget_saved
from study.tuning.search import Search
from study.tuning.trial_files import snapshot_path

LONGEST_LINE = 1_000_000
"""Bytes within which the journal's last line begins; lines have hundreds."""

JOURNAL = "journal.log"

DRAFTS = ("snapshot.*.tmp", "saved-*.*.tmp")
"""Files of a trial that an engine was writing when it died."""

log = logging.getLogger(__name__)


def repair(journal: Path) -> None:
    """Makes a journal readable again whose writer died or met a full disk in the middle of a line. Only who holds the study may call it.

    Optuna would take the line and the next one for one, and refuse both. Its lock, a symbolic link, it would wait for: for half a minute,
    or for ever where the link's target is a relative path (optuna 5.0).
    """
    lock = journal.with_name(f"{journal.name}.lock")
    lock.unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        size = file.seek(0, SEEK_END)
        file.seek(max(0, size - LONGEST_LINE))
        cut = len(file.read().rpartition(b"\n")[2])
        if cut:
            log.warning("warning: the last line of %s was not whole, and is left out (%d bytes)", journal, cut)
            file.truncate(size - cut)


def reconcile(search: Search, outbox: Outbox, folder: Path) -> None:
    """Lets journal and ledger agree on which trials have ended, and how; afterwards both know the same running ones.

    Raises:
        HomeError: if one of them was lost.
    """
    running, told, entries = set(outbox.orphans()), search.told(), outbox.entries()
    if told and not entries:
        raise HomeError(f"is empty, and {JOURNAL} has trials that ended", where=str(outbox.folder / FILE), remedy=DAMAGED)
    if entries and not told and not search.running():
        raise HomeError(f"is empty, and {FILE} has trials", where=str(outbox.folder / JOURNAL), remedy=DAMAGED)
    for trial_id, (ending, value) in told.items():
        if trial_id in running:
            settle(outbox, folder, trial_id, ending, value)
    records = {record.trial_id: record for record in outbox.records()}
    for proposal in search.running():
        record = records.get(proposal.trial_id)
        if record is not None and record.outcome is not Outcome.INTERRUPTED:
            history = history_of(outbox, proposal.trial_id, search.spec.objective)
            search.tell(proposal.trial_id, Ending(record.outcome, record.reason), record.value, history)  # type: ignore[arg-type]
    sweep(outbox, folder)


def sweep(outbox: Outbox, folder: Path) -> None:
    """Removes what only a running trial needs: an engine may write a snapshot once more before it hears that its trial has ended.

    Drafts of other files stay: the recorder may be writing them.
    """
    for drafts in DRAFTS:
        for draft in folder.glob(f"trials/*/{drafts}"):
            draft.unlink(missing_ok=True)
    for record in outbox.records():
        if record.outcome is not Outcome.INTERRUPTED:
            snapshot_path(folder, record.trial_id).unlink(missing_ok=True)
            forget_saved(folder, record.trial_id)
