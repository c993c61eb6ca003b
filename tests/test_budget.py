"""A study's budget counts what ran, over all of its starts, and says which limit ended it."""

from typing import Any

import pytest

from study.budget import Meter, budget_line
from study.spec import StudySpec, check


def spec(direction: str = "minimize", resources: dict[str, Any] | None = None, **budget: Any) -> StudySpec:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}}
    return check(
        {
            "name": "budget",
            "space": space,
            "search": {"trials": 20},
            "objective": {"metric": "val/error", "direction": direction},
            "budget": budget,
            "resources": resources or {},
        }
    )


@pytest.mark.parametrize(
    ("resources", "hours"),
    [
        ({}, 0.0),
        ({"gpus_per_trial": 1}, 2.0),
        ({"gpus_per_trial": 0.25}, 0.5),
        ({"gpus_per_trial": 0.25, "engine": "fused"}, 2.0),
        ({"gpus_per_trial": 0.25, "engine": "fused", "gpus_per_engine": 0.5}, 1.0),
    ],
)
def test_gpu_hours_count_training_by_share(resources: dict[str, Any], hours: float) -> None:
    """Trials of a fused engine divide its time among them, so that their times add up to the engine's."""
    assert Meter(spec(resources=resources), seconds=7200).gpu_hours == hours


def test_gpu_hours_end_the_study_also_when_an_earlier_start_spent_them() -> None:
    studied = spec(resources={"gpus_per_trial": 0.5}, gpu_hours=1)
    meter = Meter.of(studied, [], seconds=7000)
    assert meter.reached(0) == ""
    meter.seconds += 200
    assert meter.reached(0) == "gpu_hours"


@pytest.mark.parametrize(("direction", "values"), [("minimize", (0.3, 0.1)), ("maximize", (0.7, 0.95))])
def test_a_target_is_reached_by_a_completed_trial_only(direction: str, values: tuple[float, float]) -> None:
    meter = Meter(spec(direction, target=values[1]))
    meter.end("completed", values[0])
    meter.end("stopped", values[1])
    assert meter.reached(0) == ""
    meter.end("completed", values[1])
    assert meter.reached(0) == "target"


def test_no_improvement_counts_trials_since_the_best_one() -> None:
    meter = Meter(spec(no_improvement=3))
    for outcome, value in (("diverged", None), ("completed", 0.3), ("completed", 0.3), ("failed", None)):
        meter.end(outcome, value)
    assert (meter.without_improvement, meter.reached(0)) == (2, "")
    meter.end("completed", 0.2)
    assert meter.without_improvement == 0
    for _ in range(3):
        meter.end("stopped", 0.1)
    assert meter.reached(0) == "no_improvement"
    assert meter.trials == 8


def test_interrupted_trials_have_not_ended() -> None:
    assert Meter.of(spec(no_improvement=1), [("interrupted", 0.1)], 0).reached(0) == ""


def test_the_document_says_what_is_spent_and_left_and_the_line_only_what_is_limited() -> None:
    meter = Meter.of(spec(wall="1h", no_improvement=5), [("completed", 0.3), ("stopped", 0.5)], 60)
    document = meter.document(wall=600)
    assert document["left"] == {"trials": 18, "wall": 3000, "no_improvement": 4}
    assert (document["wall"], document["gpu_hours"], document["reached"], document["spent"]["trials"]) == (3600, None, None, 2)
    assert budget_line(document) == "budget: 0:10:00 of 1:00:00 spent, 1 of 5 trials without a new best"
    assert budget_line(Meter(spec()).document(None)) == ""
    assert meter.document(wall=3601)["reached"] == "wall"
