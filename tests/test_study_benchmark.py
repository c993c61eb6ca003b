"""The benchmark of whole studies compares like with like: both sides get the same trials, and rows that are empty count as such."""

import json
from pathlib import Path

import pytest

from study.tuning.points import wished
from study.tuning.search import Proposal, Search
from tests.benchmarks.our_tune import occupancy, points, spec_of
from tests.benchmarks.study_run import NETWORKS, assignments, check


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_points_are_drawn_in_every_process_and_lie_in_the_space(network: str) -> None:
    spec = spec_of(network, "auto")
    assert len(spec.arms) == 1
    assert assignments(network) == assignments(network) and len(assignments(network)) == spec.search.trials
    assert wished(spec, [json.dumps(point) for point in points(network)]) == [(point, {}) for point in points(network)]


def test_a_search_proposes_the_points_that_it_was_given_and_no_others(tmp_path: Path) -> None:
    search = Search(spec_of("mlp", "auto"), tmp_path / "journal")
    for point in points("mlp"):
        search.enqueue(point)
    proposals: list[Proposal] = []
    while (proposal := search.ask()) is not None:
        proposals.append(proposal)
    trained = [{name: getattr(proposal.trial.optimizer, name) for name in ("lr", "weight_decay", "gamma")} for proposal in proposals]
    assert trained == assignments("mlp")
    check("mlp", trained)
    with pytest.raises(AssertionError, match="1 of 27 assignments"):
        check("mlp", [*trained[:-1], {**trained[-1], "gamma": trained[-2]["gamma"]}])
    with pytest.raises(AssertionError, match="28 trials"):
        check("mlp", [*trained, trained[0]])


@pytest.mark.parametrize(
    ("ticks", "share"),
    [
        ([], 0.0),
        ([[1, 2, 2, 1]], 1.0),
        ([[1, 2, 1, 2, 1]], 5 / 6),
        ([[1, 1, 1]], 0.5),
        ([[2, 2], [1, 1]], 6 / 8),
    ],
    ids=["no engine", "full between its start and its end", "an empty row in between", "never full", "one of two is never full"],
)
def test_an_engine_is_full_with_as_many_trials_as_it_has_slots(ticks: list[list[int]], share: float) -> None:
    assert occupancy(ticks, slots=2) == share
