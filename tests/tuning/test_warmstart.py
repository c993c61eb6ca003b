"""What another study found is taken over where it holds, tried first where it may, and only once."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from study.errors import InputError, NotFound
from study.home import StudyFolder
from study.measurement import Ending, Measurement, Outcome
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.tuning.earlier import earlier_trials, matching, overlap
from study.tuning.search import DIVERGED, Search
from study.tuning.warmstart import warm_start

LR: dict[str, Any] = {"low": 1e-3, "high": 1.0, "log": True}


def spec(name: str = "later", space: dict[str, Any] | None = None, trial: dict[str, Any] | None = None, **search: Any) -> StudySpec:
    return check(
        {
            "name": name,
            "trial": trial or {},
            "space": space or {"optimizer.lr": LR},
            "search": {"sampler": "tpe", "trials": 12, "from": "first", **search},
        }
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a study of five trials: three completed, one was stopped, one diverged; its learning rates reach up to 10."""
    first = spec("first", {"optimizer.lr": {**LR, "high": 10.0}})
    folder = StudyFolder.prepare(tmp_path, first)
    outbox = Outbox(folder.path)
    lived = (
        (0.1, Ending(Outcome.COMPLETED), (0.5, 0.2)),
        (0.2, Ending(Outcome.COMPLETED), (0.5, 0.1)),
        (5.0, Ending(Outcome.COMPLETED), (0.6, 0.4)),
        (0.01, Ending(Outcome.STOPPED, "scheduler"), (0.9,)),
        (0.9, Ending(Outcome.DIVERGED, "nan"), (0.7,)),
        (0.5, Ending(Outcome.FAILED), ()),
    )
    for number, (lr, ending, errors) in enumerate(lived):
        trial_id = f"first-{number:04d}"
        outbox.start(trial_id, arm="all", trial=first.trial_for({"optimizer.lr": lr}).canonical())
        for epoch, error in enumerate(errors, start=1):
            outbox.measure(trial_id, Measurement(10 * epoch, epoch, {"val/error": error, "train/loss": 1.0}))
        outbox.end(trial_id, ending, errors[-1] if errors else None)
    outbox.close()
    return tmp_path


def told(folder: Path, name: str = "later/all") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(folder)))).get_trials()


def test_trials_that_this_study_could_propose_are_added_as_what_they_were(home: Path) -> None:
    for _ in range(2):  # a restart adds nothing
        search = Search(spec(), home / "journal.log")
        said = warm_start(search, earlier_trials(spec(), home))
    assert said == "from first: 4 of 5 results added, 0 points to be tried first"
    first, second, stopped, diverged = told(home / "journal.log")
    assert (first.state, first.value, first.intermediate_values) == (TrialState.COMPLETE, 0.2, {1: 0.5, 2: 0.2})
    assert second.user_attrs["from"].endswith("/first-0001")
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 0.9})
    assert (diverged.state, diverged.constraints) == (TrialState.PRUNED, {DIVERGED: 1.0})
    assert search.unasked == 12 and search.told() == {}
    proposal = search.ask()
    assert proposal is not None and proposal.trial_id == "later-0000"
    assert Search(spec(), home / "journal.log").running() == [proposal]


def test_of_other_trials_the_best_values_are_tried_first(home: Path) -> None:
    """A longer schedule makes another trial: its result would be wrong here, its learning rate is worth a try. In every arm, once."""
    space = {"optimizer.lr": LR, "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"}}
    longer = spec(space=space, trial={"schedule": {"epochs": 77}})
    for _ in range(2):
        search = Search(longer, home / "journal.log")
        assert warm_start(search, earlier_trials(longer, home)) == "from first: 0 of 5 results added, 2 points to be tried first"
    proposals = [search.ask() for _ in range(6)]
    assert [proposal.trial.optimizer.lr for proposal in proposals[:4] if proposal] == [0.2, 0.2, 0.1, 0.1]
    assert len({proposal.trial.optimizer.lr for proposal in proposals[4:] if proposal} & {0.1, 0.2}) == 0


def test_what_was_found_is_not_tried_again(home: Path) -> None:
    space = {"optimizer.lr": {"choices": [0.01, 0.1, 0.2, 0.3, 0.4]}}
    search = Search(spec(space=space, sampler="random"), home / "journal.log")
    warm_start(search, earlier_trials(spec(space=space), home))
    lrs = []
    while (proposal := search.ask()) is not None:
        lrs.append(proposal.trial.optimizer.lr)
    assert sorted(lrs) == [0.3, 0.4]


def test_a_result_belongs_to_the_arm_whose_trial_it_is(home: Path) -> None:
    studied = spec(space={"optimizer.lr": LR, "optimizer.gamma": {"choices": ["all", "none"], "role": "scientific"}})
    trial = studied.trial_for({"optimizer.lr": 0.1, "optimizer.gamma": "none"})
    assert matching(studied, {"optimizer.gamma": "none"}, trial) == {"optimizer.lr": 0.1}
    assert matching(studied, {"optimizer.gamma": "all"}, trial) is None


def test_a_trial_is_found_on_other_coordinates_of_the_same_plane() -> None:
    """Learning rate and decay of the one study are learning rate and their product here."""
    ours = spec(space={"optimizer.lr": LR, "optimizer.intrinsic_lr": {"low": 1e-6, "high": 1e-2, "log": True}})
    theirs = spec(space={"optimizer.lr": LR, "optimizer.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True}})
    trial = theirs.trial_for({"optimizer.lr": 0.3, "optimizer.weight_decay": 7e-4})
    point = matching(ours, {}, trial)
    assert point is not None and point["optimizer.intrinsic_lr"] == pytest.approx(0.3 * 7e-4)


def test_values_off_an_axis_and_axes_that_do_not_exist_are_left_open() -> None:
    space = {
        "optimizer.lr": LR,
        "optimizer.rule": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.5, "high": 0.95, "when": {"optimizer.rule": "sgd"}},
    }
    trial = spec(space=space).trial_for({"optimizer.rule": "adamw", "optimizer.lr": 0.1})
    assert overlap(spec(space=space), trial) == {"optimizer.lr": 0.1, "optimizer.rule": "adamw"}
    assert overlap(spec(space={"optimizer.lr": {**LR, "low": 0.5}}), trial) == {}


def test_studies_that_cannot_be_learnt_from_are_refused(home: Path) -> None:
    with pytest.raises(NotFound, match=r"no study of this name \(got 'nobody'\)"):
        earlier_trials(spec(**{"from": "nobody"}), home)
    with pytest.raises(InputError, match="cannot start from itself"):
        earlier_trials(spec("first"), home)
    accuracy = spec().model_copy(update={"objective": spec().objective.model_copy(update={"metric": "val/loss"})})
    with pytest.raises(InputError, match=r"did not measure this study's objective \(got 'val/loss'\).*train/loss, val/error"):
        earlier_trials(accuracy, home)
    assert len(earlier_trials(spec(**{"from": str(home / "first")}), home)) == 5


def test_the_field_is_written_as_it_is_read() -> None:
    assert "  from: first\n" in spec().to_yaml()
    assert "from_" not in spec().to_yaml()
