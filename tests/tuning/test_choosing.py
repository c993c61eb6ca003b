"""Which engine trains a study is decided by what its trials share, by how long it is, and by one measurement that is kept."""

from pathlib import Path
from typing import Any

import pytest

from study.engines.admission import Admission
from study.errors import InputError
from study.spec import StudySpec, check
from study.trial import TrialSpec
from study.tuning import choosing
from study.tuning.choosing import MOST_SLOTS, choose

TRIAL: dict[str, Any] = {
    "data": {"batch_size": 32, "train_size": 320},
    "model": {"name": "mlp", "width": 8},
    "schedule": {"epochs": 100},
    "trace": {"every": 2},
}
LR: dict[str, Any] = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}


class Examiner:
    """Finds what it is told to find, and counts."""

    def __init__(self) -> None:
        self.found = Admission("converted", 3.0, "")
        self.examined: list[tuple[TrialSpec, int]] = []

    def __call__(self, trial: TrialSpec, slots: list[int]) -> Admission:
        (number,) = slots
        self.examined.append((trial, number))
        return self.found


@pytest.fixture(autouse=True)
def examiner(monkeypatch: pytest.MonkeyPatch) -> Examiner:
    """On a machine of two cores, where an epoch takes a second."""
    examiner = Examiner()
    monkeypatch.setattr(choosing, "examine", examiner)
    monkeypatch.setattr(choosing, "solo_seconds", lambda trial: 1.0)
    monkeypatch.setattr(choosing.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(choosing, "_memory", lambda: 16 << 30)
    return examiner


def spec(space: dict[str, Any] | None = None, *, trials: int = 60, trial: dict[str, Any] | None = None, **sections: Any) -> StudySpec:
    return check({"name": "chosen", "trial": {**TRIAL, **(trial or {})}, "space": space or LR, "search": {"trials": trials}, **sections})


STRUCTURAL: dict[str, dict[str, Any]] = {
    "optimizer.rule": {"choices": ["sgd", "adamw"]},
    "optimizer.decay": {"choices": ["coupled", "decoupled"]},
    "optimizer.nesterov": {"choices": [False, True]},
    "model.width": {"low": 8, "high": 16},
    "model.norm": {"choices": ["batch", "layer"]},
    "model.dropout": {"low": 0.0, "high": 0.5},
    "data.batch_size": {"choices": [32, 64]},
    "data.train_size": {"choices": [320, 640]},
    "loss": {"choices": ["cross_entropy", "mse"]},
    "precision": {"choices": ["float32", "float64"]},
}
"""Axes whose trials have no step in common."""

NUMBERS: dict[str, dict[str, Any]] = {
    "seed": {"choices": [0, 1, 2]},
    "data.seed": {"choices": [0, 1]},
    "data.label_noise": {"choices": [0.0, 0.1]},
    "optimizer.lr": LR["optimizer.lr"],
    "optimizer.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
    "optimizer.intrinsic_lr": {"low": 1e-6, "high": 1e-3, "log": True},
    "optimizer.momentum": {"low": 0.5, "high": 0.9},
    "optimizer.clip": {"choices": [None, 1.0]},
    "optimizer.gamma": {"choices": ["none", "all", "all@1"], "role": "scientific"},
    "optimizer.shift": {"choices": ["exempt", "decayed"]},
    "schedule.epochs": {"choices": [50, 100]},
    "schedule.shape": {"choices": ["cosine", "constant"]},
    "schedule.warmup": {"low": 0.0, "high": 0.2},
}
"""Axes whose trials may share a step."""


@pytest.mark.parametrize(("path", "axis"), STRUCTURAL.items())
def test_trials_that_differ_in_structure_are_trained_solo(path: str, axis: dict[str, Any], tmp_path: Path, examiner: Examiner) -> None:
    chosen = choose(spec({**LR, path: axis}), tmp_path)
    assert (chosen.engine, chosen.why) == ("solo", f"trials that differ in {path} cannot share a step")
    assert examiner.examined == []
    with pytest.raises(InputError, match=f"cannot be fused: trials that differ in {path} cannot share a step"):
        choose(spec({**LR, path: axis}, resources={"engine": "fused"}), tmp_path)


@pytest.mark.parametrize(("path", "axis"), NUMBERS.items())
def test_trials_that_differ_in_numbers_are_fused(path: str, axis: dict[str, Any], tmp_path: Path) -> None:
    chosen = choose(spec({path: axis}), tmp_path)
    assert (chosen.engine, chosen.arithmetic, chosen.gain) == ("fused", "converted", 3.0)
    assert chosen.why == f"{MOST_SLOTS} trials in one step train 3.0 times as fast per core"
    told = {"name": "fused", "slots": MOST_SLOTS, "engines_per_gpu": 1, "arithmetic": "converted", "gain": 3.0, "why": chosen.why}
    assert chosen.document() == told


@pytest.mark.parametrize("path", [*STRUCTURAL, *NUMBERS, "schedule.decay.shape", "trace.every", "model.args.width", "optimizer.constraint.bound"])
def test_an_axis_whose_values_are_only_legal_with_others_is_judged_by_its_path(path: str) -> None:
    assert choosing._may_differ(path) == (path in NUMBERS or path.startswith(("schedule.", "trace.")))


def test_few_trials_do_not_fill_rows(tmp_path: Path, examiner: Examiner) -> None:
    assert choose(spec(trials=1), tmp_path).why == "there are too few trials to fill the rows of fused engines"
    assert choose(spec(trials=4, resources={"slots": 3}), tmp_path).engine == "solo"
    assert examiner.examined == []
    assert choose(spec(trials=1, resources={"engine": "fused"}), tmp_path).engine == "fused"


def test_a_short_study_has_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPU seconds of work: an engine and its processes on the other core would take three to start, and halve what is left to train."""
    short = spec(trials=4, trial={"schedule": {"epochs": 2}})
    chosen = choose(short, tmp_path)
    assert (chosen.engine, chosen.engines, chosen.slots) == ("fused", 1, 2)
    assert chosen.why.endswith("on 1 of 2 cores, as so short a study ends before engines on more of them would have started")
    assert choose(spec(), tmp_path).engines == 0, "one on each core"
    assert choose(spec(trials=4, trial={"schedule": {"epochs": 2}}, resources={"slots": 2, "engine": "fused"}), tmp_path).engines == 0
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert choose(short, tmp_path).engines == 0, "the cluster's cores are not this machine's"


def test_a_study_that_stops_its_trials_early_is_shorter(tmp_path: Path, examiner: Examiner) -> None:
    """36 CPU seconds of work, or 14, of which a small gain saves little."""
    examiner.found = Admission("converted", 1.5, "")
    medium = {"trial": {"schedule": {"epochs": 3}}, "trials": 12}
    assert choose(spec(**medium), tmp_path).engine == "fused"
    assert choose(spec(**medium, stopping={"scheduler": "asha", "grace": 1, "reduction": 3}), tmp_path).engine == "solo"


def test_a_gain_that_does_not_pay_is_told(tmp_path: Path, examiner: Examiner) -> None:
    examiner.found = Admission("looped", 0.9, "")
    chosen = choose(spec(), tmp_path)
    assert (chosen.engine, chosen.slots, chosen.gain) == ("solo", 1, 0.9)
    assert chosen.why.startswith(f"{MOST_SLOTS} trials in one step would train 0.9 times as fast per core")
    assert choose(spec(resources={"engine": "fused"}), tmp_path).arithmetic == "looped"


def test_a_model_that_fails_the_self_test_is_not_fused(tmp_path: Path, examiner: Examiner) -> None:
    examiner.found = Admission("", 0.0, "its train/loss is odd")
    assert choose(spec(), tmp_path).why == "its model cannot be fused: its train/loss is odd"


def test_who_asks_for_solo_gets_it_unexamined(tmp_path: Path, examiner: Examiner) -> None:
    assert choose(spec(resources={"engine": "solo"}), tmp_path).why == "the spec says so"
    assert examiner.examined == []


@pytest.mark.parametrize(("trials", "slots"), [(1, 2), (2, 2), (4, 2), (6, 3), (60, MOST_SLOTS)])
def test_slots_fit_the_trials_of_a_core(trials: int, slots: int, tmp_path: Path) -> None:
    assert choose(spec(trials=trials, resources={"engine": "fused"}), tmp_path).slots == slots


@pytest.mark.parametrize(("epochs", "slots"), [(1, 3), (2, 4), (4, MOST_SLOTS)])
def test_a_short_study_starts_fewer_processes(epochs: int, slots: int, tmp_path: Path) -> None:
    """60, 120 and 240 CPU seconds of work; the processes of another slot on both cores take four."""
    assert choose(spec(trial={"schedule": {"epochs": epochs}}, resources={"engine": "fused"}), tmp_path).slots == slots


@pytest.mark.parametrize(("gigabytes", "slots"), [(1, 2), (4, 4), (16, MOST_SLOTS)])
def test_slots_fit_the_memory(gigabytes: int, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a process, and a quarter of the memory is enough for all of them."""
    monkeypatch.setattr(choosing, "_memory", lambda: gigabytes << 30)
    chosen = choose(spec(resources={"engine": "fused"}), tmp_path)
    assert (chosen.slots, chosen.engines) == (slots, 1 if gigabytes == 1 else 0)


def test_slots_that_are_asked_for_are_given(tmp_path: Path, examiner: Examiner) -> None:
    for engine in ("auto", "fused"):
        assert choose(spec(resources={"engine": engine, "slots": 11}), tmp_path).slots == 11
    assert [slots for _, slots in examiner.examined] == [11]


def test_a_measurement_is_kept_in_the_home_and_not_repeated(tmp_path: Path, examiner: Examiner) -> None:
    first = choose(spec(), tmp_path)
    examiner.found = Admission("", 0.0, "another day")
    assert choose(spec({"optimizer.gamma": NUMBERS["optimizer.gamma"]}), tmp_path) == first
    assert len(examiner.examined) == 1
    assert len(list(tmp_path.glob(".engines/*"))) == 1
    assert choose(spec(trial={"model": {"name": "mlp", "width": 9}}), tmp_path).why.endswith("another day")
    assert choose(spec(), tmp_path / "elsewhere").why.endswith("another day")


def test_the_users_own_code_may_change_and_is_examined_every_time(tmp_path: Path, examiner: Examiner) -> None:
    own = {"model": {"name": "import:tests.engines.strange:Plain"}}
    assert choose(spec(trial=own), tmp_path) == choose(spec(trial=own), tmp_path)
    assert len(examiner.examined) == 2


def test_a_trial_from_the_middle_of_the_space_is_examined(tmp_path: Path, examiner: Examiner) -> None:
    """The base trial's own values may be nothing to train with: here a place that the model has not."""
    space = {**LR, "optimizer.gamma": {"choices": ["all", "none"]}}
    choose(spec(space, trial={"optimizer": {"lr": 1e9, "gamma": "down"}}), tmp_path)
    ((examined, _),) = examiner.examined
    assert (examined.optimizer.lr, examined.optimizer.gamma) == (pytest.approx(1e-2), "all")


def test_what_the_users_code_raises_is_left_to_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(trial: TrialSpec) -> float:
        raise ArithmeticError("too many images\nand more")

    monkeypatch.setattr(choosing, "solo_seconds", raising)
    assert choose(spec(), tmp_path).why == "a first trial raised ArithmeticError: too many images"
