"""Replication: what is planned follows from the records alone, with the same seeds in every arm."""

from collections.abc import Callable
from typing import Any

import pytest

from study.measurement import Outcome, TrialRecord
from study.results.ranking import recommended
from study.spec import StudySpec, check
from study.tuning.replication import confirmations, seeds_of, wanted

Value = Callable[[str, int], float | Outcome]


def spec(top: int = 1, seeds: int = 5, arms: tuple[str, ...] = ("all", "none"), **sections: Any) -> StudySpec:
    gamma = {"choices": list(arms), "role": "scientific"}
    space = {"optimizer.lr": {"low": 0.01, "high": 1.0, "log": True}, "optimizer.gamma": gamma}
    replicate = {"top": top, "seeds": seeds}
    return check({"name": "s", "space": space, "search": {"trials": 4 * len(arms), "sampler": "random"}, "replicate": replicate, **sections})


def record(trial_id: str, arm: str, value: float | Outcome, of: str = "") -> TrialRecord:
    outcome, number = (value, None) if isinstance(value, Outcome) else (Outcome.COMPLETED, value)
    return TrialRecord(trial_id, arm, outcome, "", {}, number, replicate_of=of)


def searched(studied: StudySpec) -> list[TrialRecord]:
    """Four trials of each arm; in every arm the earlier ones are better."""
    arms = [f"optimizer.gamma={arm['optimizer.gamma']}" for arm in studied.arms]
    return [record(f"s-{number:04d}", arms[number % len(arms)], 0.1 + 0.01 * number) for number in range(4 * len(arms))]


def raced(studied: StudySpec, records: list[TrialRecord], value: Value) -> list[list[str]]:
    """Trains replicates until none is wanted: the ids that were wanted at each look."""
    looks = []
    while batch := wanted(studied, records):
        looks.append([one.trial_id for one in batch])
        records += [record(one.trial_id, one.arm, value(one.replicate_of, int(one.trial_id.rpartition("r")[2])), one.replicate_of) for one in batch]
    return looks


def noisy(trial: str, number: int) -> float:
    """Nobody is ahead: what a seed does differs by trial."""
    return 0.5 + 0.1 * ((number * 7 + int(trial[-1]) * 3) % 5)


def test_nothing_is_replicated_unless_asked_for() -> None:
    assert wanted(spec(top=0), searched(spec())) == []
    assert wanted(spec(), []) == []


def test_the_best_of_each_arm_get_every_seed_while_nothing_is_settled() -> None:
    studied = spec(top=2, seeds=6)
    looks = raced(studied, searched(studied), noisy)
    assert [len(look) for look in looks] == [12, 8, 4]
    assert looks[0][:5] == ["s-0000-r1", "s-0001-r1", "s-0002-r1", "s-0003-r1", "s-0000-r2"]
    assert looks[2] == ["s-0000-r6", "s-0001-r6", "s-0002-r6", "s-0003-r6"]


def test_a_replicate_changes_both_seeds_alike_in_every_arm_and_nothing_else() -> None:
    studied = spec(top=1, seeds=2)
    batch = wanted(studied, searched(studied))
    pairs = {(one.trial_id[-2:], one.trial.seed, one.trial.data.seed) for one in batch}
    assert len(pairs) == 2 and len({seed for _, *pair in pairs for seed in pair}) == 4
    for one in batch:
        assert one.trial.model_copy(update={"seed": 0, "data": one.trial.data.model_copy(update={"seed": 0})}) == studied.trial
    assert seeds_of(0, 1) == seeds_of(0, 1) != seeds_of(1, 1)
    assert seeds_of(0, 1) != seeds_of(0, 1, "c")


def test_those_that_ended_are_not_wanted_again_and_interrupted_ones_are() -> None:
    studied = spec(seeds=2)
    records = searched(studied)
    ended = [record("s-0000-r1", "a", 0.2, "s-0000"), record("s-0001-r1", "b", Outcome.DIVERGED, "s-0001")]
    interrupted = [record("s-0000-r2", "a", Outcome.INTERRUPTED, "s-0000")]
    assert [one.trial_id for one in wanted(studied, [*records, *ended, *interrupted])] == ["s-0000-r2", "s-0001-r2"]


def test_a_candidate_that_is_settled_to_be_behind_gets_no_more_seeds() -> None:
    """Of the first arm the second candidate is behind at every seed, by about the same."""
    studied = spec(top=2, seeds=7)
    looks = raced(
        studied,
        searched(studied),
        lambda trial, number: noisy(trial, number) if trial != "s-0002" else noisy("s-0000", number) + 0.3 + 0.01 * (number % 2),
    )
    assert len(looks[0]) == 12
    assert {name[:6] for look in looks[1:] for name in look} == {"s-0000", "s-0001", "s-0003"}


def test_a_candidate_that_lost_a_replicate_gets_no_more_seeds_where_its_leader_did_not() -> None:
    studied = spec(top=2, seeds=5)
    looks = raced(studied, searched(studied), lambda trial, number: Outcome.DIVERGED if (trial, number) == ("s-0000", 2) else noisy(trial, number))
    assert {name[:6] for name in looks[1]} == {"s-0001", "s-0002", "s-0003"}


def test_the_race_ends_when_the_order_of_the_arms_is_settled() -> None:
    studied = spec(top=1, seeds=9)
    looks = raced(studied, searched(studied), lambda trial, number: 0.01 * number + int(trial[-1]) * (0.3 + 0.001 * (number % 2)))
    assert [len(look) for look in looks] == [6]


def test_a_single_arm_gets_every_seed() -> None:
    studied = spec(seeds=6, arms=("all",))
    assert [len(look) for look in raced(studied, searched(studied), noisy)] == [3, 2, 1]


def test_a_new_top_gets_its_replicates_and_the_old_ones_are_kept() -> None:
    studied = spec(seeds=3)
    records = searched(studied)
    raced(studied, records, noisy)
    records.append(record("s-0008", "optimizer.gamma=all", 0.01))
    assert [one.trial_id for one in wanted(studied, records)] == ["s-0008-r1", "s-0008-r2", "s-0008-r3"]


def test_the_best_is_chosen_by_fresh_seeds_and_by_confirmed_ones_first() -> None:
    studied = spec(seeds=3)
    records = searched(studied)

    def best() -> tuple[str, int]:
        found = recommended(records, studied.objective)
        assert found is not None
        return found[0].trial_id, found[1].seeds if found[1] else 0

    assert best() == ("s-0000", 0)
    raced(studied, records, lambda trial, number: 0.3 - 0.1 * (trial == "s-0001") + 0.01 * number)
    assert best() == ("s-0001", 3)
    batch = confirmations(studied, records, 2)
    assert [one.trial_id for one in batch] == ["s-0001-c1", "s-0000-c1", "s-0001-c2", "s-0000-c2"]
    records += [record(one.trial_id, one.arm, 0.2 + 0.1 * (one.replicate_of == "s-0001"), one.replicate_of) for one in batch]
    assert confirmations(studied, records, 2) == []
    assert [one.trial_id for one in confirmations(studied, records, 3)] == ["s-0001-c3", "s-0000-c3"]
    assert best() == ("s-0000", 2)


def test_without_replicates_the_best_trials_are_confirmed() -> None:
    studied = spec(top=0)
    assert [one.trial_id for one in confirmations(studied, searched(studied), 1)] == ["s-0000-c1", "s-0001-c1", "s-0002-c1"]


@pytest.mark.parametrize("value", [0.2, Outcome.FAILED])
def test_replicates_never_stand_for_election_themselves(value: float | Outcome) -> None:
    records = [*searched(spec()), record("s-0000-r1", "optimizer.gamma=all", value, "s-0000")]
    found = recommended(records, spec().objective)
    assert found is not None and found[0].trial_id == "s-0000"
