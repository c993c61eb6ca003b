"""A Tune trial: a solo engine in its own process, or a light proxy of a row in an engine actor. Importing this module imports no torch.

    config from the searcher ──> engine ──> step() = one epoch ──> result
                                   ▲             │
                           snapshot on disk <────┘     a process that dies costs little more than one epoch

Errors in the user's code end the trial as `failed` here, with their traceback; only a lost process is Tune's to handle.
"""

import gc
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from study.measurement import EXPLOITS, Ending, Outcome, Progress
from study.spec import ObjectiveSpec
from study.trial import TrialSpec
from study.tuning.exploiting import exploit_of, going_on, refer, save
from study.tuning.failures import failed, kind
from study.tuning.stopping import EPOCH, OBJECTIVE, stalled
from study.tuning.trial_files import keep_weights, snapshot_path

if TYPE_CHECKING:
    from study.engines.solo import SoloEngine

SNAPSHOT_SECONDS = 5.0
"""Training time between snapshots."""

MOST_ENGINES = 5
"""Engines that a trial tries for one epoch before it gives up."""

PAUSE = 0.1
"""Seconds between two looks at the roll call."""

LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.RaySystemError)
"""What Ray raises when another process or node is gone: no fault of the trial."""

ENDING, VALUE, STEP, MEASUREMENT, SECONDS, MUTATED = "ending", "value", "step", "measurement", "seconds", "mutated"
"""Keys of a Tune result, beside those of `stopping`."""


def ending_of(result: Mapping[str, Any] | None, error: bool = False) -> Ending:
    """How a trial ended, from its last result: the one place where this is decided.

    What the engine says counts; a trial that Tune ended without the engine's saying so was stopped by the scheduler.
    """
    if result and (said := result.get(ENDING)):
        return said  # type: ignore[no-any-return]
    if error:
        return Ending(Outcome.FAILED, "worker-lost", "the worker process was lost, also when it was started again")
    return Ending(Outcome.STOPPED, "scheduler")


class StudyTrainable(tune.Trainable):
    """A trial as Tune sees it: reports every epoch, from whoever trains it.

    Its config: `trial_id`, `arm`, `trial` (the spec as JSON), `objective` (JSON), `folder` (the study's), `device`,
    `epoch` and `history` (where an earlier start left the trial), `keep_weights` (`best`, `all` or `none`), `patience` and `grace` (epochs),
    `test` (whether the test images are looked at, at its end), `replicate_of` (the trial that it repeats, or nothing), `roll`, the name of
    the study's RollCall, `pool`, the name of the pool of engines, where trials are fused, and `exploit`, what it took over last in a population.
    """

    _has_begun = False
    """Whether the processes that the study starts with are there, as far as this one knows."""

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the config; training starts with the first step, so that errors there are the trial's own."""
        self._trial_id, self._folder = config["trial_id"], Path(config["folder"])
        self._objective = ObjectiveSpec.model_validate_json(config["objective"])
        self._config = config
        self._history: list[float] = list(config["history"])
        self._was_without_memory = False
        self._exploit: dict[str, Any] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial into the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One epoch of the trial, as a Tune result."""
        try:
            progress = self._advance()
            self._wait_for_others()
            return self._report(progress)
        except LOST:
            raise  # Tune gives the trial another process
        except Exception as error:  # whatever the user's model, data or metric raises fails this trial, not the study
            if kind(error) == "out-of-memory" and not self._was_without_memory:
                self._was_without_memory = True
            else:
                return {ENDING: failed(error), "done": True}
        self._start_over()
        return self.step()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes where the trial stands, for itself and for others of its population: Tune keeps no more than a reference."""
        refer(Path(checkpoint_dir), self._trial_id, self._saved())

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Goes on from the trial's own snapshot, or with the state of another trial where the checkpoint is that one's."""
        self._exploit = exploit_of(Path(checkpoint), self._config)

    def _wait_for_others(self) -> None:
        """Holds the first result of this process back until the study has all processes that it starts with: see RollCall."""
        while not self._has_begun:
            roll = self._config.get("roll")
            self._has_begun = not roll or bool(ray.get(ray.get_actor(roll).has_begun.remote(self._process)))
            if not self._has_begun:
                time.sleep(PAUSE)

    @property
    def _process(self) -> str:
        return str(ray.get_runtime_context().get_actor_id())

    def _saved(self) -> int:
        """Writes the trial's state; returns its epoch."""
        raise NotImplementedError

    def _advance(self) -> Progress:
        """Trains one epoch."""
        raise NotImplementedError

    def _start_over(self) -> None:
        """Gives back all memory: the next epoch begins at the latest snapshot."""
        raise NotImplementedError

    def _report(self, progress: Progress) -> dict[str, Any]:
        measurement, ending = progress.measurement, progress.ending
        if ending is not None and ending.outcome is Outcome.FAILED:
            return {ENDING: ending, "done": True}
        result: dict[str, Any] = {EPOCH: measurement.epoch, STEP: measurement.step, MEASUREMENT: measurement, SECONDS: measurement.seconds}
        if EXPLOITS in measurement.values:
            result[MUTATED] = True
        value = measurement.values.get(self._objective.metric, math.nan)
        if math.isfinite(value):
            # A trial that was started again may go on before the last epoch that is known.
            self._history = [*self._history[: measurement.epoch - 1], value]
            result |= {OBJECTIVE: self._history[-1], VALUE: self._objective.value(self._history)}
            if ending is None and self._has_stalled():
                ending = Ending(Outcome.STOPPED, "patience")
        elif ending is None or ending.outcome is Outcome.COMPLETED:
            text = f"no value of the objective {self._objective.metric!r} at epoch {measurement.epoch}"
            ending = Ending(Outcome.FAILED, "user-code", text)
        return result if ending is None else {**result, ENDING: ending, "done": True}

    def _has_stalled(self) -> bool:
        """Whether the trial has used up its patience; epochs of the grace period do not count."""
        patience, grace = self._config.get("patience"), self._config.get("grace", 0)
        return patience is not None and len(self._history) >= grace + patience and stalled(self._history, self._objective, patience)


class SoloTrainable(StudyTrainable):
    """Trains one trial at a time with a SoloEngine in this process."""

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the config."""
        super().setup(config)
        self._engine: SoloEngine | None = None

    def _advance(self) -> Progress:
        if self._engine is None:
            self._engine = self._admitted()
            self._saved_at = time.monotonic()
        elif time.monotonic() - self._saved_at > SNAPSHOT_SECONDS:
            # Who is asked for the next epoch has told of the last one: no trial is ever started again beyond what the study knows.
            self._engine.snapshot(self._trial_id).save(snapshot_path(self._folder, self._trial_id))
            self._saved_at = time.monotonic()
        (progress,) = self._engine.advance()
        if progress.ending is not None and progress.ending.outcome is Outcome.COMPLETED:
            keep_weights(self._folder, self._trial_id, self._config["keep_weights"], self._engine.weights)
        return progress

    def _start_over(self) -> None:
        from study.engines.solo import give_back_memory

        self._engine = None
        gc.collect()
        give_back_memory()

    def _saved(self) -> int:
        assert self._engine is not None, "a trial is saved after a result"
        return save(self._folder, self._trial_id, self._engine.snapshot(self._trial_id))

    def _admitted(self) -> "SoloEngine":
        from study.engines.solo import SoloEngine

        launched = TrialSpec.model_validate_json(self._config["trial"])
        trial, snapshot = going_on(self._folder, self._trial_id, launched, len(self._history), self._exploit)
        engine = SoloEngine(self._config["device"])
        engine.admit(self._trial_id, trial, snapshot, test=self._config["test"])
        return engine


class FusedTrainable(StudyTrainable):
    """A light proxy: waits for the epochs of its trial from the engine actor of its GPU, or of one of its node's cores. No torch here.

    An engine that dies is replaced through the pool, and the trial goes on from its latest snapshot: Tune does not notice.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the config."""
        super().setup(config)
        self._epoch = config["epoch"]
        self._engine: Any = None
        self._is_away, self._is_anew = True, False

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Goes on from a file: an engine may still hold the trial as it was before it was paused."""
        super().load_checkpoint(checkpoint)
        self._is_anew = True

    def _saved(self) -> int:
        return int(ray.get(self._engine.save.remote(self._trial_id)))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Lets go of the trial that was stopped, and takes the next one, on the same engine."""
        self._leave()
        engine = self._engine
        self.setup(new_config)
        self._engine = engine
        return True

    def cleanup(self) -> None:
        """Lets go of the trial and of the engine."""
        self._leave()
        self._pool.leave.remote(self._process)

    def _start_over(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._engine is not None and not self._is_away:
            self._engine.release.remote(self._trial_id, self._process)
            self._is_away = True

    def _advance(self) -> Progress:
        for attempt in range(MOST_ENGINES):
            if self._engine is None or attempt:
                self._engine = self._found(lost=bool(attempt))
            try:
                self._is_away = False
                progress: Progress | None = ray.get(self._engine.next.remote(*self._wanted()))
                while progress is None:
                    self._engine = self._found(lost=False)
                    progress = ray.get(self._engine.next.remote(*self._wanted()))
            except LOST as error:
                lost = error
                continue
            self._epoch = progress.measurement.epoch
            self._is_away, self._is_anew = progress.ending is not None, False
            return progress
        raise lost

    def _wanted(self) -> tuple[Any, ...]:
        """What an engine is asked for."""
        return self._trial_id, self._config["trial"], self._epoch, self._config["test"], self._process, self._is_anew, self._exploit

    @property
    def _pool(self) -> Any:
        return ray.get_actor(self._config["pool"])

    def _found(self, lost: bool) -> Any:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return ray.get(self._pool.engine.remote(self._process, context.get_node_id(), gpus[0] if gpus else "", lost))
