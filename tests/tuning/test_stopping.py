"""Stopping compares trials of one arm, at absolute epochs, also after a restart."""

from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from study.spec import StoppingSpec
from study.tuning.stopping import EPOCH, OBJECTIVE, ArmScheduler, History, stopping

ASHA = StoppingSpec(scheduler="asha", grace=1, reduction=2)


class Trial:
    """As much of a Tune trial as schedulers look at."""

    def __init__(self, name: str, arm: str) -> None:
        self.trial_id, self.config = name, {"trial_id": name, "arm": arm}


def report(scheduler: ArmScheduler, which: Any, epoch: int, objective: float) -> str:
    return scheduler.on_trial_result(None, which, {EPOCH: epoch, OBJECTIVE: objective})  # type: ignore[arg-type]


def add(scheduler: ArmScheduler, name: str, arm: str = "a") -> Any:
    added = Trial(name, arm)
    scheduler.on_trial_add(None, added)  # type: ignore[arg-type]
    return added


def test_without_a_scheduler_every_trial_goes_on() -> None:
    scheduler = stopping(StoppingSpec(), "minimize", 9)
    assert report(scheduler, add(scheduler, "x"), 5, 1e9) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("direction", "good", "bad"), [("minimize", 0.1, 0.9), ("maximize", 0.9, 0.1)])
def test_asha_stops_the_worse_half_at_a_rung(direction: str, good: float, bad: float) -> None:
    scheduler = stopping(ASHA, direction, 8)
    assert report(scheduler, add(scheduler, "x"), 1, good) == TrialScheduler.CONTINUE
    assert report(scheduler, add(scheduler, "y"), 1, bad) == TrialScheduler.STOP


@pytest.mark.parametrize(("within_arm", "decision"), [(True, TrialScheduler.CONTINUE), (False, TrialScheduler.STOP)])
def test_an_arm_that_learns_fast_stops_no_other_arm_unless_asked_to(within_arm: bool, decision: str) -> None:
    scheduler = stopping(ASHA.model_copy(update={"within_arm": within_arm}), "minimize", 8)
    report(scheduler, add(scheduler, "fast", "a"), 1, 0.1)
    assert report(scheduler, add(scheduler, "slow", "b"), 1, 0.5) == decision


def test_ended_trials_of_an_earlier_start_fill_the_rungs() -> None:
    past: History = [(1, 0.1), (2, 0.05)]
    scheduler = stopping(ASHA, "minimize", 8, ended=[("a", past)])
    assert report(scheduler, add(scheduler, "new"), 1, 0.5) == TrialScheduler.STOP


def test_a_resumed_trial_is_not_judged_at_an_old_rung_again() -> None:
    scheduler = stopping(ASHA, "minimize", 8, ended=[("a", [(1, 0.1)])], resumed={"old": [(1, 0.5)]})
    resumed = add(scheduler, "old")
    assert report(scheduler, resumed, 1, 0.5) == TrialScheduler.CONTINUE


def test_median_stops_a_trial_below_the_median_and_never_pauses() -> None:
    scheduler = stopping(StoppingSpec(scheduler="median", grace=1), "minimize", 8)
    for name, value in (("x", 0.1), ("y", 0.2), ("z", 0.3)):
        assert report(scheduler, add(scheduler, name), 1, value) == TrialScheduler.CONTINUE
    assert report(scheduler, add(scheduler, "w"), 1, 0.9) == TrialScheduler.STOP
