"""How a study starts: nobody's trial ends before all processes are there, and few trials wait for one to fall free."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from study.tuning import placement, trainables
from study.tuning.placement import LONGEST_PAUSE, RollCall
from study.tuning.search import Search
from study.tuning.searcher import AHEAD, JournalSearcher
from study.tuning.stopping import EPOCH, OBJECTIVE
from study.tuning.trainables import SoloTrainable
from tests.tuning.test_search import spec
from tests.tuning.test_trainables import measured, trainable


def test_a_study_begins_when_its_processes_are_there() -> None:
    roll = RollCall(3)
    assert [roll.has_begun(process) for process in ("a", "b", "a", "b", "c", "a", "d")] == [False, False, False, False, True, True, True]


def test_a_study_begins_without_a_process_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place may be another study's; each one that does come is waited for anew."""
    now = 0.0
    monkeypatch.setattr(placement.time, "monotonic", lambda: now)
    roll = RollCall(3)
    assert not roll.has_begun("a")
    now = LONGEST_PAUSE
    assert not roll.has_begun("b")
    now = 2 * LONGEST_PAUSE
    assert not roll.has_begun("a")
    now += 0.1
    assert roll.has_begun("a") and roll.has_begun("b")


def test_the_first_result_of_a_process_waits_until_all_processes_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True]
    asked: list[str] = []

    def has_begun(process: str) -> bool:
        asked.append(process)
        return answers.pop(0)

    roll = SimpleNamespace(has_begun=SimpleNamespace(remote=has_begun))
    monkeypatch.setattr(trainables.ray, "get_actor", {"roll": roll}.get)
    monkeypatch.setattr(trainables.ray, "get", lambda answer: answer)
    monkeypatch.setattr(SoloTrainable, "_process", "its name")
    monkeypatch.setattr(trainables, "PAUSE", 0.0)
    one = trainable(tmp_path, roll="roll")
    assert measured(one.step()).epoch == 1
    assert asked == ["its name"] * 3
    assert measured(one.step()).epoch == 2
    one.reset_config(one._config)
    assert measured(one.step()).epoch == 1
    assert len(asked) == 3


class TestTrialsThatWait:
    """The model of a search knows more, the fewer trials are proposed before they can run."""

    def proposed(self, searcher: JournalSearcher, *names: str) -> list[bool]:
        """Which of the trials with these names Tune was given."""
        return [isinstance(searcher.suggest(name), dict) for name in names]

    def searcher(self, folder: Path, **arguments: Any) -> JournalSearcher:
        return JournalSearcher(Search(spec(trials=9), folder / "journal.log"), {}, [], processes=2, **arguments)

    def test_one_for_each_process_is_proposed_and_few_more(self, tmp_path: Path) -> None:
        searcher = self.searcher(tmp_path)
        assert self.proposed(searcher, *"abcde") == [True] * (2 + AHEAD) + [False]
        searcher.on_trial_complete("a", {EPOCH: 1, OBJECTIVE: 0.5})
        assert self.proposed(searcher, *"ef") == [True, False]

    def test_more_are_proposed_where_more_run(self, tmp_path: Path) -> None:
        """On a cluster that grows, every trial that starts brings another one that waits for a process."""
        searcher = self.searcher(tmp_path)
        self.proposed(searcher, *"abcd")
        for name in "abc":
            searcher.on_trial_result(name, {EPOCH: 1, OBJECTIVE: 0.5})
        assert self.proposed(searcher, *"ef") == [True, False]

    def test_a_population_begins_whole(self, tmp_path: Path) -> None:
        assert self.proposed(self.searcher(tmp_path, pausing=True), *"abcdefghi") == [True] * 9

    def test_all_are_proposed_in_the_end(self, tmp_path: Path) -> None:
        searcher, count = self.searcher(tmp_path), 0
        while (config := searcher.suggest(str(count))) != Searcher.FINISHED:
            assert isinstance(config, dict)
            searcher.on_trial_complete(str(count), {EPOCH: 1, OBJECTIVE: 0.5})
            count += 1
        assert count == 9
