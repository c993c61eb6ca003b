"""A forecast adds up what a study will train, what stopping leaves of it, and what a pilot says that an epoch takes."""

from dataclasses import replace
from typing import Any

import pytest

from study.spec import StoppingSpec, StudySpec, check
from study.tuning.choice import Choice
from study.tuning.choosing import START_SECONDS
from study.tuning.forecast import forecast, sentence, stopping_share

SOLO = Choice("solo", 1, "", 0.0, "")
FUSED = Choice("fused", 4, "converted", 2.0, "")


def spec(epochs: int = 27, trials: int = 30, space: dict[str, Any] | None = None, **sections: Any) -> StudySpec:
    axes = space or {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}}
    return check({"name": "ahead", "trial": {"schedule": {"epochs": epochs}}, "space": axes, "search": {"trials": trials}, **sections})


@pytest.mark.parametrize(
    ("stopping", "epochs", "share"),
    [
        ({"scheduler": "none"}, 27, 1.0),
        ({"scheduler": "median", "grace": 1}, 27, 1.0),
        ({"scheduler": "asha", "grace": 27}, 27, 1.0),
        ({"scheduler": "asha", "grace": 3, "reduction": 3}, 27, (3 + 6 / 3 + 18 / 9) / 27),
        ({"scheduler": "hyperband", "grace": 9, "reduction": 3}, 27, (1.5 * (9 + 18 / 3) / 27 + 1) / 2.5),
    ],
)
def test_the_share_that_early_stopping_leaves(stopping: dict[str, Any], epochs: int, share: float) -> None:
    assert stopping_share(StoppingSpec(**stopping), epochs) == pytest.approx(share)


def test_time_is_work_over_processes_and_their_start() -> None:
    found = forecast(spec(), 2.0, SOLO, cores=2)
    assert (found["trial_epochs"], found["expected_trial_epochs"], found["stopping_share"]) == (810, 810, 1.0)
    assert found["wall_seconds"] == 810 * 2.0 / 2 + 2 * START_SECONDS
    fused = forecast(spec(), 2.0, FUSED, cores=2)["wall_seconds"]
    assert fused == 810 * 2.0 / 2.0 / 2 + 2 * (1 + 4) / 2 * START_SECONDS
    one = forecast(spec(), 2.0, replace(FUSED, engines=1), cores=2)["wall_seconds"]
    assert one == 810 * 2.0 / 2.0 + (1 + 4) / 2 * START_SECONDS
    wide = spec(resources={"cpus_per_trial": 2})
    assert forecast(wide, 2.0, SOLO, cores=2)["wall_seconds"] == 810 * 2.0 + 2 * START_SECONDS


def test_a_budget_and_a_finite_space_shorten_it() -> None:
    assert forecast(spec(budget={"wall": "1m"}), 2.0, SOLO, cores=2)["wall_seconds"] == 60
    assert forecast(spec(space={"optimizer.lr": {"choices": [0.1, 0.2]}}), 2.0, SOLO, cores=2)["trial_epochs"] == 2 * 27


def test_lengths_that_vary_count_by_their_middle() -> None:
    assert forecast(spec(space={"schedule.epochs": {"low": 10, "high": 30}}, trials=21), 1.0, SOLO, cores=1)["trial_epochs"] == 21 * 20


def test_it_is_said_in_a_sentence_without_a_pilot_too() -> None:
    asha = spec(stopping={"scheduler": "asha", "grace": 3, "reduction": 3})
    said = sentence(forecast(asha, 2.0, SOLO, cores=2))
    assert said == "810 trial-epochs, of which early stopping leaves about 210; about 4 min of training on this machine, by a pilot of 2 s per epoch"
    assert sentence(forecast(asha, None, SOLO, cores=2)) == "810 trial-epochs, of which early stopping leaves about 210"
