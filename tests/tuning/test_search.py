"""The bridge to Optuna is honest: every outcome is told as what it is, and the journal is the only truth."""

import math
import os
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from study.measurement import Ending, Outcome
from study.spec import StudySpec, check
from study.tuning.journal import JournalFile
from study.tuning.search import DIVERGED, Proposal, Search
from study.tuning.searcher import JournalSearcher
from study.tuning.stopping import EPOCH, OBJECTIVE
from study.tuning.trainables import ENDING, VALUE

SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True},
    "model.width": {"low": 4, "high": 16, "step": 4},
    "optimizer.gamma": {"choices": ["none", "last", "all"], "role": "scientific"},
}


def spec(sampler: str = "random", trials: int = 12, space: dict[str, Any] | None = None, **sections: Any) -> StudySpec:
    return check({"name": "bridge", "space": space or SPACE, "search": {"sampler": sampler, "trials": trials}, **sections})


def asked(search: Search) -> list[Proposal]:
    found = []
    while (proposal := search.ask()) is not None:
        found.append(proposal)
    return found


def journal(path: Path, arm: str = "optimizer.gamma=none") -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=f"bridge/{arm}", storage=storage).get_trials()


@pytest.mark.parametrize("sampler", ["tpe", "random", "sobol", "gp", "cmaes"])
def test_every_arm_gets_the_same_number_of_trials_in_turn(sampler: str, tmp_path: Path) -> None:
    search = Search(spec(sampler), tmp_path / "journal.log")
    arms = []
    for number in range(12):
        proposal = search.ask()
        assert proposal is not None
        arms.append(proposal.trial.optimizer.gamma)
        search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), float(number % 3))
    assert search.ask() is None
    assert arms == ["none", "last", "all"] * 4


@pytest.mark.parametrize("sampler", ["tpe", "random", "sobol"])
def test_the_same_seed_proposes_the_same_trials_also_after_a_restart(sampler: str, tmp_path: Path) -> None:
    def told(search: Search, number: int) -> list[float]:
        values = []
        for _ in range(number):
            proposal = search.ask()
            assert proposal is not None
            values.append(proposal.trial.optimizer.lr)
            search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), proposal.trial.optimizer.lr)
        return values

    whole = told(Search(spec(sampler, 36), tmp_path / "a.log"), 36)
    first = told(Search(spec(sampler, 36), tmp_path / "b.log"), 20)
    assert first + told(Search(spec(sampler, 36), tmp_path / "b.log"), 16) == whole
    assert len(set(whole)) > 10


def test_every_outcome_is_told_as_what_it_is(tmp_path: Path) -> None:
    search = Search(spec(trials=15), tmp_path / "journal.log")
    ours = [proposal.trial_id for proposal in asked(search) if proposal.trial.optimizer.gamma == "none"]
    search.tell(ours[0], Ending(Outcome.COMPLETED), 0.25)
    search.report(ours[1], 1, 0.5)
    search.report(ours[1], 3, 0.4)
    search.tell(ours[1], Ending(Outcome.STOPPED, "scheduler"), 0.4)
    search.tell(ours[2], Ending(Outcome.DIVERGED, "nan"), None)
    search.tell(ours[3], Ending(Outcome.FAILED), None)
    search.tell(ours[4], Ending(Outcome.INTERRUPTED), None)
    completed, stopped, diverged, failed, interrupted = journal(tmp_path / "journal.log")
    assert (completed.state, completed.value) == (TrialState.COMPLETE, 0.25)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 0.5, 3: 0.4})
    assert (diverged.state, diverged.constraints) == (TrialState.PRUNED, {DIVERGED: 1.0})
    assert failed.state is TrialState.FAIL
    assert interrupted.state is TrialState.RUNNING
    assert not any(math.isinf(trial.value or 0) for trial in (completed, stopped, diverged))


def test_a_stopped_trial_never_becomes_the_best_of_the_journal(tmp_path: Path) -> None:
    search = Search(spec(trials=6), tmp_path / "journal.log")
    first, second = (proposal.trial_id for proposal in asked(search) if proposal.trial.optimizer.gamma == "none")
    search.report(first, 1, 0.01)
    search.tell(first, Ending(Outcome.STOPPED, "scheduler"), 0.01)
    search.tell(second, Ending(Outcome.COMPLETED), 0.3)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    assert optuna.load_study(study_name="bridge/optimizer.gamma=none", storage=storage).best_value == 0.3


def test_telling_and_reporting_twice_changes_nothing(tmp_path: Path) -> None:
    search = Search(spec(trials=3), tmp_path / "journal.log")
    proposal = search.ask()
    assert proposal is not None
    for _ in range(2):
        search.report(proposal.trial_id, 1, 0.5)
        search.tell(proposal.trial_id, Ending(Outcome.STOPPED, "scheduler"), 0.5)
    search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), 0.1)
    assert journal(tmp_path / "journal.log")[0].state is TrialState.PRUNED


def test_running_trials_are_issued_again_with_the_values_that_they_had(tmp_path: Path) -> None:
    search = Search(spec(trials=9), tmp_path / "journal.log")
    first = [search.ask() for _ in range(5)]
    assert first[1] is not None
    search.tell(first[1].trial_id, Ending(Outcome.COMPLETED), 0.5)
    again = Search(spec(trials=9), tmp_path / "journal.log")
    assert again.running() == [proposal for number, proposal in enumerate(first) if number != 1]
    assert [proposal.trial_id for proposal in asked(again)] == ["bridge-0005", "bridge-0006", "bridge-0007", "bridge-0008"]


def test_more_trials_continue_the_numbers(tmp_path: Path) -> None:
    assert len(asked(Search(spec(trials=3), tmp_path / "journal.log"))) == 3
    assert [proposal.trial_id for proposal in asked(Search(spec(trials=6), tmp_path / "journal.log"))] == [
        "bridge-0003",
        "bridge-0004",
        "bridge-0005",
    ]


def test_a_grid_visits_every_combination_once_in_every_arm(tmp_path: Path) -> None:
    space = {**SPACE, "optimizer.lr": {"choices": [0.1, 0.2]}}
    trials = asked(Search(spec("grid", 30, space), tmp_path / "journal.log"))
    seen = [(proposal.trial.optimizer.gamma, proposal.trial.optimizer.lr, proposal.trial.model.width) for proposal in trials]
    assert len(seen) == len(set(seen)) == 3 * 2 * 4


def test_a_conditional_axis_exists_only_where_its_condition_holds(tmp_path: Path) -> None:
    space = {
        "optimizer.rule": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.5, "high": 0.95, "when": {"optimizer.rule": "sgd"}},
    }
    trials = asked(Search(spec("random", 20, space), tmp_path / "journal.log"))
    assert {proposal.trial.optimizer.momentum == 0.9 for proposal in trials if proposal.trial.optimizer.rule == "adamw"} == {True}
    assert all(0.5 <= proposal.trial.optimizer.momentum <= 0.95 != 0.9 for proposal in trials if proposal.trial.optimizer.rule == "sgd")
    frozen = journal(tmp_path / "journal.log", "all")
    assert all(("optimizer.momentum" in trial.params) == (trial.params["optimizer.rule"] == "sgd") for trial in frozen)


def test_the_product_axis_draws_complete_trials(tmp_path: Path) -> None:
    space = {"optimizer.lr": SPACE["optimizer.lr"], "optimizer.intrinsic_lr": {"low": 1e-6, "high": 1e-2, "log": True}}
    for proposal in asked(Search(spec("sobol", 8, space), tmp_path / "journal.log")):
        optimizer = proposal.trial.optimizer
        assert optimizer.lr * optimizer.weight_decay == pytest.approx(optimizer.intrinsic_lr)


SAMPLERS = ("tpe", "random", "sobol", "grid", "gp", "cmaes")


@pytest.mark.parametrize("sampler", [pytest.param(name, marks=pytest.mark.long) if name == "gp" else name for name in SAMPLERS])
def test_sixty_trials_over_three_arms_are_twenty_each_also_after_a_kill(sampler: str, tmp_path: Path) -> None:
    """The first arm is the worst by far: a sampler of all three would starve it. The kill comes with three trials running."""
    space = {**SPACE, "optimizer.lr": {"choices": [0.1, 0.2, 0.3, 0.4, 0.5]} if sampler == "grid" else SPACE["optimizer.lr"]}
    search, told = Search(spec(sampler, 60, space), tmp_path / "journal.log"), 0
    going = [search.ask() for _ in range(3)]
    while going:
        if told == 31:
            search = Search(spec(sampler, 60, space), tmp_path / "journal.log")
            assert search.running() == going
        proposal = going.pop(0)
        assert proposal is not None
        search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), proposal.trial.optimizer.lr + 10 * (proposal.trial.optimizer.gamma == "none"))
        told += 1
        if (after := search.ask()) is not None:
            going.append(after)
    arms = [[trial.params for trial in journal(tmp_path / "journal.log", f"optimizer.gamma={arm}")] for arm in ("none", "last", "all")]
    assert [len(arm) for arm in arms] == [20, 20, 20]
    assert all(len(set(map(str, arm))) == 20 for arm in arms)


class TestNothingIsTriedTwice:
    SMALL: ClassVar[dict[str, Any]] = {"model.width": {"low": 4, "high": 16, "step": 4}, "optimizer.rule": {"choices": ["sgd", "adamw"]}}

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_finite_space_is_searched_to_its_end_and_no_further(self, sampler: str, tmp_path: Path) -> None:
        search = Search(spec(sampler, 12, self.SMALL), tmp_path / "journal.log")
        seen = []
        while (proposal := search.ask()) is not None:
            seen.append((proposal.trial.model.width, proposal.trial.optimizer.rule))
            search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), float(proposal.trial.model.width))
            if len(seen) == 5:
                search = Search(spec(sampler, 12, self.SMALL), tmp_path / "journal.log")
        assert len(seen) == len(set(seen)) == 8
        assert search.exhausted == ["all"] and search.unasked == 0

    def test_a_trial_that_a_crash_left_without_its_values_gets_them(self, tmp_path: Path) -> None:
        """Each value is a line of the journal: whichever the last line is, the next start goes on with the same trial."""
        whole = asked(Search(spec("tpe", 15), tmp_path / "journal.log"))
        lines = (tmp_path / "journal.log").read_text().splitlines(keepends=True)
        created = max(number for number, line in enumerate(lines) if '"study_id"' in line)
        assert len(lines) - created >= 3
        for length in range(created + 1, len(lines) + 1):
            (tmp_path / "cut.log").write_text("".join(lines[:length]))
            assert Search(spec("tpe", 15), tmp_path / "cut.log").running() == whole

    def test_choices_that_python_takes_for_equal_are_different(self, tmp_path: Path) -> None:
        space = {"model.args.x": {"choices": [1, True, "1", None]}}
        trial = {"model": {"name": "import:mine:net", "args": {"x": 0}}}
        search = Search(spec("random", 4, space, trial=trial), tmp_path / "journal.log")
        drawn = [proposal.trial.model.args["x"] for proposal in asked(search)]
        assert sorted(map(repr, drawn)) == ["'1'", "1", "None", "True"]
        assert [repr(frozen.params["model.args.x"]) for frozen in journal(tmp_path / "journal.log", "all")] == list(map(repr, drawn))


class TestEnqueued:
    def test_a_point_is_tried_once_in_every_arm_and_the_rest_of_it_drawn(self, tmp_path: Path) -> None:
        for _ in range(2):
            search = Search(spec(trials=9), tmp_path / "journal.log")
            search.enqueue({"optimizer.lr": 0.123})
        first = asked(search)
        assert [proposal.trial.optimizer.lr == 0.123 for proposal in first] == [True] * 3 + [False] * 6
        assert [proposal.arm[16:] for proposal in first[:3]] == ["none", "last", "all"]
        assert len({proposal.trial.model.width for proposal in first}) > 1
        again = Search(spec(trials=12), tmp_path / "journal.log")
        again.enqueue({"optimizer.lr": 0.123})
        assert all(proposal.trial.optimizer.lr != 0.123 for proposal in asked(again))

    def test_a_point_can_be_meant_for_one_arm_and_one_that_was_tried_is_not_tried_again(self, tmp_path: Path) -> None:
        search = Search(spec(trials=9), tmp_path / "journal.log")
        tried = asked(Search(spec(trials=3), tmp_path / "journal.log"))[0].trial
        search = Search(spec(trials=9), tmp_path / "journal.log")
        search.enqueue({"optimizer.lr": tried.optimizer.lr, "model.width": tried.model.width}, {"optimizer.gamma": "none"})
        search.enqueue({"optimizer.lr": 0.5, "model.width": 8}, {"optimizer.gamma": "all"})
        later = asked(search)
        assert [(proposal.arm[16:], proposal.trial.model.width) for proposal in later if proposal.trial.optimizer.lr == 0.5] == [("all", 8)]
        assert all(proposal.trial.optimizer.lr != tried.optimizer.lr for proposal in later)


class TestSearcher:
    """What Tune calls, in Tune's order."""

    def searcher(self, tmp_path: Path) -> JournalSearcher:
        return JournalSearcher(Search(spec(trials=3), tmp_path / "journal.log"), {"folder": "x"}, [])

    def test_the_last_result_of_a_stopped_trial_is_not_lost(self, tmp_path: Path) -> None:
        """Tune shows a searcher the result of a stopped trial only at completion (ray 2.60)."""
        searcher = self.searcher(tmp_path)
        searcher.suggest("tune-1")
        searcher.on_trial_result("tune-1", {EPOCH: 1, OBJECTIVE: 0.5})
        searcher.on_trial_complete("tune-1", {EPOCH: 2, OBJECTIVE: 0.4, VALUE: 0.4, "done": True})
        assert journal(tmp_path / "journal.log")[0].intermediate_values == {1: 0.5, 2: 0.4}

    def test_an_ending_that_the_engine_says_counts(self, tmp_path: Path) -> None:
        searcher = self.searcher(tmp_path)
        searcher.suggest("tune-1")
        searcher.on_trial_complete("tune-1", {EPOCH: 2, OBJECTIVE: 0.4, VALUE: 0.4, ENDING: Ending(Outcome.COMPLETED)})
        assert journal(tmp_path / "journal.log")[0].value == 0.4

    def test_a_diverged_trial_without_the_metric_is_not_left_running(self, tmp_path: Path) -> None:
        searcher = self.searcher(tmp_path)
        searcher.suggest("tune-1")
        searcher.on_trial_complete("tune-1", {EPOCH: 1, ENDING: Ending(Outcome.DIVERGED, "nan")})
        assert journal(tmp_path / "journal.log")[0].constraints == {DIVERGED: 1.0}

    def test_an_error_is_a_failure_and_an_unknown_trial_is_ignored(self, tmp_path: Path) -> None:
        searcher = self.searcher(tmp_path)
        searcher.suggest("tune-1")
        searcher.on_trial_complete("tune-1", error=True)
        searcher.on_trial_complete("tune-1", error=True)
        searcher.on_trial_complete("stranger", {"done": True})
        assert journal(tmp_path / "journal.log")[0].state is TrialState.FAIL

    def test_it_finishes_when_every_trial_was_proposed(self, tmp_path: Path) -> None:
        searcher = self.searcher(tmp_path)
        assert [isinstance(searcher.suggest(str(number)), dict) for number in range(3)] == [True] * 3
        assert searcher.suggest("3") == JournalSearcher.FINISHED

    def test_resumed_trials_come_first_with_their_history(self, tmp_path: Path) -> None:
        search = Search(spec(trials=3), tmp_path / "journal.log")
        proposal = search.ask()
        assert proposal is not None
        config = JournalSearcher(search, {}, [(proposal, [(1, 0.5), (2, 0.4)])]).suggest("tune-1")
        assert isinstance(config, dict)
        assert (config["trial_id"], config["epoch"], config["history"]) == ("bridge-0000", 2, [0.5, 0.4])


def test_infeasible_trials_keep_tpe_out_of_the_diverging_region(tmp_path: Path) -> None:
    """Told as failed, they would be forgotten and the region proposed again."""
    space = {"optimizer.lr": {"low": 1e-3, "high": 10.0, "log": True}}
    search = Search(spec("tpe", 80, space), tmp_path / "journal.log")
    late = []
    for number in range(80):
        proposal = search.ask()
        assert proposal is not None
        lr = proposal.trial.optimizer.lr
        diverges = lr > 0.3
        search.tell(proposal.trial_id, Ending(Outcome.DIVERGED, "inf") if diverges else Ending(Outcome.COMPLETED), None if diverges else -lr)
        late.append(diverges) if number >= 40 else None
    assert sum(late) < 20


def test_what_is_told_of_a_trial_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(spec(trials=3), tmp_path / "journal.log")
    first, second, _ = (proposal.trial_id for proposal in asked(search))
    search.report(first, 1, 0.5)
    writes: list[int] = []
    original = JournalFile.append_logs

    def counted(file: JournalFile, logs: list[dict[str, Any]]) -> None:
        original(file, logs)
        if file._held is None:
            writes.append(len(logs))

    monkeypatch.setattr(JournalFile, "append_logs", counted)
    search.tell(first, Ending(Outcome.STOPPED, "scheduler"), 0.4, [(1, 0.5), (2, 0.4)])
    search.tell(second, Ending(Outcome.INTERRUPTED), None, [(1, 0.3)])
    assert writes == [3, 1]
    (stopped,) = journal(tmp_path / "journal.log")
    assert (stopped.state, stopped.value, stopped.intermediate_values) == (TrialState.PRUNED, 0.4, {1: 0.5, 2: 0.4})
    (running,) = journal(tmp_path / "journal.log", "optimizer.gamma=last")
    assert (running.state, running.intermediate_values) == (TrialState.RUNNING, {1: 0.3})


def test_every_proposal_is_forced_to_disk_and_a_failure_to_do_so_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(spec(trials=6), tmp_path / "journal.log")
    forced: list[int] = []

    def fsync(number: int) -> None:
        forced.append(number)
        if len(forced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert search.ask() and search.ask()
    with pytest.raises(OSError, match="No space left"):
        search.ask()
    assert len(forced) == 2


def test_what_another_process_writes_into_the_journal_is_seen(tmp_path: Path) -> None:
    """As optuna-dashboard does with notes."""
    search = Search(spec(trials=3), tmp_path / "journal.log")
    assert search.ask() is not None
    name = "bridge/optimizer.gamma=none"
    other = optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal.log"))))
    other.set_user_attr("note", "a good one")
    assert len(asked(search)) == 2
    assert optuna.load_study(study_name=name, storage=search._storage).user_attrs["note"] == "a good one"
    assert other.get_trials()[0].params == journal(tmp_path / "journal.log")[0].params
