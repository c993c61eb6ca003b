"""Studies end to end, through real Ray, Optuna and MLflow: what was trained, told and remembered agrees."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from study.errors import AllFail, DataError, ImportFailed, ModelError, NameTaken, TrackingUnavailable
from study.home import StudyFolder
from study.space import arm_label
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.tuning import driver
from study.tuning.driver import StudyResult, run
from tests.conftest import own_environment

TRIAL: dict[str, Any] = {
    "data": {"batch_size": 64, "train_size": 320},
    "model": {"name": "mlp", "width": 16},
    "schedule": {"epochs": 3, "shape": "constant"},
    "trace": {"every": 2},
}
SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-2, "high": 1.0, "log": True},
    "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"},
}
LONG = {**TRIAL, "schedule": {"epochs": 12, "shape": "cosine"}}
"""Of trials that can be interrupted."""

SERIAL: dict[str, Any] = {"resources": {"cpus_per_trial": 2}}
"""One trial at a time, where that is enough: every process of a worker takes seconds to start."""


def spec(
    name: str, *, trial: dict[str, Any] | None = None, space: dict[str, Any] | None = None, trials: int = 4, sampler: str = "random", **sections: Any
) -> StudySpec:
    search = {"sampler": sampler, "trials": trials}
    return check({"name": name, "trial": trial or TRIAL, "space": space or SPACE, "search": search, **sections})


@pytest.fixture(scope="module", autouse=True)
def users_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the workers of this module's Ray find modules; that Ray runs all studies of this process, as starting one takes seconds."""
    folder = tmp_path_factory.mktemp("users_code")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        # The workers inherit this.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield folder
        ray.shutdown()


@pytest.fixture
def home(tmp_path: Path, mlflow_database: Path) -> Path:
    """A study home with an empty MLflow store: making its tables takes seconds, copying them none."""
    return prepared(tmp_path / "home", mlflow_database)


def prepared(home: Path, mlflow_database: Path) -> Path:
    home.mkdir()
    shutil.copy(mlflow_database, home / "mlflow.db")
    return home


def mlflow_runs(home: Path, name: str) -> tuple[Any, list[Any], MlflowClient]:
    """The study's own run, and one for each trial."""
    client = MlflowClient(f"sqlite:///{home.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = (found for found in runs if "mlflow.parentRunId" not in found.data.tags)
    children = [found for found in runs if found.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    return parent, children, client


def told(home: Path, studied: StudySpec) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(home / studied.name / "journal.log")))
    labels = [arm_label(arm) for arm in studied.arms]
    return [trial for label in labels for trial in optuna.load_study(study_name=f"{studied.name}/{label}", storage=storage).get_trials()]


def all_agree(home: Path, studied: StudySpec, trials: int | None = None) -> None:
    """Ledger, journal and MLflow hold the same trials, ended the same way, and none is left running."""
    records = Outbox(home / studied.name).records()
    _, children, client = mlflow_runs(home, studied.name)
    by_tag = {child.data.tags["study.trial_id"]: child for child in children}
    assert len(by_tag) == len(children) == len(records) == (trials or studied.search.trials)
    status = {"completed": "FINISHED", "stopped": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
    for record in records:
        child = by_tag[record.trial_id]
        assert child.info.status == status[record.outcome]
        assert child.data.tags["study.outcome"] == record.outcome
        assert all(math.isfinite(value) and abs(value) < 1e300 for value in child.data.metrics.values())
        for metric in child.data.metrics:
            steps = [point.step for point in client.get_metric_history(child.info.run_id, metric)]
            assert len(steps) == len(set(steps)), metric
    states = [trial.state for trial in told(home, studied)]
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states
    outcomes = [record.outcome for record in records if not record.replicate_of]
    assert states.count(TrialState.COMPLETE) == outcomes.count("completed")
    assert states.count(TrialState.PRUNED) == outcomes.count("stopped") + outcomes.count("diverged")
    assert states.count(TrialState.FAIL) == outcomes.count("failed")


def test_a_study_is_trained_told_and_remembered(home: Path) -> None:
    studied = spec("whole", trials=6, stopping={"scheduler": "asha", "grace": 1, "reduction": 2})
    result = run(studied, home=home)
    all_agree(home, studied)
    assert result.best is not None
    assert set(result.trials["trial_id"]) == {f"whole-{number:04d}" for number in range(6)}
    parent, children, client = mlflow_runs(home, "whole")
    assert (parent.info.status, parent.data.tags["study.id"]) == ("FINISHED", result.study_id)
    assert {"spec.yaml", "trials.parquet", "best.yaml", "environment.json", "model.safetensors"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }
    completed = [child for child in children if child.data.tags["study.outcome"] == "completed"]
    assert completed
    for child in completed:
        assert child.data.params["optimizer.gamma"] in ("none", "all")
        assert len(child.data.tags["study.plan_hash"]) == 64
        for layer in ("layer1.linear", "layer2.linear", "head"):
            for metric in ("effective_lr", "rotation", "weight_norm"):
                assert len(client.get_metric_history(child.info.run_id, f"{metric}/{layer}")) > 5
        trace = pd.read_parquet(client.download_artifacts(child.info.run_id, "trace.parquet", str(home)))
        assert sorted(trace["step"].unique()) == list(range(2, 16, 2))
    stopped = [child for child in children if child.data.tags["study.outcome"] == "stopped"]
    assert {child.data.tags["study.stop_reason"] for child in stopped} <= {"scheduler"}
    best = result.best
    assert best.objective.value == min(child.data.metrics["val/error"] for child in completed)
    assert not list((home / "whole" / "trials").glob("*/snapshot*"))


def test_claims_are_tested_at_the_end_and_later_ones_on_the_same_trials(home: Path) -> None:
    """One seed is too few for any verdict; a claim that cannot be tested costs the study nothing, and one that is removed leaves nothing behind."""
    slope = {"says": "It grows.", "slope": {"y": "final/val/error", "x": "optimizer.lr"}, "expect": {"above": 0}}
    paired = {"metric": "final/val/error", "arm": "optimizer.gamma", "a": "all", "b": "none", "paired_by": "seed"}
    claims = [{"id": "first", **slope}, {"id": "untestable", "says": "It helps.", "contrast": paired, "expect": {"below": 0}}]
    result = run(spec("claims", trials=6, claims=claims[:1], **SERIAL), home=home)
    assert set(result.trials["equilibrated"]) <= {False, True}
    parent, children, client = mlflow_runs(home, "claims")
    assert parent.data.tags["study.claim.first"] == "inconclusive"
    again = run(spec("claims", trials=6, claims=[*claims, {"id": "later", **slope}], **SERIAL), home=home)
    assert again.study_id == result.study_id and len(again.trials) == 6
    parent, after, client = mlflow_runs(home, "claims")
    assert (parent.info.status, len(after)) == ("FINISHED", len(children))
    assert parent.data.tags["study.claim.later"] == "inconclusive" and "study.claim.untestable" not in parent.data.tags
    kept = json.loads(Path(client.download_artifacts(parent.info.run_id, "claims.json", str(home))).read_text())
    assert [claim["id"] for claim in kept["claims"]] == ["first", "later"] and kept["tested"] == 2
    assert kept == json.loads((home / "claims" / "claims.json").read_text())
    for left in ([{"id": "later", **slope}], []):
        run(spec("claims", trials=6, claims=left, **SERIAL), home=home)
        parent, _, client = mlflow_runs(home, "claims")
        assert [name for name in parent.data.tags if name.startswith("study.claim.")] == [f"study.claim.{claim['id']}" for claim in left]
        kept = json.loads(Path(client.download_artifacts(parent.info.run_id, "claims.json", str(home))).read_text())
        assert [claim["id"] for claim in kept["claims"]] == [claim["id"] for claim in left]


def test_claims_that_mlflow_could_not_be_told_are_told_by_the_next_call(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = {"id": "late", "says": "It grows.", "slope": {"y": "final/val/error", "x": "optimizer.lr"}, "expect": {"above": 0}}
    run(spec("told", trials=2, **SERIAL), home=home)

    def away(*told: object) -> None:
        raise TrackingUnavailable("the tracking store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "add_to_run", away)
        with pytest.raises(TrackingUnavailable):
            run(spec("told", trials=2, claims=[claim], **SERIAL), home=home)
    run(spec("told", trials=2, claims=[claim], **SERIAL), home=home)
    parent, _, _ = mlflow_runs(home, "told")
    assert parent.data.tags["study.claim.late"] == "inconclusive"


def values_of(trials: pd.DataFrame) -> dict[str, float]:
    return dict(sorted(trials.set_index("trial_id")["value"].to_dict().items()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> pd.DataFrame:
    """The trials of the study that others extend and interrupt, when nobody does, one after the other."""
    home = prepared(tmp_path_factory.mktemp("undisturbed") / "home", mlflow_database)
    return run(spec("cut", trial=LONG, trials=6, **SERIAL), home=home).trials


@pytest.fixture(scope="module")
def in_two_parts(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> tuple[Path, StudyResult, StudyResult]:
    """A study of two trials, one after the other, and the same study given more of them, side by side."""
    home = prepared(tmp_path_factory.mktemp("in_two_parts") / "home", mlflow_database)
    first = run(spec("cut", trial=LONG, trials=2, **SERIAL), home=home)
    ledger = (home / "cut" / "outbox.sqlite").stat().st_mtime_ns
    again = run(spec("cut", trial=LONG, trials=2, **SERIAL), home=home)
    assert again.best == first.best and (home / "cut" / "outbox.sqlite").stat().st_mtime_ns == ledger
    return home, first, run(spec("cut", trial=LONG, trials=6), home=home)


def test_a_finished_study_is_not_run_again_but_can_be_given_more_trials(in_two_parts: tuple[Path, StudyResult, StudyResult]) -> None:
    home, first, longer = in_two_parts
    all_agree(home, spec("cut", trial=LONG, trials=6))
    assert longer.study_id == first.study_id
    pd.testing.assert_series_equal(longer.trials["value"][:2], first.trials["value"])


def test_the_same_seed_gives_the_same_values_twice(undisturbed: pd.DataFrame, in_two_parts: tuple[Path, StudyResult, StudyResult]) -> None:
    """Also when trials run side by side, and when they were asked for in two parts."""
    columns = ["trial_id", "value", "optimizer.lr", "val/loss"]
    tables = (trials.sort_values("trial_id")[columns].reset_index(drop=True) for trials in (undisturbed, in_two_parts[2].trials))
    pd.testing.assert_frame_equal(*tables)


def test_a_space_that_reaches_into_divergence_finishes_with_a_finite_best(home: Path) -> None:
    trial = {**TRIAL, "model": {"name": "mlp", "norm": "none", "width": 16}}
    space = {"optimizer.lr": {"low": 1e-2, "high": 1e4, "log": True}}
    studied = spec("cliff", trial=trial, space=space, trials=12, objective={"metric": "val/loss"}, **SERIAL)
    result = run(studied, home=home)
    all_agree(home, studied)
    outcomes = result.trials.set_index("trial_id")["outcome"]
    assert (outcomes == "diverged").sum() >= 2
    assert result.best is not None and math.isfinite(result.best.objective.value)
    assert outcomes[result.best.trial_id] == "completed"
    _, children, _ = mlflow_runs(home, "cliff")
    reasons = {child.data.tags["study.divergence"] for child in children if child.data.tags["study.outcome"] == "diverged"}
    assert reasons <= {"nan", "inf", "exploded"} and reasons


def test_an_error_in_the_users_code_fails_that_trial_and_keeps_its_traceback(users_code: Path, tmp_path: Path, home: Path) -> None:
    (users_code / "brittle.py").write_text(
        "def metric(logits, labels):\n    if logits.element_size() == 8:\n        raise ArithmeticError('too precise')\n    return 0.0\n"
    )
    trial = {**TRIAL, "metrics": ["import:brittle:metric"]}
    studied = spec("brittle", trial=trial, space={"precision": {"choices": ["float32", "float64"]}}, trials=2, sampler="grid", **SERIAL)
    run(studied, home=home)
    all_agree(home, studied)
    _, children, client = mlflow_runs(home, "brittle")
    completed, failed = sorted(children, key=lambda child: child.data.tags["study.trial_id"])
    assert (completed.data.tags["study.outcome"], failed.data.tags["study.outcome"]) == ("completed", "failed")
    text = Path(client.download_artifacts(failed.info.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "too precise" in text and "brittle.py" in text


def test_a_study_whose_first_trials_all_fail_alike_stops_and_says_where_to_look(users_code: Path, home: Path) -> None:
    (users_code / "hopeless.py").write_text("def metric(logits, labels):\n    raise ArithmeticError('never')\n")
    studied = spec("hopeless", trial={**TRIAL, "metrics": ["import:hopeless:metric"]}, trials=12, **SERIAL)
    with pytest.raises(AllFail, match=r"first 3 trials all failed alike \(user-code: .*ArithmeticError: never.*\); see .*traceback\.txt") as caught:
        run(studied, home=home)
    assert caught.value.exit_code == 1
    records = Outbox(home / "hopeless").records()
    assert 3 <= [record.outcome for record in records].count("failed") < 12
    assert {(record.outcome, record.reason) for record in records} <= {("failed", "user-code"), ("interrupted", "")}
    parent, children, _ = mlflow_runs(home, "hopeless")
    assert (parent.info.status, len(children)) == ("FAILED", len(records))
    assert {child.data.tags.get("study.failure") for child in children if child.info.status == "FAILED"} == {"user-code"}
    assert StudyFolder(home / "hopeless").card().state == "failed"


def test_the_budget_ends_trials_as_stopped_and_the_study_cleanly(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's clock stands still until a trial is under way, and then the budget is spent."""
    studied = spec("short", trial={**TRIAL, "schedule": {"epochs": 5000, "shape": "constant"}}, trials=2, budget={"wall": 3600}, **SERIAL)
    outbox = Outbox(home / "short")
    monkeypatch.setattr("study.tuning.hosting.time", SimpleNamespace(monotonic=lambda: 7200.0 * any(entry.epoch for entry in outbox.entries())))
    result = run(studied, home=home)
    all_agree(home, studied, trials=len(result.trials))
    assert result.best is None and result.trials["epoch"].max() >= 1
    assert set(result.trials["outcome"]) == {"stopped"} and set(result.trials["reason"]) == {"budget"}
    parent, _, _ = mlflow_runs(home, "short")
    assert parent.info.status == "FAILED"


class TestNothingStarts:
    """What cannot work is said before any trial is started, and leaves no run in MLflow."""

    def nothing_started(self, home: Path, name: str) -> None:
        assert Outbox(home / name).entries() == []

    def test_when_the_tracking_server_is_down(self, home: Path) -> None:
        with pytest.raises(TrackingUnavailable, match=r"http://127\.0\.0\.1:9"):
            run(spec("down"), home=home, tracking_uri="http://127.0.0.1:9")
        self.nothing_started(home, "down")

    def test_when_the_name_belongs_to_another_study(self, home: Path) -> None:
        StudyFolder.prepare(home, spec("taken")).update(run_id="0" * 32, state="running")
        with pytest.raises(NameTaken, match=r"another trial, space.*'taken'.*another name"):
            run(spec("taken", trial={**TRIAL, "seed": 7}), home=home)
        self.nothing_started(home, "taken")

    def test_when_the_policy_names_gains_that_the_model_has_not(self, home: Path) -> None:
        space = {"optimizer.gamma": {"choices": ["none", "down"], "role": "scientific"}}
        with pytest.raises(ModelError, match="no gain at down"):
            run(spec("gone", space=space), home=home)
        self.nothing_started(home, "gone")

    def test_when_the_data_has_too_few_images(self, home: Path) -> None:
        with pytest.raises(DataError, match="batch"):
            run(spec("few", trial={**TRIAL, "data": {"train_size": 10}}), home=home)
        self.nothing_started(home, "few")
        assert StudyFolder.prepare(home, spec("few")).card().spec_hash == spec("few").spec_hash(), "the name is free for a corrected spec"

    def test_when_an_import_fails(self, home: Path) -> None:
        with pytest.raises(ImportFailed, match="no_such_package"):
            run(spec("lost", trial={**TRIAL, "model": {"name": "import:no_such_package:net"}}), home=home)
        self.nothing_started(home, "lost")


USERS_METRIC = """
import time
from pathlib import Path
from study.tuning import trainables

trainables.SNAPSHOT_SECONDS = 0.0

def metric(logits, labels):
    with (Path(__file__).parent / "epochs").open("a") as epochs:
        epochs.write("one more\\n")
    if (Path(__file__).parent / "slow").exists():
        time.sleep(0.2)
    return 0.0
"""
"""Counts all epochs, makes them slow while a file is there, so that there is something to interrupt, and has snapshots taken after each."""


def start(folder: Path) -> subprocess.Popen[str]:
    """`study run spec.yaml` in a folder, in a process group of its own."""
    command = [sys.executable, "-m", "study", "run", "spec.yaml", "--home", "home"]
    return subprocess.Popen(
        command, cwd=folder, env=own_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until_completed(outbox: Outbox, number: int, process: subprocess.Popen[str]) -> None:
    """Until so many trials have completed and another one is well under way."""
    deadline = time.monotonic() + 120
    while completed(outbox) < number or not any(entry.epoch >= 3 for entry in outbox.running()):
        assert time.monotonic() < deadline, "the study hangs"
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the study ended first: {process.communicate()[0]}")


def completed(outbox: Outbox) -> int:
    return [record.outcome for record in outbox.records()].count("completed")


def test_an_interrupted_study_goes_on_where_it_stopped(users_code: Path, mlflow_database: Path, undisturbed: pd.DataFrame) -> None:
    """Ctrl-C, then the sudden death of the driver: every trial ends with one run and the value of an undisturbed study."""
    home = prepared(users_code / "home", mlflow_database)
    (users_code / "mine.py").write_text(USERS_METRIC)
    (users_code / "slow").touch()
    studied = spec("cut", trial={**LONG, "metrics": ["import:mine:metric"]}, trials=6)
    (users_code / "spec.yaml").write_text(studied.to_yaml())
    outbox, folder = Outbox(home / "cut"), StudyFolder(home / "cut")

    process = start(users_code)
    wait_until_completed(outbox, 2, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 130, said
    assert "go on with: study run spec.yaml --home home" in said
    _, children, _ = mlflow_runs(home, "cut")
    assert {child.info.status for child in children} == {"FINISHED", "KILLED"}
    assert "interrupted" in {child.data.tags["study.outcome"] for child in children}
    assert folder.card().state == "interrupted"

    process = start(users_code)
    wait_until_completed(outbox, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert folder.card().state == "interrupted"

    (users_code / "slow").unlink()
    result = run(studied, home=home)
    all_agree(home, studied)
    assert values_of(result.trials) == values_of(undisturbed)
    # Each interruption costs each of two running trials the epoch that was under way, no more.
    assert (users_code / "epochs").read_text().count("\n") <= 6 * 12 + 4
