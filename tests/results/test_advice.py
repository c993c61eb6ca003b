"""Warnings say what is to be seen in the trials of a study, and nothing where there is nothing to say."""

from typing import Any

import pandas as pd
import pytest

from study.results.advice import Advice, advise
from study.results.edges import near_end
from study.space import Axis
from tests.results.tables import ALL, NONE, replicates, spec, table, trial


def enough() -> list[dict[str, Any]]:
    """Trials that nobody would warn of, but for their one seed."""
    return [trial(number, (NONE, ALL)[number % 2], 0.1 + number / 100) for number in range(10)]


def told(trials: pd.DataFrame, *, histories: Any = None, **changes: Any) -> dict[str, Advice]:
    """Warnings by their kinds, at most one of each."""
    found = advise(spec(**changes), trials, histories)
    kinds = {warning.kind: warning for warning in found}
    assert len(kinds) == len(found)
    return kinds


def test_nothing_is_said_of_a_study_without_trials() -> None:
    assert advise(spec(), table()) == []


def test_one_seed_is_no_finding() -> None:
    found = told(table(*enough()))
    assert set(found) == {"one-seed"}
    assert found["one-seed"].says == "one seed: differences between arms are not findings"
    assert str(found["one-seed"]).endswith("; set replicate.top and replicate.seeds to compare them on fresh seeds")


def test_the_best_of_a_study_without_arms_is_lucky() -> None:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}}
    rows = [trial(number, "all") for number in range(5)]
    lucky = told(table(*rows), space=space)["one-seed"]
    assert lucky.says.startswith("one seed: the best of 5 completed trials is also the luckiest")
    assert lucky.remedy == "train it again with fresh seeds: study best gains --confirm 5"
    confirmed = [{**trial(0, "all"), "trial_id": f"gains-0000-c{k}", "replicate_of": "gains-0000", "seed": 99 + k} for k in (1, 2)]
    assert "one-seed" not in told(table(*rows, *confirmed), space=space)


def test_seeds_that_are_an_axis_are_several() -> None:
    rows = [{**row, "seed": number} for number, row in enumerate(enough())]
    assert told(table(*rows)) == {}


FIRST = [0.10, 0.11, 0.12, 0.10, 0.11]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([0.13, 0.14, 0.16, 0.13, 0.14], None),
        ([0.11, 0.10, 0.14, 0.09, 0.12], "(difference -0.004, 95% interval "),
        ([0.13], "(fewer than two common seeds)"),
    ],
    ids=["apart", "across 0", "one seed"],
)
def test_a_winner_is_separable_where_the_paired_interval_leaves_out_0(second: list[float], said: str | None) -> None:
    rows = enough()
    found = told(table(*rows, *replicates(rows[0], FIRST[: len(second)]), *replicates(rows[1], second)))
    assert set(found) == ({"not-separable"} if said else set())
    if said:
        assert found["not-separable"].says.startswith(f"the winner {NONE} is not separable from the runner-up {ALL} {said}")


def test_the_best_near_the_end_of_an_axis_asks_for_more() -> None:
    rows = enough()
    rows[0]["optimizer.lr"], rows[1]["optimizer.lr"] = 0.9, 0.95
    edge = told(table(*rows))["edge"]
    assert edge.says == f"the best optimizer.lr is within 5% of the upper end 1 of its axis (0.9 for {NONE} and 0.95 for {ALL})"
    assert edge.remedy == "set high to 10 in space.optimizer.lr"


@pytest.mark.parametrize(
    ("path", "axis", "value", "remedy"),
    [
        ("optimizer.lr", {"low": 1e-3, "high": 1.0, "log": True}, 0.72, "set high to 10 in"),
        ("optimizer.lr", {"low": 1e-3, "high": 1.0, "log": True}, 0.70, None),  # 5% of three decades is a factor of 1.41
        ("optimizer.lr", {"low": 1e-3, "high": 1.0, "log": True}, 1.1e-3, "set low to 0.0001 in"),
        ("optimizer.weight_decay", {"low": 0, "high": 0.1}, 0.0, None),  # no decay is less than none
        ("optimizer.momentum", {"low": 0.5, "high": 0.95}, 0.95, "set high to 0.99 in"),  # not 1, which momentum cannot be
        ("model.width", {"low": 8, "high": 32, "step": 8}, 32, "set high to 40 in"),
        ("model.depth", {"low": 1, "high": 3}, 1, None),  # no network without layers
        ("model.depth", {"low": 1, "high": 3}, 3, "set high to 4 in"),
        ("optimizer.lr", {"choices": [1e-3, 1e-2, 1e-1]}, 0.1, "add 1 to the choices of"),
        ("optimizer.lr", {"choices": [0.1, 0.2, 0.3]}, 0.3, "add 0.4 to the choices of"),
        ("optimizer.lr", {"choices": [0.1, 0.2]}, 0.2, None),
        ("optimizer.rule", {"choices": ["sgd", "adamw", "lion"]}, "lion", None),
    ],
)
def test_an_axis_is_widened_as_far_as_its_field_takes_it(path: str, axis: dict[str, Any], value: Any, remedy: str | None) -> None:
    end = near_end(path, Axis.model_validate(axis), value)
    assert (end and end.remedy) == (remedy and f"{remedy} space.{path}")


def test_an_axis_that_does_not_exist_in_the_best_trial_has_no_end() -> None:
    space = {
        "optimizer.rule": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer.rule": "sgd"}},
    }
    rows = [trial(number, "all", **{"optimizer.rule": "adamw", "optimizer.momentum": 0.9}) for number in range(4)]
    assert "edge" not in told(table(*rows), space=space)
    assert "edge" in told(table(*[{**row, "optimizer.rule": "sgd"} for row in rows]), space=space)


def test_an_arm_with_few_completed_trials_is_named() -> None:
    rows = enough()
    for number in (1, 3, 5):
        rows[number] |= {"outcome": "stopped", "reason": "scheduler"}
    few = told(table(*rows))["few-completed"]
    assert few.says == f"{ALL}: only 2 of 5 trials completed; 5 did in another arm"
    assert few.remedy.startswith("raise stopping.grace or search.trials")
    for number in (1, 3, 5, 7, 9):
        rows[number] |= {"outcome": "failed", "value": None}
    few = told(table(*rows))["few-completed"]
    assert few.says == f"{ALL}: none of 5 trials completed; 5 did in another arm"
    assert "tracebacks" in few.remedy


def test_where_trials_diverge_is_said() -> None:
    rows = [trial(number, (NONE, ALL)[number % 2], **{"optimizer.lr": 10 ** (-3 + number / 4)}) for number in range(12)]
    for row in rows[-4:]:
        row |= {"outcome": "diverged", "value": None}
    diverged = told(table(*rows), search={"trials": 12})["diverged"]
    assert diverged.says == "3 of 3 trials with optimizer.lr above 0.1 diverged, and 1 of the other 9"
    assert diverged.remedy == "lower high in space.optimizer.lr or set optimizer.clip"


def test_divergence_that_is_everywhere_is_said_to_be() -> None:
    rows = enough()
    rows[4] |= {"outcome": "diverged", "value": None}
    assert "diverged" not in told(table(*rows))
    rows[7] |= {"outcome": "diverged", "value": None}
    assert told(table(*rows))["diverged"].says == "2 of 10 trials diverged, in no part of the space more than elsewhere"


FALLING = [(epoch, 0.5 * 0.9**epoch) for epoch in range(1, 21)]
LEVEL = [(epoch, 0.1 + 0.3 * 0.3**epoch + (0.002 if epoch % 2 else 0)) for epoch in range(1, 21)]


def test_an_objective_that_still_falls_asks_for_more_epochs() -> None:
    found = told(table(*enough()), histories={"gains-0000": FALLING, "gains-0001": LEVEL})
    improving = found["still-improving"]
    assert improving.says.startswith(f"val/error was still falling at the last epoch (gains-0000 of {NONE} from 0.1")
    assert improving.says.endswith("in its last 6 epochs)")
    assert "still-improving" not in told(table(*enough()), histories={"gains-0000": LEVEL, "gains-0001": FALLING[:4]})
    risen = {"metric": "val/error", "direction": "maximize"}
    assert "still-improving" not in told(table(*enough()), histories={"gains-0008": FALLING}, objective=risen)
    rising = [(epoch, 1 - value) for epoch, value in FALLING]
    assert "still rising" in told(table(*enough()), histories={"gains-0008": rising}, objective=risen)["still-improving"].says
