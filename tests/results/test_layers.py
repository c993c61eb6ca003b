"""The state of a layer follows from its samples alone; every number is finite or null."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from study.results.layers import BAND, LEVEL, VANISHED_GRADIENT, VANISHED_NORM, layer_ends, trace_document, verdict

STEPS = range(10, 201, 10)

EVEN: Mapping[str, Any] = {
    "role": "weight",
    "place": "inner",
    "scale_invariant": True,
    "equilibrated": True,
    "lr": 0.1,
    "weight_decay": 5e-3,
    "weight_norm": 2.0,
    "grad_norm": 0.1,
    "effective_lr": 0.025,
    "rotation": 0.02,
    "rotation_expected": 0.02,
    "source": "weights",
    "relaxation_time": 20.0,
    "coordinate_rate": float("nan"),
}
"""A layer in equilibrium from its first sample on."""


def layer(name: str = "conv", **changes: Any) -> pd.DataFrame:
    """A layer's 20 samples: *changes* are values, or functions of the step. Its tail is the last six samples, from step 150 on."""
    fields = {**EVEN, **changes}
    rows = [{"step": step, "layer": name, **{key: value(step) if callable(value) else value for key, value in fields.items()}} for step in STEPS]
    return pd.DataFrame(rows).astype(dict.fromkeys(("effective_lr", "rotation_expected", "relaxation_time", "weight_norm"), float))


def state(**changes: Any) -> str:
    (end,) = layer_ends(layer(**changes))
    return end.state


def moving(total: float, since: int = 150) -> Any:
    """A norm that changes by *total*, relatively, from step *since* to the end."""
    return lambda step: 2.0 * (1 + total * max(0, step - since) / (200 - since))


@pytest.mark.parametrize(("ratio", "found"), [(1.0, "equilibrium"), (BAND[0], "equilibrium"), (0.89, "off"), (1.11, "off"), (40.0, "off")])
def test_an_equilibrated_layer_turns_as_expected_or_is_off(ratio: float, found: str) -> None:
    assert state(rotation_expected=0.02 / ratio) == found


def test_an_equilibrated_layer_may_still_change_its_norm() -> None:
    assert state(weight_norm=moving(0.5)) == "equilibrium"


@pytest.mark.parametrize(
    ("change", "found"),
    [(0.0, "settling"), (0.9 * LEVEL, "settling"), (-0.9 * LEVEL, "settling"), (1.5 * LEVEL, "growing"), (-1.5 * LEVEL, "shrinking")],
)
def test_a_layer_that_is_not_equilibrated_is_told_by_its_norm(change: float, found: str) -> None:
    assert state(equilibrated=False, weight_norm=moving(change)) == found


def test_the_tail_alone_decides() -> None:
    assert state(equilibrated=lambda step: step >= 150) == "equilibrium"
    assert state(equilibrated=lambda step: step > 150) == "settling"
    assert state(equilibrated=False, weight_norm=lambda step: 2.0 if step >= 150 else 1.0 + step) == "settling"
    assert state(rotation=lambda step: 0.02 if step >= 150 else 1.0) == "equilibrium"


def test_without_an_expectation_there_is_no_equilibrium() -> None:
    assert state(rotation_expected=float("nan")) == "settling"
    assert state(rotation_expected=0.0) == "settling"


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_norm": lambda step: 0.1 if step <= 60 else 0.09 * VANISHED_GRADIENT},
        {"weight_norm": lambda step: 2.0 if step <= 100 else 0.9 * 2.0 * VANISHED_NORM, "grad_norm": 1e9},
        {"grad_norm": 0.0},
    ],
)
def test_a_layer_whose_gradient_or_norm_has_vanished_is_dying_whatever_else_it_is(changes: dict[str, Any]) -> None:
    assert state(**changes) == state(**changes, scale_invariant=False) == state(**changes, equilibrated=False) == "dying"


def test_it_is_the_gradient_at_unit_norm_that_counts() -> None:
    grows = {"weight_norm": lambda step: 1.0 if step <= 60 else 1e4, "grad_norm": lambda step: 1.0 if step <= 60 else 1e-4}
    assert state(**grows) == "equilibrium"


def test_theory_expects_nothing_of_layers_that_are_not_scale_invariant() -> None:
    (end,) = layer_ends(layer(scale_invariant=False, rotation_expected=float("nan"), weight_norm=moving(0.5)))
    assert (end.state, end.rotation_expected, end.rotation_ratio, end.relaxation_times) == ("free", None, None, None)
    assert end.norm_change == pytest.approx(0.5)


def test_final_values_are_over_the_tail() -> None:
    def later(before: float, after: float) -> Any:
        return lambda step: before if step < 150 else after

    (end,) = layer_ends(layer(effective_lr=later(9.0, 0.5), rotation=lambda step: 0.03 if step == 200 else 0.01, weight_norm=later(1.0, 3.0)))
    assert (end.weight_norm, end.effective_lr) == (3.0, 0.5)
    assert end.rotation == pytest.approx(((5 * 0.01**2 + 0.03**2) / 6) ** 0.5)
    assert end.rotation_ratio == pytest.approx(end.rotation / 0.02)


def test_relaxation_times_count_from_the_last_change_of_the_product() -> None:
    def passed(**changes: Any) -> float | None:
        return layer_ends(layer(**changes))[0].relaxation_times

    assert passed() == 200 / 20
    assert passed(lr=lambda step: 0.1 if step < 100 else 0.01) == 100 / 20
    assert passed(lr=lambda step: 0.1 * (1 + step / 1e5)) == 200 / 20
    assert passed(lr=lambda step: 0.1 * (1 - step / 201)) == 0
    assert passed(relaxation_time=float("nan")) is None


def test_layers_come_in_the_order_of_the_network_whatever_that_of_the_rows() -> None:
    trace = pd.concat([layer("stem"), layer("head"), layer("conv")]).sort_values("step", kind="stable").reset_index(drop=True)
    assert [end.layer for end in layer_ends(trace)] == ["stem", "head", "conv"]
    assert layer_ends(trace.sort_values(["step"], ascending=False, kind="stable"))[0] == layer_ends(trace)[0]


def test_a_trace_is_a_document_of_finite_numbers() -> None:
    trace = pd.concat([layer("conv"), layer("head", scale_invariant=False, effective_lr=float("nan"), rotation_expected=float("nan"))])
    document = trace_document("gains-0007", trace)
    json.dumps(document, allow_nan=False)
    assert (document["trial_id"], document["steps"]) == ("gains-0007", 200)
    conv, head = document["layers"]
    assert {"layer", "role", "place", "scale_invariant", "state", "weight_norm", "effective_lr", "rotation"} <= set(conv)
    assert {"rotation_expected", "rotation_ratio", "relaxation_times"} <= set(conv)
    assert (head["effective_lr"], head["rotation_expected"]) == (None, None)
    assert document["states"] == {"equilibrium": 1, "off": 0, "growing": 0, "shrinking": 0, "settling": 0, "dying": 0, "free": 1}


def test_samples_that_are_not_finite_count_for_nothing() -> None:
    trace = pd.concat([layer("conv", weight_norm=lambda step: 2.0 if step < 190 else float("nan")), layer("gone", weight_norm=float("nan"))])
    (end,) = layer_ends(trace)
    assert (end.layer, end.weight_norm, end.state) == ("conv", 2.0, "equilibrium")


def test_one_sample_is_enough() -> None:
    (end,) = layer_ends(layer(equilibrated=False).head(1))
    assert (end.state, end.norm_change, end.relaxation_times) == ("settling", 0.0, 0.5)


def test_a_verdict_is_one_line() -> None:
    def said(*layers: pd.DataFrame) -> str:
        return verdict(trace_document("gains-0007", pd.concat(layers)))

    free = layer("head", scale_invariant=False, rotation_expected=float("nan"))
    two = (layer("a", rotation=0.0202), layer("b", rotation=0.04), layer("c", rotation=0.0202))
    assert said(*two, free) == "2 of 3 scale-invariant layers in equilibrium; median rotation 1.01 of expected"
    assert said(layer(rotation_expected=float("nan"))) == "0 of 1 scale-invariant layers in equilibrium; theory expects no rotation here"
    assert said(free) == "no layer is scale-invariant"
    assert said(free, layer("dead", scale_invariant=False, grad_norm=0.0)) == "no layer is scale-invariant; 1 of all 2 layers dying"
    assert said(layer().head(0)) == "no layer was sampled"
