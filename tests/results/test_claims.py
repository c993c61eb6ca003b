"""Claims: each form on tables whose truth is known, and the verdicts that follow."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from study.claimspec import ClaimSpec, Expectation
from study.errors import InputError
from study.results.claims import Verdict, judged, verdicts_document, verify, verify_each, write_verdicts
from study.results.quantities import Measured

RATES = (0.05, 0.1, 0.2, 0.4)
DECAYS = (1e-3, 4e-3)
ARMS = ("none", "last", "all")


def trial(**columns: Any) -> dict[str, Any]:
    own = {"outcome": "completed", "replicate_of": "", "arm": "all", "equilibrated": True, "seed": 0, "data.seed": 0}
    return {**own, **{name.replace("__", "/").replace("_at_", "."): value for name, value in columns.items()}}


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([{"trial_id": f"t-{number:04}", **row} for number, row in enumerate(rows)])


def power(seeds: int, exponent: float = 0.5, noise: float = 0.01) -> pd.DataFrame:
    """Rotations that grow as a power of lr x decay, with another noise in each seed's exponent."""
    draw = np.random.default_rng(seeds)
    rows = []
    for seed in range(seeds):
        own = exponent + noise * draw.normal()
        rows += [
            trial(seed=seed, data_at_seed=seed, optimizer_at_lr=rate, optimizer_at_weight_decay=decay, final__rotation=3 * (rate * decay) ** own)
            for rate in RATES
            for decay in DECAYS
        ]
    return table(rows)


def arms(seeds: int, effects: dict[str, float], noise: float = 0.01, shared: float = 0.3) -> pd.DataFrame:
    """Errors of one trial for each arm and seed: what seeds share is much larger than the noise."""
    draw = np.random.default_rng(seeds)
    rows = []
    for seed in range(seeds):
        level = 1 + shared * draw.random()
        rows += [
            trial(seed=seed, data_at_seed=seed, gamma=arm, val__error=level * math.exp(effect + noise * draw.normal()))
            for arm, effect in effects.items()
        ]
    return table(rows)


def claim(expect: dict[str, Any], where: dict[str, Any] | None = None, **form: Any) -> ClaimSpec:
    return ClaimSpec.model_validate({"id": "x", "says": "It is so.", "where": where or {}, "expect": expect, **form})


def outcome_of(rows: pd.DataFrame, expect: dict[str, Any], where: dict[str, Any] | None = None, **form: Any) -> Verdict:
    (verdict,) = verify([claim(expect, where, **form)], rows)
    return verdict


def refused(rows: pd.DataFrame, expect: dict[str, Any], where: dict[str, Any] | None = None, **form: Any) -> str:
    with pytest.raises(InputError) as caught:
        outcome_of(rows, expect, where, **form)
    return str(caught.value)


HALF = {"y": "final/rotation", "x": ["optimizer.lr", "optimizer.weight_decay"], "log": True}


def test_a_slope_is_fitted_for_each_seed() -> None:
    found = outcome_of(power(8), {"between": [0.45, 0.55]}, slope=HALF)
    assert found.verdict == "confirmed" and found.n == 8
    assert found.estimate == pytest.approx(0.5, abs=0.02) and found.interval is not None
    assert found.interval[0] < found.estimate < found.interval[1]
    assert outcome_of(power(8), {"above": 0.6}, slope=HALF).verdict == "refuted"
    assert outcome_of(power(8), {"below": found.estimate}, slope=HALF).verdict == "inconclusive"


def test_a_slope_without_logarithms_is_in_the_units_of_its_columns() -> None:
    rows = table([trial(seed=seed, optimizer_at_lr=rate, y=2 * rate + seed) for seed in range(5) for rate in RATES])
    found = outcome_of(rows, {"between": [1.9, 2.1]}, slope={"y": "y", "x": "optimizer.lr"})
    assert (found.estimate, found.verdict) == (pytest.approx(2), "confirmed")


def test_one_seed_gives_an_estimate_and_no_verdict() -> None:
    found = outcome_of(power(1, noise=0), {"between": [0.45, 0.55]}, slope=HALF)
    assert (found.estimate, found.interval, found.n) == (pytest.approx(0.5), None, 1)
    assert (found.verdict, found.note) == ("inconclusive", "1 of the 5 seeds that a verdict needs")


def test_a_seed_with_too_few_different_points_does_not_count() -> None:
    rows = power(6)
    two = (rows["seed"] > 0) | (rows["optimizer.lr"].isin(RATES[:2]) & (rows["optimizer.weight_decay"] == DECAYS[0]))
    assert outcome_of(rows[two], {"above": 0}, slope=HALF).n == 5
    assert outcome_of(rows[rows["optimizer.lr"] == 0.1], {"above": 0}, slope=HALF).estimate is None


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_fewer_than_five_seeds_are_too_few(seeds: int) -> None:
    found = outcome_of(power(seeds), {"between": [0.4, 0.6]}, slope=HALF)
    assert found.verdict == "inconclusive" and found.interval is not None


CONTRAST = {"metric": "val/error", "arm": "gamma", "a": "last", "b": "none"}


def test_a_paired_ratio_sees_through_what_the_seeds_share() -> None:
    rows = arms(6, {"none": 0.0, "last": math.log(0.6)})
    paired = outcome_of(rows, {"below": 0.7}, contrast={**CONTRAST, "statistic": "ratio", "paired_by": ["seed"]})
    apart = outcome_of(rows, {"below": 0.7}, contrast={**CONTRAST, "statistic": "ratio"})
    assert (paired.verdict, paired.n, apart.n) == ("confirmed", 6, 6)
    assert paired.estimate == apart.estimate == pytest.approx(0.6, rel=0.03)
    assert paired.interval is not None and apart.interval is not None
    assert paired.interval[1] - paired.interval[0] < (apart.interval[1] - apart.interval[0]) / 3
    assert math.sqrt(paired.interval[0] * paired.interval[1]) == pytest.approx(paired.estimate)


def test_a_difference_is_a_less_b() -> None:
    rows = arms(5, {"none": 0.0, "last": 0.0}, noise=0)
    rows.loc[rows["gamma"] == "last", "val/error"] -= 0.25
    found = outcome_of(rows, {"above": -0.2}, contrast={**CONTRAST, "paired_by": "seed"})
    assert found.verdict == "refuted" and found.interval == (pytest.approx(-0.25), pytest.approx(-0.25))


def test_trials_of_one_seed_count_once() -> None:
    """Copies of the same trials narrow nothing."""
    rows = arms(6, {"none": 0.0, "last": -0.1})
    for pairing in ({}, {"paired_by": ["seed", "copy"]}):
        once, thrice = (
            outcome_of(pd.concat([rows.assign(copy=copy) for copy in range(copies)]), {"below": 0}, contrast={**CONTRAST, **pairing})
            for copies in (1, 3)
        )
        assert once.interval == pytest.approx(thrice.interval) and once.n == thrice.n == 6


def test_pairs_that_are_not_one_to_one_are_refused_by_name() -> None:
    rows = arms(5, {"none": 0.0, "last": 0.0})
    paired = {**CONTRAST, "paired_by": ["seed"]}
    twice = pd.concat([rows, rows[(rows["seed"] == 3) & (rows["gamma"] == "last")].assign(trial_id="t-0099")])
    assert refused(twice, {"below": 0}, contrast=paired) == (
        "claims.x: pairing is not one-to-one (seed 3 stands more than once in gamma=last: t-0007, t-0099); "
        "narrow `where`, for example to `replicate: true`, or add fields to `paired_by`"
    )
    assert "(t-0006 of gamma=none has no partner with seed 3)" in refused(rows.drop(index=7), {"below": 0}, contrast=paired)
    assert "(t-0007 of gamma=last has no partner with seed 3)" in refused(rows.drop(index=6), {"below": 0}, contrast=paired)
    other = rows.assign(**{"data.seed": range(len(rows))})
    assert "a pair is of two seeds" in refused(other, {"below": 0}, contrast=paired)


def test_an_arm_without_trials_leaves_a_claim_open() -> None:
    rows = arms(6, {"none": 0.0, "last": 0.0})
    rows.loc[rows["gamma"] == "last", "outcome"] = "diverged"
    for pairing in ({}, {"paired_by": "seed"}):
        found = outcome_of(rows, {"below": 0}, contrast={**CONTRAST, **pairing})
        assert (found.estimate, found.n, found.verdict) == (None, 0, "inconclusive")


def test_a_spread_is_that_of_each_seeds_groups() -> None:
    """Within a product of learning rate and decay the metric varies by 1.2; from product to product by 100."""
    rows = table(
        [
            trial(seed=seed, optimizer_at_lr=rate, optimizer_at_intrinsic_lr=rate * (product / rate), m=product * factor)
            for seed in range(5)
            for product in (1e-4, 1e-2)
            for rate, factor in ((0.05, 1.0), (0.2, 1.2), (0.8, 1.1))
        ]
    )
    spread = {"metric": "m", "over": "optimizer.lr", "by": "optimizer.intrinsic_lr"}
    found = outcome_of(rows, {"below": 1.3}, spread=spread)
    assert (found.estimate, found.n, found.verdict) == (pytest.approx(1.2), 5, "confirmed")
    assert outcome_of(rows, {"below": 1.3}, spread={**spread, "over": "m", "by": []}).estimate == pytest.approx(120)
    assert outcome_of(rows, {"below": 1}, spread={**spread, "statistic": "relative_range"}).estimate == pytest.approx(0.2 / 1.1)
    assert outcome_of(rows, {"below": 1}, spread={**spread, "statistic": "std"}).estimate == pytest.approx(0.1 * (1e-4 + 1e-2) / 2)


def test_a_spread_is_compared_with_that_of_other_trials_of_the_same_seed() -> None:
    """Along a constant product the metric hardly varies with lr, along a constant decay by ten times as much; seeds vary in both alike."""
    rows = table(
        [
            trial(seed=seed, optimizer_at_lr=rate, optimizer_at_intrinsic_lr=rate * decay, optimizer_at_weight_decay=decay, m=1 + (1 + seed) * off)
            for seed in range(5)
            for rate, decay, off in ((0.01, 0.4, 0.0), (0.04, 0.1, 0.1), (0.0025, 1.6, 0.2), (0.04, 0.4, 1.0), (0.0025, 0.4, -1.0))
        ]
    )
    against = {"optimizer.weight_decay": 0.4}
    spread = {"metric": "m", "over": "optimizer.lr", "statistic": "std", "against": against}
    found = outcome_of(rows, {"below": 1 / 3}, {"optimizer.intrinsic_lr": 4e-3}, spread=spread)
    assert (found.estimate, found.n, found.verdict) == (pytest.approx(0.1), 5, "confirmed")
    reverse = {**spread, "against": {"optimizer.intrinsic_lr": 4e-3}}
    assert outcome_of(rows, {"below": 1 / 3}, against, spread=reverse).estimate == pytest.approx(10)
    level = rows.assign(m=rows["m"].where(rows["optimizer.lr"] != 0.04, 1.0).where(rows["seed"] == 0, 1.0))
    assert "a spread is 0, which has no ratio to another (seed 1, data.seed 0)" in refused(level, {"below": 1}, against, spread=spread)


def test_a_level_is_the_mean_of_each_seeds_trials() -> None:
    rows = table([trial(seed=seed, a=1.0 + seed + extra, b=2.0, c=math.nan if extra else 9.0) for seed in range(5) for extra in (0, 1)])
    found = outcome_of(rows, {"above": 1}, level={"metric": "a"})
    assert (found.estimate, found.n) == (pytest.approx(3.5), 5)
    assert outcome_of(rows, {"above": 1}, level={"metric": ["a", "b"], "statistic": "min"}).estimate == pytest.approx((1.5 + 4 * 2) / 5)
    assert outcome_of(rows, {"above": 1}, level={"metric": ["a", "b"], "statistic": "max"}).estimate == pytest.approx((2 + 2.5 + 3.5 + 4.5 + 5.5) / 5)
    assert outcome_of(rows, {"above": 1}, level={"metric": ["a", "c"], "statistic": "max"}).estimate == pytest.approx(9)
    narrow = outcome_of(rows, {"between": [2, 5]}, {"a": {"above": 100}}, level={"metric": "a"})
    assert (narrow.estimate, narrow.n, narrow.verdict) == (None, 0, "inconclusive")


def test_a_slope_of_several_columns_is_that_of_their_mean() -> None:
    """Of logarithms: layers of other sizes have the same say."""
    rows = power(6).assign(large=lambda table: 1e4 * table["final/rotation"] ** 3)
    found = outcome_of(rows, {"between": [0.9, 1.1]}, slope={**HALF, "y": ["final/rotation", "large"]})
    one = outcome_of(rows, {"between": [0.9, 1.1]}, slope=HALF)
    assert found.estimate == pytest.approx(2 * (one.estimate or 0)) and found.verdict == "confirmed"


def test_several_metrics_make_a_group() -> None:
    rows = table([trial(seed=seed, a=1.0, b=3.0, c=2.0) for seed in range(5)])
    assert outcome_of(rows, {"between": [3, 3.01]}, spread={"metric": ["a", "b", "c"]}).estimate == pytest.approx(3)
    assert outcome_of(rows, {"below": 2}, spread={"metric": "a", "over": "seed"}).n == 0


RANK = {"metric": "val/error", "arm": "gamma", "paired_by": "seed"}


def test_a_rank_is_confirmed_where_every_margin_is_sure() -> None:
    rows = arms(8, {"none": 0.1, "last": 0.0, "all": 0.2})
    assert outcome_of(rows, {"first": "last"}, rank=RANK).verdict == "confirmed"
    assert outcome_of(rows, {"first": "none"}, rank=RANK).verdict == "refuted"
    assert outcome_of(rows, {"order": ["last", "none", "all"]}, rank=RANK).verdict == "confirmed"
    assert outcome_of(rows, {"order": ["last", "all", "none"]}, rank=RANK).verdict == "refuted"
    assert outcome_of(rows, {"first": "all"}, rank={**RANK, "direction": "maximize"}).verdict == "confirmed"
    assert outcome_of(rows, {"first": "last"}, where={"gamma": {"in": ["last", "all"]}}, rank=RANK).estimate == pytest.approx(0.25, abs=0.05)


def test_the_margin_of_a_rank_is_the_least_one() -> None:
    rows = arms(8, {"none": 0.1, "last": 0.0, "all": 0.5}, shared=0)
    found = outcome_of(rows, {"first": "last"}, rank=RANK)
    assert found.estimate == pytest.approx(math.exp(0.1) - 1, abs=0.02) and found.n == 8
    assert outcome_of(arms(4, {"none": 1.0, "last": 0.0}), {"first": "last"}, rank=RANK).verdict == "inconclusive"


def test_arms_that_are_alike_are_seldom_ranked() -> None:
    """Of 200 tables with three equal arms at most one in 20 gets a verdict, give or take four standard errors."""
    draw, rows = np.random.default_rng(5), arms(5, dict.fromkeys(ARMS, 0.0))
    tables = (rows.assign(**{"val/error": draw.normal(size=len(rows))}) for _ in range(200))
    judged = [outcome_of(one, {"first": "last"}, rank=RANK).verdict != "inconclusive" for one in tables]
    assert np.mean(judged) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_one_arm_alone_is_not_ranked() -> None:
    assert outcome_of(arms(6, {"last": 0.0}), {"first": "last"}, rank=RANK).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"replicate": True}, [4, 5]),
        ({"replicate": False}, [0, 1, 2, 3]),
        ({"equilibrated": True}, [0, 1, 3, 4, 5]),
        ({"optimizer.lr": {"above": 0.1}}, [2, 3, 4, 5]),
        ({"optimizer.lr": {"below": 0.1}}, [0]),
        ({"optimizer.lr": {"between": [0.1, 0.2]}}, [1, 2]),
        ({"optimizer.lr": {"above": 0.05, "below": 0.2}}, [1]),
        ({"optimizer.lr": 0.1 + 1e-12}, [1]),
        ({"seed": {"in": [0, 3]}}, [0, 3]),
        ({"rule": "sgd", "nesterov": True}, [1, 3, 5]),
        ({"nesterov": 1}, []),
        ({"decay": None}, [0, 2, 4]),
        ({"decay": {"in": [None, "coupled"]}, "seed": {"below": 2}}, [0, 1]),
    ],
)
def test_conditions_choose_completed_trials(where: dict[str, Any], left: list[int]) -> None:
    rows = [
        trial(
            seed=number,
            optimizer_at_lr=0.05 * 2**number,
            equilibrated=number != 2,
            replicate_of="t-0000" if number > 3 else "",
            rule="sgd",
            nesterov=bool(number % 2),
            decay="coupled" if number % 2 else None,
            m=float(number),
            n=1.0,
        )
        for number in range(6)
    ]
    rows += [trial(**{**rows[1], "outcome": outcome, "m": 99.0, "n": 1.0}) for outcome in ("stopped", "diverged", "failed", "interrupted")]
    rows.append(trial(**{**rows[1], "trial_id": "t-0001-c1", "replicate_of": "t-0001", "m": 99.0, "n": 1.0}))  # of `study best --confirm`
    found = outcome_of(table(rows), {"below": 0}, where, spread={"metric": ["m", "n"], "statistic": "std"})
    assert found.n == len(left)
    if left:
        assert found.estimate == pytest.approx(np.mean([abs(number - 1) / math.sqrt(2) for number in left]))


def test_a_trial_without_the_metric_does_not_count() -> None:
    rows = power(7)
    rows.loc[rows["seed"] == 2, "final/rotation"] = math.nan
    rows.loc[rows["seed"] == 3, "final/rotation"] = math.inf
    assert outcome_of(rows, {"above": 0}, slope=HALF).n == 5


def test_what_does_not_fit_the_table_is_told_at_once() -> None:
    rows = arms(5, {"none": 0.0, "last": 0.0})
    rows.loc[4, "val/error"] = -1.0
    assert "no such column (got 'val/eror'); did you mean 'val/error'?" in refused(rows, {"below": 0}, contrast={**CONTRAST, "metric": "val/eror"})
    said = refused(rows, {"below": 1}, contrast={**CONTRAST, "statistic": "ratio"})
    assert said == "claims.x: ratios and logarithms need val/error above 0 (got -1 in t-0004); narrow `where` with val/error: {above: 0}"
    assert "gamma is no number in t-0000 (got 'none')" in refused(rows, {"below": 0}, slope={"y": "val/error", "x": "gamma"})
    assert "no such column (got 'nothing')" in refused(rows, {"below": 0}, {"nothing": 1}, contrast=CONTRAST)
    wrong = [claim({"below": 0}, contrast={**CONTRAST, "metric": name}) for name in ("p", "q")]
    with pytest.raises(InputError) as caught:
        verify(wrong, rows)
    assert len(caught.value.problems) == 2
    verdicts, problems = verify_each([*wrong, claim({"below": 0}, contrast=CONTRAST)], rows)
    assert (len(verdicts), len(problems)) == (1, 2)


@pytest.mark.parametrize(
    ("expect", "interval", "verdict"),
    [
        ({"below": 1}, (0.5, 0.9), "confirmed"),
        ({"below": 1}, (0.5, 1.0), "inconclusive"),
        ({"below": 1}, (1.0, 1.5), "refuted"),
        ({"above": 1}, (1.1, 1.5), "confirmed"),
        ({"above": 1}, (1.0, 1.5), "inconclusive"),
        ({"above": 1}, (0.5, 1.0), "refuted"),
        ({"between": [1, 2]}, (1.0, 2.0), "confirmed"),
        ({"between": [1, 2]}, (0.9, 2.0), "inconclusive"),
        ({"between": [1, 2]}, (1.0, 2.1), "inconclusive"),
        ({"between": [1, 2]}, (0.5, 2.5), "inconclusive"),
        ({"between": [1, 2]}, (0.5, 1.0), "inconclusive"),
        ({"between": [1, 2]}, (0.5, 0.9), "refuted"),
        ({"between": [1, 2]}, (2.1, 2.2), "refuted"),
        ({"first": "last"}, (0.1, 0.2), "confirmed"),
        ({"first": None}, (0.1, 0.2), "confirmed"),
        ({"order": ["a", "b"]}, (-0.2, 0.0), "refuted"),
        ({"first": "last"}, (-0.1, 0.2), "inconclusive"),
    ],
)
def test_a_verdict_says_where_the_interval_lies(expect: dict[str, Any], interval: tuple[float, float], verdict: str) -> None:
    expectation = Expectation.model_validate(expect)
    assert judged(expectation, Measured(sum(interval) / 2, interval, 5))[0] == verdict
    assert judged(expectation, Measured(sum(interval) / 2, interval, 4))[0] == "inconclusive"


def test_thirty_seeds_are_bootstrapped() -> None:
    """Of skewed values Student's interval is symmetric, that of the bootstrap is not."""
    skewed = table([trial(seed=seed, data_at_seed=seed, a=0.0, b=value) for seed, value in enumerate(np.random.default_rng(1).lognormal(0, 1, 30))])

    def lopsided(rows: pd.DataFrame) -> float:
        found = outcome_of(rows, {"below": 9}, spread={"metric": ["a", "b"], "statistic": "std"})
        assert found.estimate is not None and found.interval is not None
        return (found.interval[1] - found.estimate) / (found.estimate - found.interval[0])

    assert lopsided(skewed[:29]) == pytest.approx(1)
    assert lopsided(skewed) > 1.1


def test_verdicts_are_a_document(tmp_path: Path) -> None:
    verdicts = verify([claim({"between": [0.45, 0.55]}, slope=HALF)], power(5))
    write_verdicts(verdicts, tmp_path / "claims.json")
    document = json.loads((tmp_path / "claims.json").read_text())
    assert document == json.loads(json.dumps(verdicts_document(verdicts)))
    assert document["tested"] == 1
    assert {"id", "says", "source", "expected", "estimate", "interval", "n", "verdict"} <= set(document["claims"][0])
    assert (document["claims"][0]["expected"], document["claims"][0]["n"]) == ({"between": [0.45, 0.55]}, 5)
    assert verdicts_document([]) == {"claims": [], "tested": 0}
