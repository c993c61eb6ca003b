"""Axes: intervals and lists, arms and their labels."""

import pytest
from pydantic import ValidationError

from study.space import Axis, Scalar, arm_label, arms, word


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 1.0, "high": 1.0}, r"`low < high` must hold \(got low=1.0, high=1.0\)"),
        ({"low": 2, "high": 1}, r"`low < high` must hold \(got low=2, high=1\)"),
        ({"low": 0, "high": 1, "log": True}, r"a log axis needs `low > 0` \(got low=0\)"),
        ({"low": -1.0, "high": 1, "log": True}, r"a log axis needs `low > 0` \(got low=-1.0\)"),
        ({"low": 1, "high": 8, "log": True, "step": 1}, "log and step cannot be combined"),
        ({"low": 1}, "needs low and high, or choices"),
        ({"high": 1}, "needs low and high, or choices"),
        ({}, "needs low and high, or choices"),
        ({"low": 1, "high": 2, "choices": [1]}, "takes either choices or low and high, not both"),
        ({"choices": [1], "log": True}, "takes either choices or low and high, not both"),
        ({"choices": [1, 2, 1]}, r"choices repeat a value \(got \[1, 2, 1\]\)"),
        ({"low": 1, "high": 2, "role": "scientific"}, "a scientific axis needs choices: each value is an arm"),
        ({"low": True, "high": 2}, "must be a number"),
        ({"low": "1", "high": 2}, "must be a number"),
        ({"low": 1, "high": float("inf")}, "finite"),
        ({"low": float("nan"), "high": 1}, "finite"),
        ({"low": 1, "high": 2, "step": 0}, "greater than 0"),
    ],
)
def test_an_axis_that_makes_no_sense_says_why(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Axis.model_validate(given)


def test_choices_of_different_types_are_different() -> None:
    assert Axis(choices=(1, True, "1", None)).choices == (1, True, "1", None)


def test_endpoints_are_the_ends_of_an_interval_and_every_choice_of_a_list() -> None:
    assert Axis(low=1, high=3).endpoints() == (1, 3)
    assert Axis(choices=("a", "b", "c")).endpoints() == ("a", "b", "c")


def test_arms_are_every_combination_of_scientific_values_in_path_order() -> None:
    space = {
        "optimizer.gamma": Axis(choices=("none", "all"), role="scientific"),
        "model.norm": Axis(choices=("batch", "layer"), role="scientific"),
        "optimizer.lr": Axis(low=0.1, high=1),
    }
    assert [arm_label(arm) for arm in arms(space)] == [
        "model.norm=batch,optimizer.gamma=none",
        "model.norm=batch,optimizer.gamma=all",
        "model.norm=layer,optimizer.gamma=none",
        "model.norm=layer,optimizer.gamma=all",
    ]


def test_a_space_without_scientific_axes_is_one_arm() -> None:
    assert arms({"optimizer.lr": Axis(low=0.1, high=1)}) == [{}]
    assert arm_label({}) == "all"


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), (False, "false"), (0.1, "0.1"), (3, "3"), ("last", "last")])
def test_labels_spell_values_as_yaml_does(value: Scalar, text: str) -> None:
    assert word(value) == text
