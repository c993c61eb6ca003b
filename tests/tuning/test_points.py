"""What can be proposed before anything is known: finite spaces hold each point once, and a user's points are checked like any other."""

from typing import Any

import pytest

from study.errors import SpecError
from study.space import Axis
from study.spec import StudySpec, check
from study.tuning.points import combinations, grid, index_of, key_of, lies_on, planned, size_warnings, wished

ARMS: dict[str, Any] = {"optimizer.gamma": {"choices": ["none", "last"], "role": "scientific"}}
LR: dict[str, Any] = {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}}


def spec(space: dict[str, Any], trials: int = 12, sampler: str = "random") -> StudySpec:
    return check({"name": "points", "space": space, "search": {"sampler": sampler, "trials": trials}})


def test_a_condition_that_does_not_hold_leaves_one_point_and_not_one_for_each_value() -> None:
    space = {
        "optimizer.rule": {"choices": ["adamw", "sgd"]},
        "optimizer.momentum": {"choices": [0.5, 0.9], "when": {"optimizer.rule": "sgd"}},
    }
    points = combinations(spec(space), {})
    assert points == [
        {"optimizer.rule": "adamw"},
        {"optimizer.rule": "sgd", "optimizer.momentum": 0.5},
        {"optimizer.rule": "sgd", "optimizer.momentum": 0.9},
    ]


def test_arms_can_differ_in_size() -> None:
    space = {**ARMS, "optimizer.gamma_decay": {"choices": [1e-4, 1e-3, 1e-2], "when": {"optimizer.gamma": "last"}}}
    assert planned(spec(space, trials=4)) == {"optimizer.gamma=none": 1, "optimizer.gamma=last": 2}
    assert [*size_warnings(spec(space, trials=4))] == [
        "arm optimizer.gamma=none has 1 combinations: its search ends after these, before its 2 trials"
    ]


def test_a_space_with_an_interval_cannot_be_listed() -> None:
    assert combinations(spec(LR), {}) is None
    assert planned(spec({**LR, **ARMS})) == {"optimizer.gamma=none": 6, "optimizer.gamma=last": 6}


def test_a_grid_that_is_larger_than_the_study_is_tried_all_over() -> None:
    points = [{"x": number} for number in range(100)]
    assert grid(points, 100, seed=0) == points
    tried = [point["x"] for point in grid(points, 20, seed=0)]
    assert sorted(tried) == list(range(100)) and min(tried[:20]) < 25 and max(tried[:20]) > 75
    said = size_warnings(spec({"model.width": {"low": 1, "high": 50}}, trials=20, sampler="grid"))
    assert [*said] == ["the space has a grid of 50 points: 20 of them are tried, drawn at random and the same in every arm"]


def test_values_of_different_types_are_different_points() -> None:
    assert [index_of((1, True, "1", None), value) for value in (1, True, "1", None, 1.0, 2)] == [0, 1, 2, 3, 0, None]
    assert len({key_of({"x": value}) for value in (1, True, "1", None, 1.5)}) == 5


@pytest.mark.parametrize(
    ("axis", "integer", "on", "off"),
    [
        (Axis(low=0.1, high=0.7, step=0.2), False, (0.1, 0.3, 0.1 + 0.2 * 3), (0.2, 0.9, "0.1", True)),
        (Axis(low=2, high=8, step=2), True, (2, 8), (3, 2.5, 10)),
        (Axis(low=1e-3, high=1.0, log=True), False, (1e-3, 0.5, 1), (0, 1.1, None)),
        (Axis(choices=("none", True)), False, ("none", True), ("last", 1)),
    ],
)
def test_which_values_lie_on_an_axis(axis: Axis, integer: bool, on: tuple[Any, ...], off: tuple[Any, ...]) -> None:
    assert all(lies_on(axis, integer, value) for value in on)
    assert not any(lies_on(axis, integer, value) for value in off)


def test_a_users_point_may_name_its_arm_and_is_written_as_its_fields_are() -> None:
    studied = spec({**LR, "optimizer.gamma": {"choices": ["none", "inner+last"], "role": "scientific"}})
    texts = ['{"optimizer.lr": 1e-1}', "{optimizer.lr: 1, optimizer.gamma: last+inner}"]
    assert wished(studied, texts) == [({"optimizer.lr": 0.1}, {}), ({"optimizer.lr": 1.0}, {"optimizer.gamma": "inner+last"})]


def test_all_that_is_wrong_with_users_points_is_said_at_once() -> None:
    space = {
        **LR,
        "optimizer.rule": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.5, "high": 0.9, "when": {"optimizer.rule": "sgd"}},
    }
    texts = ["{", "0.1", '{"optimizer.lr": 7}', '{"seed": 1}', '{"optimizer.rule": "adamw", "optimizer.momentum": 0.6}', "!!python/object:x {}"]
    with pytest.raises(SpecError) as raised:
        wished(spec(space), texts)
    said = str(raised.value).splitlines()
    assert len(said) == len(texts)
    assert said[2] == "--enqueue optimizer.lr: does not lie on its axis (got 7); use a value on 0.001 to 1.0"
    assert "is no axis of this study (got 'seed')" in said[3] and "exists only where optimizer.rule is 'sgd'" in said[4]
