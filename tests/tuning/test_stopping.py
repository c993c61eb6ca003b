"""Stopping compares trials of one arm, at absolute epochs, also after a restart."""

import json
from collections import Counter
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from study.measurement import History
from study.spec import ObjectiveSpec, StoppingSpec
from study.tuning.stopping import EPOCH, OBJECTIVE, ArmScheduler, Past, bracket_of, brackets, stalled, stopping

ASHA = StoppingSpec(scheduler="asha", grace=1, reduction=2)


class Trial:
    """As much of a Tune trial as schedulers look at."""

    def __init__(self, name: str, arm: str, epochs: int = 8) -> None:
        self.trial_id, self.config = name, {"trial_id": name, "arm": arm, "trial": json.dumps({"schedule": {"epochs": epochs}})}


def report(scheduler: ArmScheduler, which: Any, epoch: int, objective: float) -> str:
    return scheduler.on_trial_result(None, which, {EPOCH: epoch, OBJECTIVE: objective})  # type: ignore[arg-type]


def add(scheduler: ArmScheduler, name: str, arm: str = "a", epochs: int = 8) -> Any:
    added = Trial(name, arm, epochs)
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
    scheduler = stopping(ASHA, "minimize", 8, ended=[Past("x-0000", "a", 8, past)])
    assert report(scheduler, add(scheduler, "new"), 1, 0.5) == TrialScheduler.STOP


def test_a_resumed_trial_is_not_judged_at_an_old_rung_again() -> None:
    scheduler = stopping(ASHA, "minimize", 8, ended=[Past("x-0000", "a", 8, [(1, 0.1)])], resumed={"old": [(1, 0.5)]})
    resumed = add(scheduler, "old")
    assert report(scheduler, resumed, 1, 0.5) == TrialScheduler.CONTINUE


def test_median_stops_a_trial_below_the_median_and_never_pauses() -> None:
    scheduler = stopping(StoppingSpec(scheduler="median", grace=1), "minimize", 8)
    for name, value in (("x", 0.1), ("y", 0.2), ("z", 0.3)):
        assert report(scheduler, add(scheduler, name), 1, value) == TrialScheduler.CONTINUE
    assert report(scheduler, add(scheduler, "w"), 1, 0.9) == TrialScheduler.STOP


class TestHyperband:
    SPEC = StoppingSpec(scheduler="hyperband", grace=1, reduction=3)

    def test_each_bracket_begins_later_and_all_cost_about_the_same(self) -> None:
        """As in the paper's table for R = 81 and eta = 3: 81, 34, 15, 8 and 5 trials; here shares of them, before rounding up."""
        shares = brackets(self.SPEC, 81)
        assert [grace for grace, _ in shares] == [1, 3, 9, 27, 81]
        assert [round(share / shares[0][1] * 81) for _, share in shares] == [81, 34, 15, 8, 5]

    def test_trials_are_shared_out_evenly_whatever_their_arm(self) -> None:
        shares = brackets(self.SPEC, 81)
        for arm in range(3):
            drawn = Counter(bracket_of(f"x-{number:04d}", shares) for number in range(arm, 600, 3))
            assert all(abs(drawn[index] - 200 * share) <= 3 for index, (_, share) in enumerate(shares))

    def test_a_trial_of_a_late_bracket_is_not_judged_early(self) -> None:
        scheduler = stopping(self.SPEC, "minimize", 9)
        numbers: dict[int, list[str]] = {}
        for number in range(30):
            name = f"x-{number:04d}"
            numbers.setdefault(bracket_of(name, brackets(self.SPEC, 9)), []).append(name)
        assert sorted(numbers) == [0, 1, 2]
        for bracket, rung in ((0, 1), (1, 3)):
            good, bad = numbers[bracket][:2]
            assert report(scheduler, add(scheduler, good), rung, 0.1) == TrialScheduler.CONTINUE
            trial = add(scheduler, bad)
            if rung > 1:
                assert report(scheduler, trial, 1, 0.9) == TrialScheduler.CONTINUE
            assert report(scheduler, trial, rung, 0.9) == TrialScheduler.STOP
        good, bad = numbers[2][:2]
        assert report(scheduler, add(scheduler, good), 8, 0.1) == report(scheduler, add(scheduler, bad), 8, 0.9) == TrialScheduler.CONTINUE

    def test_a_restart_puts_trials_into_the_brackets_that_they_had(self) -> None:
        first = next(f"x-{number:04d}" for number in range(9) if bracket_of(f"x-{number:04d}", brackets(self.SPEC, 9)) == 0)
        later = next(f"x-{number:04d}" for number in range(9, 30) if bracket_of(f"x-{number:04d}", brackets(self.SPEC, 9)) == 0)
        scheduler = stopping(self.SPEC, "minimize", 9, ended=[Past(first, "a", 9, [(1, 0.1)])])
        assert report(scheduler, add(scheduler, later), 1, 0.5) == TrialScheduler.STOP


@pytest.mark.parametrize(("compare", "decision"), [("epoch", TrialScheduler.STOP), ("schedule", TrialScheduler.CONTINUE)])
def test_trials_of_different_length_are_compared_at_equal_epochs_or_after_equal_shares(compare: Any, decision: str) -> None:
    """At epoch 2 the short trial is halfway through a cosine and good, the long one has hardly begun to decay."""
    scheduler = stopping(ASHA.model_copy(update={"grace": 2, "compare": compare}), "minimize", 16)
    short, long = add(scheduler, "x-0000", epochs=4), add(scheduler, "x-0001", epochs=16)
    assert report(scheduler, short, 2, 0.1) == TrialScheduler.CONTINUE
    assert report(scheduler, long, 2, 0.5) == decision
    if compare == "schedule":
        assert report(scheduler, long, 8, 0.2) == TrialScheduler.STOP


def test_a_past_of_another_length_is_replayed_in_shares_of_its_own_schedule() -> None:
    spec = ASHA.model_copy(update={"grace": 8, "compare": "schedule"})
    scheduler = stopping(spec, "minimize", 16, ended=[Past("x-0000", "a", 4, [(2, 0.1)])])
    trial = add(scheduler, "x-0001", epochs=16)
    assert report(scheduler, trial, 7, 0.5) == TrialScheduler.CONTINUE
    assert report(scheduler, trial, 8, 0.5) == TrialScheduler.STOP


@pytest.mark.parametrize(
    ("values", "direction", "patience", "expected"),
    [
        ([0.5, 0.4, 0.4, 0.4], "minimize", 2, True),
        ([0.5, 0.4, 0.3, 0.4], "minimize", 2, False),
        ([0.5, 0.6, 0.7], "minimize", 2, True),
        ([0.5, 0.6, 0.7], "maximize", 2, False),
        ([0.5, 0.5], "minimize", 2, False),
        ([], "minimize", 1, False),
    ],
)
def test_a_trial_has_stalled_when_none_of_its_last_values_is_its_best(values: list[float], direction: Any, patience: int, expected: bool) -> None:
    assert stalled(values, ObjectiveSpec(direction=direction), patience) is expected


def test_new_fields_leave_the_hash_of_old_studies_alone() -> None:
    """The hash names what a study's trials are; a field that changes nothing is no reason for another name."""
    assert "patience" not in StoppingSpec().hashed() and "compare" not in StoppingSpec().hashed()
    assert StoppingSpec(patience=3, compare="schedule").hashed()["patience"] == 3
