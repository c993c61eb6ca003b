"""Tune events into the ledger. The callback holds a folder's name and nothing else: Tune pickles it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from study.measurement import Ending, Outcome
from study.tracking.outbox import Outbox
from study.tuning.trainables import MEASUREMENT, VALUE, ending_of
from study.tuning.trial_files import folder_of, snapshot_path

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


class LedgerCallback(Callback):
    """Writes what Tune's trials start, measure and end into the study's ledger."""

    def __init__(self, outbox: Outbox, folder: Path) -> None:
        self._outbox, self._folder = outbox, folder

    def on_trial_start(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial was given a process, for the first time or again."""
        config = trial.config
        which = {"arm": config["arm"], "replicate_of": config["replicate_of"]}
        self._outbox.start(config["trial_id"], trial=json.loads(config["trial"]), tags=config["tags"], **which)

    def on_trial_result(self, iteration: int, trials: list["Trial"], trial: "Trial", result: dict[str, Any], **info: Any) -> None:
        """An epoch was measured. The samples are taken out of the result, which Tune would keep in memory."""
        measurement = result.pop(MEASUREMENT, None)
        if measurement is not None:
            self._outbox.measure(trial.config["trial_id"], measurement)

    def on_trial_complete(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial ended, by itself or by a decision."""
        result = trial.last_result or {}
        settle(self._outbox, self._folder, trial.config["trial_id"], ending_of(result), result.get(VALUE))

    def on_trial_error(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial's process was lost for good."""
        settle(self._outbox, self._folder, trial.config["trial_id"], ending_of(None, error=True), None)


def settle(outbox: Outbox, folder: Path, trial_id: str, ending: Ending, value: float | None) -> None:
    """Closes a trial in the ledger and removes what only a running trial needs."""
    if ending.error:
        artifacts = folder_of(folder, trial_id) / "artifacts"
        artifacts.mkdir(parents=True, exist_ok=True)
        (artifacts / "traceback.txt").write_text(ending.error)
    outbox.end(trial_id, ending, value if ending.outcome in (Outcome.COMPLETED, Outcome.STOPPED) else None)
    if ending.outcome is not Outcome.INTERRUPTED:
        snapshot_path(folder, trial_id).unlink(missing_ok=True)
