"""Tune events into the ledger. The callback holds a folder's name and nothing else: Tune pickles it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from study.measurement import Ending, History, Outcome
from study.spec import ObjectiveSpec
from study.tracking.outbox import Outbox
from study.trial import TrialSpec
from study.tuning.failures import FirstFailures
from study.tuning.trainables import MEASUREMENT, SECONDS, STEP, ending_of
from study.tuning.trial_files import folder_of, snapshot_path

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

UNREAD = (
    *(STEP, SECONDS, "config", "date", "done", "hostname", "timestamp", "training_iteration"),
    *("time_this_iter_s", "time_total_s", "time_since_restore", "iterations_since_restore"),
)
"""Keys of a Tune result that have been read when a callback hears of it."""


class LedgerCallback(Callback):
    """Writes what Tune's trials start, measure and end into the study's ledger."""

    def __init__(self, outbox: Outbox, folder: Path, objective: ObjectiveSpec, failures: FirstFailures, max_failures: int = 3) -> None:
        """Writes into a ledger.

        Args:
            failures: Is told how each trial ended.
            max_failures: How often in a row a trial may lose its process without getting any further.
        """
        self._outbox, self._folder, self._objective = outbox, folder, objective
        self._failures, self._max_failures = failures, max_failures

    def on_trial_start(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial was given a process, for the first time or again."""
        config = trial.config
        which = {"arm": config["arm"], "replicate_of": config.get("replicate_of", "")}
        self._outbox.start(config["trial_id"], trial=TrialSpec.model_validate_json(config["trial"]).canonical(), tags=config["tags"], **which)

    def on_trial_result(self, iteration: int, trials: list["Trial"], trial: "Trial", result: dict[str, Any], **info: Any) -> None:
        """An epoch was measured. What nobody reads again is taken out of the result, which Tune keeps in memory, numbers with their statistics."""
        measurement = result.pop(MEASUREMENT, None)
        for name in UNREAD:
            result.pop(name, None)
        if measurement is not None:
            self._outbox.measure(trial.config["trial_id"], measurement)
        # Whoever gets further has all its attempts again: on machines that die a long trial outlives many of them.
        trial.max_failures = trial.num_failures + self._max_failures

    def on_trial_recover(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial gets another process, which has to know what the lost one had measured."""
        history = [value for _, value in history_of(self._outbox, trial.config["trial_id"], self._objective)]
        trial.config |= {"history": history, "epoch": len(history)}

    def on_trial_complete(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial ended, by itself or by a decision."""
        self._settle(trial, ending_of(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial's process was lost for good, maybe before it ran."""
        self.on_trial_start(iteration, trials, trial)
        self._settle(trial, ending_of(None, error=True))

    def _settle(self, trial: "Trial", ending: Ending) -> None:
        trial_id = trial.config["trial_id"]
        settle(self._outbox, self._folder, trial_id, ending, value_of(self._outbox, trial_id, self._objective))
        self._failures.see(ending)


def history_of(outbox: Outbox, trial_id: str, objective: ObjectiveSpec) -> History:
    """Epoch and objective of all that a trial measured."""
    return [(seen.epoch, seen.values[objective.metric]) for seen in outbox.history(trial_id) if objective.metric in seen.values]


def value_of(outbox: Outbox, trial_id: str, objective: ObjectiveSpec) -> float | None:
    """A trial's value by what the ledger knows, whichever processes measured it; None without a measurement."""
    history = [value for _, value in history_of(outbox, trial_id, objective)]
    return objective.value(history) if history else None


def settle(outbox: Outbox, folder: Path, trial_id: str, ending: Ending, value: float | None) -> None:
    """Closes a trial in the ledger and removes what only a running trial needs."""
    if ending.error:
        artifacts = folder_of(folder, trial_id) / "artifacts"
        artifacts.mkdir(parents=True, exist_ok=True)
        (artifacts / "traceback.txt").write_text(ending.error)
    outbox.end(trial_id, ending, value if ending.outcome in (Outcome.COMPLETED, Outcome.STOPPED) else None)
    if ending.outcome is not Outcome.INTERRUPTED:
        snapshot_path(folder, trial_id).unlink(missing_ok=True)
