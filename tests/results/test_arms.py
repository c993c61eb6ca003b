"""Arms: intervals that cover, a probability that is calibrated, and who leads when replicates are lost or were given up."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from study.results.arms import candidate, compare_arms, paired, replicate_number, wins_again
from study.spec import ObjectiveSpec

ERROR = ObjectiveSpec()
Values = NDArray[np.float64]


def objective(effects: list[float], seeds: int, repetitions: int, draw: np.random.Generator) -> Values:
    """[repetitions, seeds, arms]: an arm's effect, what the seed does to all arms, and noise of standard deviation 1; larger is better."""
    shape = (repetitions, seeds, len(effects))
    return np.array(effects) + draw.normal(0, 2, (repetitions, seeds, 1)) + draw.normal(size=shape)


def table(values: dict[str, dict[str, list[float | str]]]) -> pd.DataFrame:
    """Rows of trials as the driver makes them: arm to trial to the values of its replicates; a word is an outcome."""
    rows = []
    for arm, trials in values.items():
        for trial_id, replicates in trials.items():
            rows.append({"trial_id": trial_id, "arm": arm, "outcome": "completed", "replicate_of": "", "value": -1.0, "test/error": np.nan})
            for number, value in enumerate(replicates, 1):
                outcome, value = ("completed", value) if isinstance(value, float) else (value, math.nan)
                own = {"trial_id": f"{trial_id}-r{number}", "outcome": outcome, "value": value, "replicate_of": trial_id}
                rows.append({**own, "arm": arm, "test/error": 1.0 - float(value)})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_the_interval_of_a_paired_difference_covers_the_truth(effect: float) -> None:
    """Of 2,000 studies with 5 common seeds, 95 +- 3% of the intervals hold the arms' true difference."""
    found = objective([0.0, effect], 5, 2_000, np.random.default_rng(0))
    covered = 0
    for study in found:
        first, second = (candidate(str(arm), f"s-{arm}", dict(enumerate(study[:, arm]))) for arm in (0, 1))
        low, high = paired(first, second).interval or (math.nan, math.nan)
        covered += low <= -effect <= high
    assert 0.92 <= covered / len(found) <= 0.98


@pytest.mark.parametrize("effects", [[0.0, 0.0], [0.5, 0.0], [2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.5, 1.0, 0.0, 0.0]])
@pytest.mark.parametrize("seeds", [5, 10])
def test_the_winner_wins_again_as_often_as_is_said(effects: list[float], seeds: int) -> None:
    """2,000 studies and a fresh common seed of each: the mean probability is the share of winners that lead again, within 5 points."""
    draw = np.random.default_rng(1)
    found, fresh = objective(effects, seeds, 2_000, draw), objective(effects, 50, 2_000, draw)
    winners = found.mean(1).argmax(1)
    again = (fresh.argmax(2) == winners[:, None]).mean()
    assert abs(wins_again(found).mean() - again) < 0.05


@pytest.mark.long
@pytest.mark.parametrize("effects", [[effect, *[0.0] * others] for effect in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0) for others in (1, 2, 4)])
@pytest.mark.parametrize("seeds", [5, 7, 10, 20])
def test_the_winner_wins_again_as_often_as_is_said_over_a_grid(effects: list[float], seeds: int) -> None:
    draw = np.random.default_rng(2)
    found, fresh = objective(effects, seeds, 10_000, draw), objective(effects, 20, 10_000, draw)
    again = (fresh.argmax(2) == found.mean(1).argmax(1)[:, None]).mean()
    assert abs(np.concatenate([wins_again(part) for part in np.split(found, 10)]).mean() - again) < 0.05


def test_a_lead_on_every_seed_is_sure_and_a_tie_is_none() -> None:
    sure = np.array([[[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]]])
    assert wins_again(sure)[0] == 1
    assert wins_again(np.zeros((1, 3, 2)))[0] == 0
    far = objective([50.0, 0.0], 5, 1, np.random.default_rng(0))
    assert wins_again(far)[0] == pytest.approx(1, abs=1e-9)


def test_arms_are_ranked_by_their_replicates_and_never_by_the_search() -> None:
    found = compare_arms(table({"gamma=none": {"s-0000": [0.2, 0.3, 0.25]}, "gamma=all": {"s-0001": [0.1, 0.2, 0.16]}}), ERROR)
    first, second = found.arms
    assert (first.arm, first.trial_id, first.seeds, second.arm) == ("gamma=all", "s-0001", 3, "gamma=none")
    assert first.mean == pytest.approx(0.46 / 3)
    assert first.interval is not None and first.interval[0] < first.mean < first.interval[1]
    (difference,) = found.differences
    assert (difference.a, difference.b, difference.n) == ("gamma=all", "gamma=none", 3)
    assert difference.estimate == pytest.approx(-0.29 / 3)
    assert found.winner == first
    assert found.behind("gamma=none") == difference
    assert found.behind("gamma=all") is None
    assert found.wins_again is not None and found.wins_again > 0.95
    maximized = compare_arms(table({"a": {"s-0000": [0.2]}, "b": {"s-0001": [0.1]}}), ObjectiveSpec(metric="val/error", direction="maximize"))
    assert [arm.arm for arm in maximized.arms] == ["a", "b"]


def test_differences_are_paired_by_the_replicates_number() -> None:
    """The second arm's first replicate diverged: two seeds are common."""
    found = compare_arms(table({"a": {"s-0000": [0.1, 0.2, 0.4]}, "b": {"s-0001": ["diverged", 0.3, 0.6]}}), ERROR)
    (difference,) = found.differences
    assert (difference.n, difference.estimate) == (2, pytest.approx(-0.15))
    assert found.wins_again is None


def test_a_candidate_that_lost_a_replicate_is_not_ranked_above_one_that_did_not() -> None:
    found = compare_arms(table({"a": {"s-0000": [0.1, "diverged", 0.1], "s-0002": [0.3, 0.3, 0.3]}, "b": {"s-0001": [0.5, 0.5, 0.5]}}), ERROR)
    assert [(each.trial_id, each.lost) for each in found.candidates] == [("s-0002", 0), ("s-0000", 1), ("s-0001", 0)]
    worse = compare_arms(table({"a": {"s-0000": [0.1, "failed", 0.1]}, "b": {"s-0001": [0.5, 0.5, 0.5]}}), ERROR)
    assert [arm.arm for arm in worse.arms] == ["b", "a"]
    none = compare_arms(table({"a": {"s-0000": ["failed", "diverged"]}, "b": {"s-0001": [0.5, 0.5]}}), ERROR)
    assert (none.arms[1].mean, none.arms[1].interval, none.arms[1].lost) == (None, None, 2)


def test_a_candidate_that_the_race_gave_up_does_not_lead() -> None:
    found = compare_arms(table({"a": {"s-0000": [0.1, 0.1], "s-0001": [0.2, 0.2, 0.2, 0.2]}}), ERROR)
    assert found.arms[0].trial_id == "s-0001"


def test_interrupted_replicates_and_trials_of_the_search_count_for_nothing() -> None:
    found = compare_arms(table({"a": {"s-0000": [0.1, "interrupted"], "s-0002": []}, "b": {"s-0001": []}}), ERROR)
    assert [(each.trial_id, each.seeds, each.lost) for each in found.candidates] == [("s-0000", 1, 0)]
    nothing = compare_arms(table({"a": {"s-0000": []}}), ERROR)
    assert (nothing.arms, nothing.winner, nothing.wins_again) == ((), None, None)
    assert compare_arms(pd.DataFrame(), ERROR).arms == ()


def test_another_metric_can_be_compared() -> None:
    found = compare_arms(table({"a": {"s-0000": [0.1, 0.2]}, "b": {"s-0001": [0.2, 0.3]}}), ERROR, "test/error")
    assert (found.metric, found.arms[0].arm, found.arms[0].mean) == ("test/error", "b", pytest.approx(0.75))
    assert compare_arms(table({"a": {"s-0000": [0.1]}}), ERROR, "test/loss").arms == ()


def test_a_comparison_is_json() -> None:
    found = compare_arms(table({"a": {"s-0000": [0.1, 0.2, 0.2]}, "b": {"s-0001": [0.2, 0.3, 0.2]}}), ERROR).document()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"metric", "direction", "arms", "differences", "wins_again", "candidates"}
    assert found["arms"][0]["values"] == {"1": 0.1, "2": 0.2, "3": 0.2}


def test_a_replicates_number_stands_in_its_name() -> None:
    assert replicate_number("gamma-roles-0007-r12") == 12
    assert replicate_number("gamma-roles-0007") is None
    assert replicate_number("net-r-0007") is None
