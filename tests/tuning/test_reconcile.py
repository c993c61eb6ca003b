"""What a crash leaves behind is brought together: journal, ledger and snapshots agree again, and no trial is lost or drawn anew."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from study.errors import HomeError
from study.measurement import Ending, Measurement, Outcome
from study.tracking.outbox import Outbox
from study.tuning.exploiting import saved_path
from study.tuning.reconcile import reconcile, repair
from study.tuning.search import Search
from study.tuning.trainables import snapshot_path
from tests.tuning.test_search import asked, journal, spec

ARM = "optimizer.gamma=none"


def searched(tmp_path: Path, trials: int = 3, sampler: str = "random") -> tuple[Search, Outbox]:
    search, outbox = Search(spec(sampler, trials), tmp_path / "journal.log"), Outbox(tmp_path)
    for proposal in asked(search):
        outbox.start(proposal.trial_id, arm=proposal.arm, trial=proposal.trial.canonical())
    return search, outbox


class TestAJournal:
    def test_with_half_a_line_is_readable_again_and_goes_on(self, tmp_path: Path) -> None:
        searched(tmp_path)
        whole = (tmp_path / "journal.log").read_bytes()
        (tmp_path / "journal.log").write_bytes(whole + b'{"op_code":6,"worker_id":"a')
        repair(tmp_path / "journal.log")
        assert (tmp_path / "journal.log").read_bytes() == whole
        Search(spec(trials=3), tmp_path / "journal.log").tell("bridge-0000", Ending(Outcome.COMPLETED), 0.5)
        assert journal(tmp_path / "journal.log")[0].value == 0.5

    def test_whose_writer_died_holding_it_is_free_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A relative path in the lock made Optuna wait for ever."""
        monkeypatch.chdir(tmp_path)
        searched(Path("."))
        Path("journal.log.lock").symlink_to("./elsewhere/journal.log")
        repair(Path("journal.log"))
        Search(spec(trials=3), Path("journal.log")).tell("bridge-0000", Ending(Outcome.COMPLETED), 0.5)

    def test_that_is_whole_or_missing_is_left_as_it_is(self, tmp_path: Path) -> None:
        repair(tmp_path / "journal.log")
        assert not (tmp_path / "journal.log").exists()

    def test_with_a_damaged_line_says_which(self, tmp_path: Path) -> None:
        searched(tmp_path)
        lines = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
        (tmp_path / "journal.log").write_bytes(b"".join([*lines[:1], b"garbage\n", *lines[2:]]))
        with pytest.raises(HomeError, match=r"journal\.log:2: the study's journal is damaged \(.*\); put back a copy of the study's folder"):
            Search(spec(trials=3), tmp_path / "journal.log")


class TestAgreement:
    def test_what_ended_in_the_journal_ends_in_the_ledger(self, tmp_path: Path) -> None:
        search, outbox = searched(tmp_path)
        search.tell("bridge-0000", Ending(Outcome.DIVERGED, "nan"), None)
        reconcile(Search(spec(trials=3), tmp_path / "journal.log"), outbox, tmp_path)
        (record,) = outbox.records()
        assert (record.trial_id, record.outcome, record.reason) == ("bridge-0000", Outcome.DIVERGED, "nan")

    def test_what_ended_in_the_ledger_is_told_to_the_journal(self, tmp_path: Path) -> None:
        _, outbox = searched(tmp_path)
        outbox.measure("bridge-0000", Measurement(10, 1, {"val/error": 0.25}))
        outbox.end("bridge-0000", Ending(Outcome.STOPPED, "scheduler"), 0.25)
        outbox.end("bridge-0001", Ending(Outcome.INTERRUPTED), None)
        again = Search(spec(trials=3), tmp_path / "journal.log")
        reconcile(again, outbox, tmp_path)
        (told,) = journal(tmp_path / "journal.log")
        assert (told.state, told.intermediate_values) == (TrialState.PRUNED, {1: 0.25})
        assert [proposal.trial_id for proposal in again.running()] == ["bridge-0001", "bridge-0002"]

    @pytest.mark.parametrize(("lost", "other"), [("outbox.sqlite", "journal.log"), ("journal.log", "outbox.sqlite")])
    def test_without_one_of_the_two_is_told(self, lost: str, other: str, tmp_path: Path) -> None:
        search, outbox = searched(tmp_path)
        search.tell("bridge-0000", Ending(Outcome.COMPLETED), 0.5)
        outbox.close()
        for file in tmp_path.glob(f"{lost}*"):
            file.unlink()
        with pytest.raises(HomeError, match=rf"{lost}: is empty, and {other} has trials.*; put back a copy"):
            reconcile(Search(spec(trials=3), tmp_path / "journal.log"), Outbox(tmp_path), tmp_path)

    def test_snapshots_stay_where_a_trial_goes_on_and_nowhere_else(self, tmp_path: Path) -> None:
        search, outbox = searched(tmp_path)
        for trial_id in ("bridge-0000", "bridge-0001"):
            snapshot_path(tmp_path, trial_id).parent.mkdir(parents=True)
            snapshot_path(tmp_path, trial_id).touch()
            snapshot_path(tmp_path, trial_id).with_suffix(".77.tmp").touch()
            saved_path(tmp_path, trial_id, 8).touch()
            saved_path(tmp_path, trial_id, 8).with_suffix(".77.tmp").touch()
        recorders = tmp_path / "trials" / "bridge-0000" / "trace.parquet.78.tmp"
        recorders.touch()
        search.tell("bridge-0000", Ending(Outcome.COMPLETED), 0.5)
        reconcile(search, outbox, tmp_path)
        left = {path.name for path in (tmp_path / "trials" / "bridge-0001").iterdir()}
        assert left == {"snapshot.pt", "saved-0008.pt"}
        assert [*(tmp_path / "trials" / "bridge-0000").iterdir()] == [recorders], "the recorder writes on while a study ends"


@pytest.mark.parametrize("sampler", ["random", "sobol", "tpe"])
@pytest.mark.parametrize("lines", range(1, 8))
def test_a_driver_that_dies_while_it_asks_loses_no_trial_and_changes_none(sampler: str, lines: int, tmp_path: Path) -> None:
    """The journal is cut after each line that asking for the last trial writes."""
    wanted = [proposal.trial for proposal in asked(Search(spec(sampler, 6), tmp_path / "whole.log"))]
    text = (tmp_path / "whole.log").read_bytes().splitlines(keepends=True)
    before = len((tmp_path / "whole.log").read_bytes().splitlines()) - _written_by_the_last(sampler, tmp_path)
    (tmp_path / "cut.log").write_bytes(b"".join(text[: before + lines]))
    again = Search(spec(sampler, 6), tmp_path / "cut.log")
    found = [*again.running(), *asked(again)]
    assert [proposal.trial_id for proposal in found] == [f"bridge-{number:04d}" for number in range(6)]
    assert [proposal.trial for proposal in found] == wanted


def _written_by_the_last(sampler: str, tmp_path: Path) -> int:
    """Lines that asking for the last of six trials writes."""
    shorter = Search(spec(sampler, 6), tmp_path / "shorter.log")
    for _ in range(5):
        shorter.ask()
    five = len((tmp_path / "shorter.log").read_bytes().splitlines())
    shorter.ask()
    return len((tmp_path / "shorter.log").read_bytes().splitlines()) - five
