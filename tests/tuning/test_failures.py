"""Every failure has a name and a rule."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.tune.error import TuneError

from study.engines.engine import Progress
from study.errors import ClusterLost, HomeError
from study.measurement import Ending, Measurement, Outcome
from study.spec import ObjectiveSpec
from study.tracking.outbox import Outbox
from study.trial import TrialSpec
from study.tuning.callbacks import LedgerCallback
from study.tuning.failures import FirstFailures, failed, kind, named, says
from study.tuning.trainables import ENDING, MEASUREMENT, StudyTrainable

OOM = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes.")


def broken(text: str) -> Ending:
    return Ending(Outcome.FAILED, "user-code", f"Traceback\n  line 7\n{text}\n")


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ArithmeticError("no"), "user-code"),
        (MemoryError(), "out-of-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
        (OOM, "out-of-memory"),
        (RuntimeError("shapes differ"), "user-code"),
    ],
)
def test_an_error_is_named_by_what_it_is(error: Exception, name: str) -> None:
    assert kind(error) == name
    wrapped = ValueError("in the user's wrapper")
    wrapped.__cause__ = error
    assert kind(wrapped) == name
    assert (failed(error).outcome, failed(error).reason) == (Outcome.FAILED, name)
    assert type(error).__name__ in failed(error).error


def test_torch_says_what_we_listen_for_when_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert kind(caught.value) == "out-of-memory"


class TestTheFirstFailures:
    def test_that_are_alike_stop_a_study_with_what_they_say(self) -> None:
        watch = FirstFailures(3)
        for _ in range(2):
            watch.see(broken("ZeroDivisionError: x"))
        assert watch.alike == ""
        watch.see(broken("ZeroDivisionError: x"))
        assert watch.alike == "user-code: ZeroDivisionError: x" == says(broken("ZeroDivisionError: x"))
        watch.see(Ending(Outcome.COMPLETED))
        assert watch.alike

    @pytest.mark.parametrize("other", [Ending(Outcome.COMPLETED), Ending(Outcome.DIVERGED, "nan"), broken("KeyError: 'y'")])
    def test_that_differ_or_follow_something_else_do_not(self, other: Ending) -> None:
        for before in (True, False):
            watch = FirstFailures(2)
            endings = [other, *[broken("ZeroDivisionError: x")] * 3] if before else [broken("ZeroDivisionError: x"), other, *[broken("E: z")] * 3]
            for ending in endings:
                watch.see(ending)
            assert watch.alike == ""

    def test_interrupted_trials_say_nothing_and_none_watches_where_none_is_wanted(self) -> None:
        watch, never = FirstFailures(2), FirstFailures(0)
        for ending in (broken("E: x"), Ending(Outcome.INTERRUPTED), broken("E: x")):
            watch.see(ending)
            never.see(ending)
        assert watch.alike == "user-code: E: x" and never.alike == ""


class Scripted(StudyTrainable):
    """A trial whose epochs are told beforehand: errors are raised."""

    def __init__(self, *script: Exception | float) -> None:
        self.script, self.restarts = list(script), 0
        self.setup({"trial_id": "a-0000", "folder": ".", "history": [], "objective": ObjectiveSpec(metric="val/loss").model_dump_json()})

    def _advance(self) -> Progress:
        said = self.script.pop(0)
        if isinstance(said, Exception):
            raise said
        return Progress("a-0000", Measurement(1, 1, {"val/loss": said}))

    def _start_over(self) -> None:
        self.restarts += 1


def test_a_trial_without_memory_is_tried_once_more_and_then_failed() -> None:
    trial = Scripted(OOM, 0.5, MemoryError())
    assert trial.step()["objective"] == 0.5 and trial.restarts == 1
    assert trial.step()[ENDING].reason == "out-of-memory" and trial.restarts == 1


def test_an_error_of_the_users_is_not_tried_again() -> None:
    trial = Scripted(ArithmeticError("no"), 0.5)
    assert trial.step()[ENDING].reason == "user-code" and trial.restarts == 0


def test_a_lost_process_is_no_error_of_the_trial() -> None:
    with pytest.raises(ray.exceptions.RayActorError):
        Scripted(ray.exceptions.RayActorError()).step()


class TestInTheLedger:
    def callback(self, folder: Path, at: Any = "best") -> tuple[LedgerCallback, Outbox]:
        outbox, failures = Outbox(folder), FirstFailures(3)
        return LedgerCallback(outbox, folder, ObjectiveSpec(metric="val/loss", at=at), failures, max_failures=2), outbox

    def trial(self, **last: Any) -> Any:
        config = {"trial_id": "a-0000", "arm": "all", "trial": TrialSpec().model_dump_json(), "tags": {}}
        return SimpleNamespace(config=config, num_failures=0, max_failures=2, last_result=last)

    def test_the_value_is_over_all_that_was_measured_whichever_process_did_it(self, tmp_path: Path) -> None:
        """A process that takes a trial over knows nothing of its best epoch."""
        callback, outbox = self.callback(tmp_path)
        trial = self.trial(**{ENDING: Ending(Outcome.COMPLETED)})
        callback.on_trial_start(0, [], trial)
        for epoch, loss in ((1, 0.2), (2, 0.7), (2, 0.7), (3, 0.5)):
            callback.on_trial_result(0, [], trial, {MEASUREMENT: Measurement(epoch, epoch, {"val/loss": loss})})
        callback.on_trial_complete(0, [], trial)
        assert outbox.records()[0].value == 0.2

    def test_whoever_gets_further_may_lose_its_process_as_often_again(self, tmp_path: Path) -> None:
        callback, _ = self.callback(tmp_path)
        trial = self.trial()
        callback.on_trial_start(0, [], trial)
        trial.num_failures = 2
        callback.on_trial_result(0, [], trial, {MEASUREMENT: Measurement(1, 1, {"val/loss": 0.5})})
        assert trial.max_failures == 4

    def test_a_trial_that_never_ran_is_remembered_as_lost(self, tmp_path: Path) -> None:
        callback, outbox = self.callback(tmp_path)
        callback.on_trial_error(0, [], self.trial())
        (record,) = outbox.records()
        assert (record.outcome, record.reason) == (Outcome.FAILED, "worker-lost")


class TestWhatEndsAStudy:
    def through_tune(self, error: Exception) -> None:
        """Tune raises an error of its own while it handles another one's."""
        with named("studies/x"):
            try:
                raise error
            except Exception:
                raise TuneError("...")  # noqa: B904  as Tune does it

    def test_a_full_disk_is_named_as_one(self) -> None:
        with pytest.raises(HomeError, match=r"cannot be written \(No space left on device\); free some space"):
            self.through_tune(OSError(errno.ENOSPC, "No space left on device"))

    def test_what_else_the_system_says_has_its_own_remedy(self) -> None:
        with pytest.raises(HomeError, match=r"cannot be written \(Read-only file system\); see that the disk is mounted for writing"):
            self.through_tune(OSError(errno.EROFS, "Read-only file system"))
        with pytest.raises(TuneError):
            self.through_tune(FileNotFoundError(errno.ENOENT, "No such file or directory"))

    def test_our_own_errors_are_what_they_are(self) -> None:
        with pytest.raises(HomeError, match="full"):
            self.through_tune(HomeError("full"))

    def test_a_cluster_that_went_away_is_no_bug(self) -> None:
        with pytest.raises(ClusterLost, match="the same command continues"):
            self.through_tune(ray.exceptions.RaySystemError("no raylet"))

    def test_what_is_not_known_stays_as_it_was(self) -> None:
        with pytest.raises(TuneError):
            self.through_tune(KeyError("a bug"))
