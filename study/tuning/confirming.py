"""Confirming: trains the best few trials of a finished study again, solo, with fresh seeds of their own: what ships was seen to hold.

best by replicates, else by the search ─> c1, c2, ... of each ─> ranked by their means ─> best.yaml
"""

import threading
from pathlib import Path
from typing import Any

from study.errors import InputError
from study.home import StudyFolder, home_path, tracking_uri_for
from study.measurement import Outcome
from study.tracking.outbox import Outbox
from study.tuning.choice import solo_engine
from study.tuning.choosing import choose
from study.tuning.driver import StudyResult, Watch, read, recorded
from study.tuning.preflight import check_room
from study.tuning.replicating import train_confirmations
from study.tuning.replication import confirmations, confirmed


def forecast(name: str, seeds: int, *, home: str | Path | None = None) -> dict[str, Any]:
    """What `confirm` would do: the trials, how many trainings are left, and the seconds that those took in the search.

    Raises:
        NotFound: if there is no such study.
        InputError: if it has not finished, or its trials were mutated as they trained.
    """
    folder = _finished(name, home)
    spec, records = folder.load_spec(), Outbox(folder.path).records()
    left = confirmations(spec, records, seeds)
    seconds = {record.trial_id: record.seconds for record in records}
    return {
        "trials": [record.trial_id for record in confirmed(spec, records)],
        "seeds": seeds,
        "left": len(left),
        "seconds": sum(seconds[one.replicate_of] for one in left),
    }


def confirm(name: str, seeds: int, *, home: str | Path | None = None, tracking_uri: str | None = None, watch: Watch | None = None) -> StudyResult:
    """Trains the best few trials of a finished study again, and ranks them by that.

    Args:
        name: The study.
        seeds: How many fresh seeds each gets; those that an earlier call trained count.
        home: Folder of all studies. Default: `$STUDY_HOME`, else `./studies`.
        tracking_uri: MLflow store. Default: `$MLFLOW_TRACKING_URI`, else SQLite in the home.
        watch: Shows progress.

    Raises:
        NotFound: if there is no such study.
        InputError: if it has not finished, its trials were mutated as they trained, or this machine has less than a trial reserves.
        Interrupted: after Ctrl-C; the same call goes on.
    """
    folder, base = _finished(name, home), home_path(home)
    spec, store = folder.load_spec(), tracking_uri_for(base, tracking_uri)
    with folder.running():
        if folder.card().state == "finished" and not confirmations(spec, Outbox(folder.path).records(), seeds):
            return read(folder, spec, store)
        check_room(spec.resources)
        plain = solo_engine("a best trial is confirmed by the plain engine")

        def work(interrupt: threading.Event) -> str:
            train_confirmations(spec, folder, plain, interrupt, seeds)
            return ""

        return recorded(spec, folder, store, choose(spec, base), watch, work)


def _finished(name: str, home: str | Path | None) -> StudyFolder:
    """The folder of a study whose search has ended, and whose trials can be trained again."""
    folder = StudyFolder.find(home_path(home), name)
    if folder.load_spec().stopping.scheduler == "pbt":
        said = "trials of population based training cannot be confirmed: fresh seeds would be trained with the values of a launch"
        raise InputError(said, where=name, remedy="search near the mutations of best.yaml with another scheduler, and confirm that study")
    if folder.is_running():
        raise InputError("runs now", where=name, remedy="confirm its best trials once it has ended")
    records = Outbox(folder.path).records()
    if not folder.best.exists() or any(record.outcome is Outcome.INTERRUPTED and not record.replicate_of for record in records):
        raise InputError("has not finished, so its best trials are not known", where=name, remedy=f"finish it with: study resume {name}")
    return folder
