"""A Tune trial: a solo engine in its own process. Importing this module imports no torch.

    config from the searcher ──> engine.admit ──> step() = one epoch ──> result
                                      ▲                │
                              snapshot on disk <───────┘     a worker that dies costs at most SNAPSHOT_SECONDS and one epoch

Errors in the user's code end the trial as `failed` here, with their traceback; only a lost process is Tune's to handle.
"""

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from study.measurement import Ending, Outcome
from study.spec import ObjectiveSpec
from study.trial import TrialSpec
from study.tuning.stopping import EPOCH, OBJECTIVE

if TYPE_CHECKING:
    from study.engines.engine import Progress
    from study.engines.solo import SoloEngine

SNAPSHOT_SECONDS = 5.0
"""Training time between snapshots."""

ENDING, VALUE, STEP, MEASUREMENT = "ending", "value", "step", "measurement"
"""Keys of a Tune result, beside those of `stopping`."""


def ending_of(result: Mapping[str, Any] | None, error: bool = False) -> Ending:
    """How a trial ended, from its last result: the one place where this is decided.

    What the engine says counts; a trial that Tune ended without the engine's saying so was stopped by the scheduler.
    """
    if result and (said := result.get(ENDING)):
        return said  # type: ignore[no-any-return]
    if error:
        return Ending(Outcome.FAILED, error="the worker process was lost, also when it was started again")
    return Ending(Outcome.STOPPED, "scheduler")


def folder_of(study: Path, trial_id: str) -> Path:
    """Where a trial's files lie."""
    return study / "trials" / trial_id


def snapshot_path(study: Path, trial_id: str) -> Path:
    """Where a trial's latest snapshot lies while it runs."""
    return folder_of(study, trial_id) / "snapshot.pt"


class SoloTrainable(tune.Trainable):
    """Trains one trial at a time with a SoloEngine and reports every epoch.

    Its config: `trial_id`, `arm`, `trial` (the spec as JSON), `objective` (JSON), `folder` (the study's), `device`,
    `epoch` and `history` (where an earlier start left the trial), `keep_weights` (`best`, `all` or `none`).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the config; training starts with the first step, so that errors there are the trial's own."""
        self._config = config
        self._engine: SoloEngine | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial into the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One epoch of the trial, as a Tune result."""
        try:
            if self._engine is None:
                self._admit()
            assert self._engine is not None
            (progress,) = self._engine.advance()
            return self._report(progress)
        except Exception as error:  # whatever the user's model, data or metric raises fails this trial, not the study
            text = "".join(traceback.format_exception(error))
            return {ENDING: Ending(Outcome.FAILED, error=text), "done": True}

    def _admit(self) -> None:
        from study.engines.engine import Snapshot
        from study.engines.solo import SoloEngine

        self._trial_id, self._folder = self._config["trial_id"], Path(self._config["folder"])
        self._objective = ObjectiveSpec.model_validate_json(self._config["objective"])
        path = snapshot_path(self._folder, self._trial_id)
        snapshot = Snapshot.load(path) if path.exists() else None
        self._history: list[float] = list(self._config["history"][: snapshot.epoch if snapshot else 0])
        engine = SoloEngine(self._config["device"])
        engine.admit(self._trial_id, TrialSpec.model_validate(json.loads(self._config["trial"])), snapshot)
        self._engine, self._saved = engine, time.monotonic()

    def _report(self, progress: "Progress") -> dict[str, Any]:
        measurement, ending = progress.measurement, progress.ending
        result: dict[str, Any] = {EPOCH: measurement.epoch, STEP: measurement.step, MEASUREMENT: measurement}
        if self._objective.metric in measurement.values:
            self._history.append(measurement.values[self._objective.metric])
            result |= {OBJECTIVE: self._history[-1], VALUE: self._objective.value(self._history)}
        elif ending is None or ending.outcome is Outcome.COMPLETED:
            ending = Ending(Outcome.FAILED, error=f"no value of the objective {self._objective.metric!r} at epoch {measurement.epoch}")
        if ending is not None:
            self._close(ending)
            return {**result, ENDING: ending, "done": True}
        if time.monotonic() - self._saved > SNAPSHOT_SECONDS:
            self._save()
        return result

    def _save(self) -> None:
        assert self._engine is not None
        self._engine.snapshot(self._trial_id).save(snapshot_path(self._folder, self._trial_id))
        self._saved = time.monotonic()

    def _close(self, ending: Ending) -> None:
        assert self._engine is not None
        keep = self._config["keep_weights"]
        if ending.outcome is Outcome.COMPLETED and keep != "none":
            from safetensors.torch import save_file

            own = folder_of(self._folder, self._trial_id)
            folder = own / "artifacts" if keep == "all" else own
            folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(self._engine.weights(self._trial_id)), folder / "model.safetensors")
        self._engine.release(self._trial_id)
