"""Population based training: who takes over whose state, what is mutated, and that a trial stays one trial."""

import json
import math
import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from study.engines.engine import Snapshot
from study.engines.exploits import exploited, exploits_of, in_force
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.errors import InputError, Interrupted, SpecError
from study.home import StudyFolder
from study.measurement import EXPLOITS
from study.results.best import load_best
from study.results.export import export
from study.space import Axis
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.trial import TrialSpec
from study.tuning.confirming import forecast
from study.tuning.driver import run
from study.tuning.earlier import earlier_trials
from study.tuning.exploiting import KEPT, exploit_of, going_on, mutations, refer, save, saved_path
from study.tuning.population import Populations, mutation, within
from study.tuning.reporting import warnings_of
from study.tuning.stopping import EPOCH, OBJECTIVE
from study.tuning.trial_files import snapshot_path
from tests.tuning.test_driver import all_agree, mlflow_runs, prepared, told

TRIAL: dict[str, Any] = {
    "data": {"batch_size": 64, "train_size": 320},
    "model": {"name": "mlp", "width": 16},
    "schedule": {"epochs": 8, "shape": "constant"},
    "trace": {"every": 2},
}
LR: dict[str, Any] = {"low": 1e-9, "high": 1.0, "log": True}
STOPPING: dict[str, Any] = {"scheduler": "pbt", "perturbation": 2, "grace": 2, "quantile": 0.5, "resample": 0}
LAUNCHED = [3e-9, 0.2, 2e-9, 0.1]
"""Two learning rates that learn, and two that do not."""


def spec(
    name: str = "pop", *, trial: dict[str, Any] | None = None, space: dict[str, Any] | None = None, trials: int = 4, **sections: Any
) -> StudySpec:
    search = {"sampler": "random", "trials": trials}
    return check({"name": name, "trial": trial or TRIAL, "space": space or {"optimizer.lr": LR}, "search": search, "stopping": STOPPING, **sections})


class TestMutations:
    @pytest.mark.parametrize("axis", [Axis(**LR), Axis(low=0.5, high=0.9)])
    def test_values_stay_within_their_axis(self, axis: Axis) -> None:
        draw = mutation(axis)
        assert callable(draw)
        for _ in range(100):
            for value in (draw(), within({"x": axis}, {"x": draw() * random.choice((0.8, 1.2))})["x"]):
                assert axis.low is not None and axis.high is not None and axis.low <= value <= axis.high

    def test_a_log_axis_is_drawn_from_in_the_logarithm(self) -> None:
        draw = mutation(Axis(low=1e-8, high=1.0, log=True))
        assert callable(draw)
        assert 0.3 < sum(draw() < 1e-4 for _ in range(500)) / 500 < 0.7

    def test_lists_and_grids_are_moved_along(self) -> None:
        assert mutation(Axis(choices=(0.3, 0.1, 0.2))) == [0.1, 0.2, 0.3]
        assert mutation(Axis(low=0.1, high=0.3, step=0.1)) == pytest.approx([0.1, 0.2, 0.3])


class Controller:
    """As much of Tune as a scheduler of populations asks for; a state is saved at once."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.search_alg = object()

    def get_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: Any = None) -> str:
        return f"state of {trial.config['trial_id']}"


def populate(studied: StudySpec, folder: Path, lrs: list[float], arms: list[str] | None = None) -> tuple[Populations, Controller]:
    scheduler, controller = Populations(studied), Controller()
    for number, lr in enumerate(lrs):
        launched = studied.trial_for({"optimizer.lr": lr})
        own = {"trial_id": f"pop-{number:04d}", "arm": arms[number] if arms else "all", "folder": str(folder), "epoch": 0, "history": []}
        trial = Trial("__fake", stub=True, config={**own, "trial": json.dumps(launched.canonical())})
        trial.set_status(Trial.RUNNING)
        controller.trials.append(trial)
        scheduler.on_trial_add(controller, trial)  # type: ignore[arg-type]
    return scheduler, controller


def report(scheduler: Populations, controller: Controller, number: int, epoch: int, objective: float) -> str:
    return scheduler.on_trial_result(controller, controller.trials[number], {EPOCH: epoch, OBJECTIVE: objective})  # type: ignore[arg-type]


def test_the_worst_goes_on_with_the_state_of_the_best_and_stays_itself(tmp_path: Path) -> None:
    scheduler, controller = populate(spec(), tmp_path, [0.5, 1e-3])
    for epoch, objective in enumerate((0.95, 0.9, 0.85), start=1):
        assert report(scheduler, controller, 0, epoch, 0.1) == TrialScheduler.CONTINUE
        assert report(scheduler, controller, 1, epoch, objective) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, 0, 4, 0.1) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, 1, 4, 0.8) == TrialScheduler.NOOP
    worst = controller.trials[1]
    assert worst.status == Trial.PAUSED and worst.checkpoint == "state of pop-0000"
    assert (worst.config["trial_id"], worst.config["epoch"], worst.config["history"]) == ("pop-0001", 4, [0.95, 0.9, 0.85, 0.8])
    assert json.loads(worst.config["trial"])["optimizer"]["lr"] == 1e-3
    exploit, lr = worst.config["exploit"], worst.config["optimizer.lr"]
    assert lr in (pytest.approx(0.4), pytest.approx(0.6)) and exploit["trial"]["optimizer"]["lr"] == lr
    assert (exploit["donor"], exploit["epoch"], exploit["donor_values"]) == ("pop-0000", 4, {"optimizer.lr": 0.5})
    assert scheduler.choose_trial_to_run(controller) is worst  # type: ignore[arg-type]


def test_arms_are_populations_of_their_own(tmp_path: Path) -> None:
    space = {"optimizer.lr": LR, "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"}}
    labels = ["optimizer.gamma=none", "optimizer.gamma=all"]
    scheduler, controller = populate(spec(space=space), tmp_path, [0.5, 1e-3, 0.4, 1e-4], labels * 2)
    for epoch in (2, 4):
        for number, objective in enumerate((0.1, 0.8, 0.2, 0.9)):
            report(scheduler, controller, number, epoch, objective)
    taken = {trial.config["trial_id"]: trial.config["exploit"] for trial in controller.trials if "exploit" in trial.config}
    assert {trial_id: exploit["donor"] for trial_id, exploit in taken.items()} == {"pop-0002": "pop-0000", "pop-0003": "pop-0001"}
    assert [taken[trial_id]["trial"]["optimizer"]["gamma"] for trial_id in sorted(taken)] == ["none", "all"]


def test_who_is_ahead_waits_for_the_last_of_its_arm(tmp_path: Path) -> None:
    scheduler, controller = populate(spec(), tmp_path, [0.5, 0.4])
    ahead, behind = controller.trials
    assert report(scheduler, controller, 0, 2, 0.1) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, 0, 4, 0.1) == TrialScheduler.PAUSE
    ahead.set_status(Trial.PAUSED)
    assert scheduler.choose_trial_to_run(controller) is None  # type: ignore[arg-type]
    report(scheduler, controller, 1, 2, 0.2)
    assert scheduler.choose_trial_to_run(controller) is ahead  # type: ignore[arg-type]
    ahead.set_status(Trial.RUNNING)
    behind.set_status(Trial.TERMINATED)
    assert report(scheduler, controller, 0, 6, 0.1) == TrialScheduler.CONTINUE


def trained(lr: float, epochs: int, engine: Any = None) -> tuple[TrialSpec, Snapshot]:
    trial = TrialSpec.model_validate({**TRIAL, "optimizer": {"lr": lr}})
    engine = engine or SoloEngine()
    engine.admit("donor", trial)
    for _ in range(epochs):
        engine.advance()
    return trial, engine.snapshot("donor")


def exploit(lr: float, epoch: int, donor_epoch: int) -> dict[str, Any]:
    trial = TrialSpec.model_validate({**TRIAL, "optimizer": {"lr": lr}}).canonical()
    mutated = {"values": {"optimizer.lr": lr}, "donor_values": {"optimizer.lr": 0.2}, "trial": trial}
    return {"epoch": epoch, "donor": "donor", "donor_epoch": donor_epoch, **mutated}


@pytest.mark.parametrize("make", [SoloEngine, lambda: FusedEngine(2)], ids=["solo", "fused"])
@pytest.mark.parametrize("epoch", [2, 4])
def test_state_and_values_are_taken_over_and_the_age_is_not(make: Any, epoch: int) -> None:
    trial, donor = trained(0.2, 2, make())
    found = exploited(donor, None, exploit(1e-9, epoch, 2))
    launched = TrialSpec.model_validate({**TRIAL, "optimizer": {"lr": 1e-3}})
    engine = make()
    engine.admit("a", in_force(launched, found), found)
    for name, value in engine.weights("a").items():
        torch.testing.assert_close(value, donor.state["model"][name], rtol=0, atol=0)
    (progress,) = engine.advance()
    values = progress.measurement.values
    assert (progress.measurement.epoch, progress.measurement.step) == (epoch + 1, 5 * (epoch + 1))
    assert values["lr"] == 1e-9 and values["intrinsic_lr"] == 1e-9 * trial.optimizer.weight_decay and values[EXPLOITS] == 1
    assert values["train/loss"] < 1.5  # of ten classes: the donor's, not that of a beginning
    again = engine.snapshot("a")
    assert again.trial == found.trial and exploits_of(again) == [
        {"epoch": epoch, "donor": "donor", "donor_epoch": 2, "values": {"optimizer.lr": 1e-9}}
    ]
    schedule = [{"epoch": 0, "values": {"optimizer.lr": 0.2}}, {"epoch": epoch, "values": {"optimizer.lr": 1e-9}}]
    assert again.state["population"]["schedule"] == schedule


def test_a_trial_that_took_nothing_over_is_as_it_was_launched() -> None:
    trial, snapshot = trained(0.2, 1)
    assert in_force(trial, snapshot) is trial and in_force(trial, None) is trial and "population" not in snapshot.state


class TestFiles:
    def test_an_exploit_is_done_once_whoever_asks_again(self, tmp_path: Path) -> None:
        launched, donor = trained(0.2, 2)
        assert save(tmp_path, "donor", donor) == 2
        wanted = exploit(0.16, 2, 2)
        trial, first = going_on(tmp_path, "a", launched, 3, wanted)
        assert first is not None and trial.optimizer.lr == 0.16
        engine = SoloEngine()
        engine.admit("a", trial, first)
        engine.advance()
        engine.snapshot("a").save(snapshot_path(tmp_path, "a"))
        trial, later = going_on(tmp_path, "a", launched, 3, wanted)
        assert later is not None and (later.epoch, trial.optimizer.lr) == (3, 0.16)
        assert going_on(tmp_path, "a", launched, 3)[0] == trial  # another start, without Tune's memory
        assert mutations(tmp_path, "a")["exploits"] == exploits_of(later)

    def test_a_state_that_is_gone_is_not_taken_over(self, tmp_path: Path) -> None:
        launched, _ = trained(0.2, 1)
        assert going_on(tmp_path, "a", launched, 2, exploit(0.16, 2, 2)) == (launched, None) and mutations(tmp_path, "a") == {}

    def test_a_trial_keeps_its_latest_states(self, tmp_path: Path) -> None:
        _, snapshot = trained(0.2, 1)
        for epoch in range(1, 7):
            save(tmp_path, "a", Snapshot(snapshot.trial, 5 * epoch, epoch, snapshot.state))
        assert [epoch for epoch in range(1, 7) if saved_path(tmp_path, "a", epoch).exists()] == list(range(7 - KEPT, 7))

    def test_a_trial_goes_on_from_its_newest_state_that_the_study_knows_of(self, tmp_path: Path) -> None:
        launched, snapshot = trained(0.2, 1)
        snapshot.save(snapshot_path(tmp_path, "a"))
        for epoch in (2, 4):
            save(tmp_path, "a", Snapshot(snapshot.trial, 5 * epoch, epoch, snapshot.state))
        ages = [found.epoch for known in (1, 3, 4) if (found := going_on(tmp_path, "a", launched, known)[1]) is not None]
        assert ages == [1, 2, 4]

    def test_tune_holds_a_reference(self, tmp_path: Path) -> None:
        refer(tmp_path, "b", 4)
        assert exploit_of(tmp_path, {"trial_id": "b"}) is None
        assert exploit_of(tmp_path, {"trial_id": "a", "exploit": {"donor": "b", "epoch": 6}}) == {"donor": "b", "epoch": 6, "donor_epoch": 4}


@pytest.mark.parametrize(
    ("sections", "where", "says"),
    [
        ({"space": {"optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"}}}, "stopping.scheduler", "none of them is tuned"),
        ({"space": {"optimizer.lr": LR, "model.width": {"low": 8, "high": 16}}}, "space.model.width", "differ in lr and decay alone"),
        ({"stopping": {**STOPPING, "within_arm": False}}, "stopping.within_arm", "another arm"),
        ({"stopping": {**STOPPING, "patience": 2}}, "stopping.patience", "stops no trial"),
        ({"stopping": {**STOPPING, "perturbation": 8}}, "stopping.perturbation", "after epoch 8 of 8"),
        ({"stopping": {**STOPPING, "quantile": 0.6}}, "stopping.quantile", "0.5"),
        ({"trials": 1}, "search.trials", "at least 2 trials"),
        ({"replicate": {"top": 2}}, "replicate.top", "not what was trained"),
    ],
)
def test_what_cannot_work_is_said_with_its_place(sections: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**sections)
    (problem,) = caught.value.problems
    assert where in str(problem) and says in str(problem)


@pytest.fixture(scope="module")
def rays() -> Iterator[None]:
    """A Ray for this module's studies: starting one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield
        ray.shutdown()


def launches() -> list[str]:
    return [json.dumps({"optimizer.lr": lr}) for lr in LAUNCHED]


@contextmanager
def interrupted_after_an_exploit(folder: StudyFolder, interrupt: threading.Event) -> Iterator[None]:
    """Ctrl-C as soon as a mutated trial has measured."""
    over = threading.Event()

    def watch() -> None:
        outbox = Outbox(folder.path)
        while not over.wait(0.02):
            if any(EXPLOITS in entry.metrics for entry in outbox.running()):
                interrupt.set()
                break

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()


Before = dict[str, tuple[int, float]]
"""Trials that had been mutated before an interruption: their last epoch, and its learning rate."""

Studied = tuple[Path, StudySpec, Before]


@pytest.fixture(scope="module", params=["solo", "fused"])
def studied(request: pytest.FixtureRequest, rays: None, tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Studied:
    """A finished study: solo with more trials than there is room for, or fused with room for all and interrupted on the way."""
    home, name = prepared(tmp_path_factory.mktemp(request.param) / "home", mlflow_database), request.param
    if name == "solo":
        found = spec(name, trial={**TRIAL, "schedule": {"epochs": 10, "shape": "constant"}}, resources={"engine": name})
        run(found, home=home, enqueue=launches())
        return home, found, {}
    trial = {**TRIAL, "schedule": {"epochs": 60, "shape": "constant"}}
    found = spec(name, trial=trial, stopping={**STOPPING, "perturbation": 10}, resources={"engine": name, "slots": 2})
    with pytest.raises(Interrupted):
        run(found, home=home, watch=interrupted_after_an_exploit, enqueue=launches())
    before = {entry.trial_id: (entry.epoch, entry.metrics["lr"]) for entry in Outbox(home / name).entries() if EXPLOITS in entry.metrics}
    run(found, home=home)
    return home, found, before


class TestStudy:
    def test_every_trial_completes_and_none_measures_a_step_twice(self, studied: Studied) -> None:
        home, found, _ = studied
        all_agree(home, found)
        outbox = Outbox(home / found.name)
        assert {record.outcome for record in outbox.records()} == {"completed"}
        for record in outbox.records():
            assert [seen.step for seen in outbox.history(record.trial_id)] == [5 * epoch for epoch in range(1, found.trial.schedule.epochs + 1)]
        assert not [*(home / found.name).glob("trials/*/saved*"), *(home / found.name).glob("trials/*/snapshot*")]

    def test_those_that_did_not_learn_go_on_with_the_weights_of_those_that_did(self, studied: Studied) -> None:
        home, found, _ = studied
        outbox = Outbox(home / found.name)
        for record in outbox.records():
            seen = outbox.history(record.trial_id)
            (lr,) = [lr for lr in LAUNCHED if math.isclose(lr, record.trial["optimizer"]["lr"])]
            assert seen[0].values["lr"] == lr and record.value is not None and record.value < 0.5
            if lr < 1e-3:
                assert seen[1].values["val/error"] > 0.7 and seen[-1].values["lr"] > 1e-3
                taken = mutations(home / found.name, record.trial_id)["exploits"]
                assert not any(one["epoch"] % found.stopping.perturbation for one in taken) and seen[-1].values[EXPLOITS] == len(taken)
                for one in taken:
                    assert seen[one["epoch"]].values["lr"] == one["values"]["optimizer.lr"]

    def test_mutated_trials_go_on_with_their_values_after_an_interruption(self, studied: Studied) -> None:
        home, found, before = studied
        assert bool(before) == (found.name == "fused")
        for trial_id, (epoch, lr) in before.items():
            later = [one["epoch"] for one in mutations(home / found.name, trial_id)["exploits"] if one["epoch"] >= epoch]
            seen = Outbox(home / found.name).history(trial_id)[epoch : min(later, default=None)]
            assert {each.values["lr"] for each in seen} <= {lr}

    def test_mlflow_and_optuna_say_what_was_launched_and_that_it_was_mutated(self, studied: Studied) -> None:
        home, found, _ = studied
        _, children, client = mlflow_runs(home, found.name)
        mutated = {child.data.tags["study.trial_id"] for child in children if EXPLOITS in child.data.metrics}
        assert len(mutated) >= 2
        for child in children:
            assert any(math.isclose(float(child.data.params["optimizer.lr"]), lr) for lr in LAUNCHED)
            names = {file.path for file in client.list_artifacts(child.info.run_id)}
            assert ("mutations.json" in names) == (child.data.tags["study.trial_id"] in mutated)
        marked = {f"{found.name}-{trial.number:04d}" for trial in told(home, found) if trial.user_attrs.get("mutated")}
        assert marked == mutated

    def test_whoever_uses_the_result_is_warned(self, studied: Studied) -> None:
        home, found, _ = studied
        folder = StudyFolder.find(home, found.name)
        assert "mutated" in {advice.kind for advice in warnings_of(folder, found)}
        best = load_best(found.name, home)
        schedule = mutations(folder.path, best.trial_id).get("schedule", [])
        assert [mutation.model_dump() for mutation in best.mutations] == schedule
        assert bool(export(best, "yaml").warnings) == bool(schedule)
        with pytest.raises(InputError, match="cannot be confirmed"):
            forecast(found.name, 2, home=home)
        heir = check({"name": "heir", "trial": TRIAL, "space": {"optimizer.lr": LR}, "search": {"trials": 4, "from": found.name}})
        assert len(earlier_trials(heir, home)) <= 2
