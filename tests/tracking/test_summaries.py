"""Facts about what a trial's layers and measurements come down to."""

import math
from operator import attrgetter
from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.measurement import LayerSample, Measurement
from study.spec import ObjectiveSpec
from study.tracking.summaries import MANY_LAYERS, MOST_POINTS, Point, overview, points
from study.tracking.summaries import summary as summary_of
from tests.tracking.scenes import layer

ERROR = ObjectiveSpec(metric="val/error", direction="minimize")


def measured(*samples: LayerSample, epoch: int = 1, **values: float) -> Measurement:
    return Measurement(epoch * 100, epoch, {name.replace("_", "/", 1): value for name, value in values.items()}, samples)


def at(measurement: Measurement, step: int) -> dict[str, float]:
    return {point.name: point.value for point in points(measurement, 1) if point.step == step}


def summary(measurements: list[Measurement], objective: ObjectiveSpec) -> dict[str, float]:
    """The summary, of measurements that can be read once only."""
    return summary_of(overview(iter(measurements), 1), iter(measurements), objective)


def test_every_sampled_step_gives_each_layer_three_numbers_and_the_medians() -> None:
    known = at(measured(layer(10, "a"), layer(10, "b"), layer(20, "a"), layer(20, "b")), 20)
    assert known == {
        "effective_lr/a": 0.005,
        "effective_lr/b": 0.005,
        "effective_lr/median": 0.005,
        "rotation/a": 0.4,
        "rotation/b": 0.4,
        "rotation/median": 0.4,
        "rotation_ratio/median": 40.0,
        "weight_norm/a": 2.0,
        "weight_norm/b": 2.0,
    }


def test_medians_are_over_scale_invariant_layers() -> None:
    rows = [layer(10, name, rotation=value, scale_invariant=value < 0.5) for name, value in {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.9}.items()]
    assert at(measured(*rows), 10)["rotation/median"] == 0.2
    assert not overview([measured(*rows)], 1).all_layers


def test_medians_are_over_all_layers_when_none_is_scale_invariant() -> None:
    rows = [layer(10, name, rotation=value, scale_invariant=False) for name, value in {"a": 0.1, "b": 0.2, "c": 0.9}.items()]
    assert at(measured(*rows), 10)["rotation/median"] == 0.2
    assert overview([measured(*rows)], 1).all_layers
    assert not overview([measured()], 1).all_layers


def test_ratios_leave_out_layers_without_an_expected_rotation() -> None:
    rows = [
        layer(10, "a", rotation=0.3, rotation_expected=0.1),
        layer(10, "b", rotation=0.9, rotation_expected=None),
        layer(10, "c", rotation_expected=0.0),
    ]
    assert at(measured(*rows), 10)["rotation_ratio/median"] == pytest.approx(3.0)
    assert "rotation_ratio/median" not in at(measured(layer(10, "fc")), 10)


@pytest.mark.parametrize(("layers", "names"), [(MANY_LAYERS, 3 * MANY_LAYERS + 3), (MANY_LAYERS + 1, 11)])
def test_with_many_layers_only_medians_and_extremes_are_metrics(layers: int, names: int) -> None:
    known = at(measured(*(layer(10, f"l{number}", rotation=0.01 * (number + 1)) for number in range(layers))), 10)
    assert len(known) == names
    if layers > MANY_LAYERS:
        assert (known["rotation/min"], known["rotation/max"]) == (0.01, 0.01 * layers)
        assert known["rotation/median"] == median(0.01 * (number + 1) for number in range(layers))


def test_a_measurements_own_medians_give_way_to_those_of_its_samples() -> None:
    assert [point.step for point in points(measured(layer(10, "a"), rotation_median=0.7), 1) if point.name == "rotation/median"] == [10]
    assert [point.step for point in points(measured(rotation_median=0.7), 1) if point.name == "rotation/median"] == [100]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nothing_is_ever_inf_or_nan(broken: float) -> None:
    row = layer(10, "a", effective_lr=broken, rotation=broken, weight_norm=broken, lr=broken)
    for layers in (1, MANY_LAYERS + 1):
        one = measured(*[row] * layers, val_error=broken, val_loss=0.3)
        assert [point.name for point in points(one, 1)] == ["val/loss"]
        assert summary([one], ERROR) == {"final/val/loss": 0.3, "final/equilibrated": 0.0}


def test_sums_too_large_for_a_number_are_left_out() -> None:
    one = measured(
        layer(10, "a", effective_lr=1e308, rotation=1e200), layer(20, "a", effective_lr=1e308, rotation=1e200), layer(30, "a", effective_lr=1e308)
    )
    assert all(math.isfinite(value) for value in summary([one] * 3, ERROR).values())


def test_a_rule_without_an_effective_lr_has_no_such_series() -> None:
    assert not [name for name in at(measured(layer(10, "a", effective_lr=None)), 10) if name.startswith("effective_lr")]


def test_final_rotation_is_the_root_mean_square_of_the_last_three_in_ten_samples() -> None:
    rows = [layer(step, "a", rotation=float(step)) for step in range(1, 11)]
    known = summary([measured(*rows[:7]), measured(*rows[7:], epoch=2)], ERROR)
    expected = math.sqrt((64 + 81 + 100) / 3)
    assert known["final/rotation/a"] == known["final/rotation/median"] == pytest.approx(expected)
    assert known["final/rotation_ratio/a"] == known["final/rotation_ratio/median"] == pytest.approx(expected / 0.01)


def test_final_effective_lr_is_the_mean_of_the_last_three_in_ten_samples() -> None:
    known = summary([measured(*(layer(step, "a", effective_lr=float(step)) for step in range(1, 11)))], ERROR)
    assert known["final/effective_lr/a"] == known["final/effective_lr/median"] == 9.0


@pytest.mark.parametrize(("samples", "kept"), [(1, 1), (2, 1), (3, 1), (4, 2), (10, 3), (11, 4), (20, 6)])
def test_at_least_three_in_ten_samples_count_and_never_none(samples: int, kept: int) -> None:
    rows = [layer(step, "a", effective_lr=float(step > samples - kept)) for step in range(1, samples + 1)]
    assert summary([measured(*rows)], ERROR)["final/effective_lr/a"] == 1.0


def test_the_final_median_is_taken_over_the_series_of_medians() -> None:
    rows = [layer(step, name, rotation=value) for step, name, value in ((11, "a", 3.0), (11, "b", 1.0), (12, "a", 1.0), (12, "b", 3.0))]
    early = [layer(step, name) for step in range(1, 4) for name in ("a", "b")]
    assert summary([measured(*early, *rows)], ERROR)["final/rotation/median"] == 2.0


@pytest.mark.parametrize(("since", "share"), [(7, 1.0), (8, 1.0), (9, 5 / 6), (11, 0.5)])
def test_a_trial_is_in_equilibrium_where_all_its_invariant_layers_are_throughout_the_last_samples(since: int, share: float) -> None:
    rows = [
        layer(step, name, equilibrated=step >= (since if name == "b" else 1), scale_invariant=name != "head")
        for step in range(1, 11)
        for name in ("a", "b", "head")
    ]
    assert summary([measured(*rows[:15]), measured(*rows[15:], epoch=2)], ERROR)["final/equilibrated"] == pytest.approx(share)


def test_without_scale_invariant_layers_nothing_is_said_of_equilibrium() -> None:
    assert "final/equilibrated" not in summary([measured(layer(10, "a", scale_invariant=False, equilibrated=True))], ERROR)


def test_other_final_values_are_the_last_ones_and_the_objective_has_its_best() -> None:
    history = [measured(epoch=epoch, val_error=error, val_loss=1.0 / epoch) for epoch, error in ((1, 0.3), (2, 0.1), (3, 0.2))]
    assert summary(history, ERROR) == {"final/val/error": 0.2, "final/val/loss": 1.0 / 3, "best/val/error": 0.1}
    assert summary(history, ObjectiveSpec(metric="val/error", direction="maximize"))["best/val/error"] == 0.3


def test_final_values_that_a_trial_measures_itself_keep_their_name() -> None:
    one = Measurement(100, 1, {"final/branch_ratio/layer1.0": 0.5, "val/error": 0.1})
    assert summary([one], ERROR)["final/branch_ratio/layer1.0"] == 0.5
    assert [point.name for point in points(one, 1)] == ["val/error"]


def test_a_trial_without_measurements_has_no_summary() -> None:
    assert summary([], ERROR) == {}


def test_the_latest_value_of_a_series_is_the_one_at_its_last_step() -> None:
    seen = overview([measured(epoch=1, val_error=0.1, val_loss=1.0), measured(epoch=2, val_error=0.2)], 2)
    assert seen.latest() == {"val/error": 0.2, "val/loss": 1.0}


def test_an_overview_tells_where_a_trial_stands_and_how_long_it_took() -> None:
    first = Measurement(100, 1, {"val/error": 0.5}, (layer(50, "a"), layer(50, "b"), layer(100, "a")), seconds=1.5)
    seen = overview([first, Measurement(200, 2, {"val/error": 0.25}, (layer(150, "a"),), seconds=2.0)], 2)
    assert seen.whole == Measurement(200, 2, {"val/error": 0.25}, (), seconds=3.5)
    assert (seen.sampled, seen.series["rotation/a"].points, seen.series["rotation/b"].points, seen.series["val/error"].points) == (3, 3, 1, 2)


def walks(steps: int, layers: int, seed: int, gaps: float = 0.0) -> Measurement:
    """A measurement whose layers go their own random ways, some samples without an effective lr."""
    draw = Random(seed)
    rows = [
        layer(step, f"l{number}", rotation=draw.gauss(), weight_norm=draw.random(), effective_lr=None if draw.random() < gaps else draw.gauss())
        for step in range(1, steps + 1)
        for number in range(layers)
    ]
    return Measurement(steps, 1, {"val/error": 0.5}, rows)


def by_name(series: list[Point]) -> dict[str, list[Point]]:
    return {name: [point for point in series if point.name == name] for name in {point.name for point in series}}


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 120), layers=st.integers(1, 3), epochs=st.integers(10, 2 * MOST_POINTS), seed=st.integers(0, 999))
def test_extremes_survive_where_points_are_left_out(steps: int, layers: int, epochs: int, seed: int) -> None:
    one = walks(steps, layers, seed, gaps=0.2)
    every, kept = by_name(points(one, 1)), by_name(points(one, epochs))
    assert kept.keys() == every.keys()
    for name, series in kept.items():
        values = [point.value for point in every[name]]
        assert {min(values), max(values)} <= {point.value for point in series}
        assert len(series) <= max(2, MOST_POINTS // epochs)
        assert set(series) <= set(every[name])
        assert [point.step for point in series] == sorted(point.step for point in series)


def test_every_stretch_of_the_steps_keeps_its_own_extremes() -> None:
    one = walks(steps=100, layers=2, seed=0)
    every, kept = by_name(points(one, 1)), by_name(points(one, MOST_POINTS // 10))
    for name in ("rotation/l0", "rotation/l1", "rotation/median"):
        stretches = [every[name][begin : begin + 20] for begin in range(0, 100, 20)]
        value = attrgetter("value")
        assert kept[name] == sorted({end for stretch in stretches for end in (min(stretch, key=value), max(stretch, key=value))})
    assert {point.step for point in kept["rotation/l0"]} != {point.step for point in kept["rotation/l1"]}


def test_a_trial_of_any_length_has_about_a_thousand_points_of_a_series() -> None:
    for epochs in (1, 7, 50):
        lengths = overview((walks(2100 // epochs, 1, seed) for seed in range(epochs)), epochs).series
        assert 0.9 * MOST_POINTS <= lengths["rotation/l0"].points <= MOST_POINTS
        assert lengths["val/error"].points == epochs


def test_few_steps_are_all_kept_and_the_same_measurement_gives_the_same_points() -> None:
    assert len(by_name(points(walks(100, 1, 0), 10))["rotation/l0"]) == 100
    assert points(walks(101, 3, 0), 10) == points(walks(101, 3, 0), 10)


def test_best_and_final_values_are_those_of_all_samples() -> None:
    one = walks(200, 1, 5)
    rotations = [sample.rotation for sample in one.samples]
    objective = ObjectiveSpec(metric="rotation/l0", direction="maximize")
    known = summary_of(overview([one], MOST_POINTS), [one], objective)
    assert known["best/rotation/l0"] == max(rotations)
    assert known["final/rotation/l0"] == pytest.approx(math.sqrt(sum(value**2 for value in rotations[140:]) / 60))
