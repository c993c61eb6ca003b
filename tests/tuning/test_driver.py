"""Studies end to end, through real Ray, Optuna and MLflow: what was trained, told and remembered agrees."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from study.errors import DataError, ImportFailed, ModelError, NameTaken, TrackingUnavailable
from study.home import StudyFolder
from study.space import arm_label
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.tuning.driver import run

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


def spec(
    name: str, *, trial: dict[str, Any] | None = None, space: dict[str, Any] | None = None, trials: int = 4, sampler: str = "random", **sections: Any
) -> StudySpec:
    search = {"sampler": sampler, "trials": trials}
    return check({"name": name, "trial": trial or TRIAL, "space": space or SPACE, "search": search, **sections})


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all studies of this module: starting it takes seconds."""
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
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
    outcomes = [record.outcome for record in records]
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


def test_the_same_seed_gives_the_same_values_twice(tmp_path: Path, mlflow_database: Path) -> None:
    studied = spec("twin")
    first, second = (run(studied, home=prepared(tmp_path / home, mlflow_database)) for home in ("a", "b"))
    columns = ["trial_id", "value", "optimizer.lr", "val/loss"]
    pd.testing.assert_frame_equal(*(result.trials.sort_values("trial_id")[columns].reset_index(drop=True) for result in (first, second)))


def test_a_space_that_reaches_into_divergence_finishes_with_a_finite_best(home: Path) -> None:
    trial = {**TRIAL, "model": {"name": "mlp", "norm": "none", "width": 16}}
    space = {"optimizer.lr": {"low": 1e-2, "high": 1e4, "log": True}}
    studied = spec("cliff", trial=trial, space=space, trials=12, objective={"metric": "val/loss"})
    result = run(studied, home=home)
    all_agree(home, studied)
    outcomes = result.trials.set_index("trial_id")["outcome"]
    assert (outcomes == "diverged").sum() >= 2
    assert result.best is not None and math.isfinite(result.best.objective.value)
    assert outcomes[result.best.trial_id] == "completed"
    _, children, _ = mlflow_runs(home, "cliff")
    reasons = {child.data.tags["study.divergence"] for child in children if child.data.tags["study.outcome"] == "diverged"}
    assert reasons <= {"nan", "inf", "exploded"} and reasons


def test_an_error_in_the_users_code_fails_that_trial_and_keeps_its_traceback(tmp_path: Path, home: Path) -> None:
    (tmp_path / "brittle.py").write_text(
        "def metric(logits, labels):\n    if logits.element_size() == 8:\n        raise ArithmeticError('too precise')\n    return 0.0\n"
    )
    trial = {**TRIAL, "metrics": ["import:brittle:metric"]}
    studied = spec("brittle", trial=trial, space={"precision": {"choices": ["float32", "float64"]}}, trials=2, sampler="grid")
    (tmp_path / "spec.yaml").write_text(studied.to_yaml())
    process = start(tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    all_agree(home, studied)
    _, children, client = mlflow_runs(home, "brittle")
    completed, failed = sorted(children, key=lambda child: child.data.tags["study.trial_id"])
    assert (completed.data.tags["study.outcome"], failed.data.tags["study.outcome"]) == ("completed", "failed")
    text = Path(client.download_artifacts(failed.info.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "too precise" in text and "brittle.py" in text


def environment() -> dict[str, str]:
    here = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}


def test_the_budget_ends_trials_as_stopped_and_the_study_cleanly(home: Path) -> None:
    trial = {**TRIAL, "schedule": {"epochs": 5000, "shape": "constant"}}
    studied = spec("short", trial=trial, trials=2, budget={"wall": 6})
    result = run(studied, home=home)
    all_agree(home, studied, trials=len(result.trials))
    assert result.best is None and len(result.trials) >= 1
    assert set(result.trials["outcome"]) == {"stopped"} and set(result.trials["reason"]) == {"budget"}
    parent, _, _ = mlflow_runs(home, "short")
    assert parent.info.status == "FAILED"


def test_a_finished_study_is_not_run_again_but_can_be_given_more_trials(home: Path) -> None:
    first = run(spec("more", trials=2), home=home)
    ledger = (home / "more" / "outbox.sqlite").stat().st_mtime_ns
    again = run(spec("more", trials=2), home=home)
    assert again.best == first.best and (home / "more" / "outbox.sqlite").stat().st_mtime_ns == ledger
    longer = run(spec("more", trials=4), home=home)
    all_agree(home, spec("more", trials=4))
    assert longer.study_id == first.study_id
    pd.testing.assert_series_equal(longer.trials["value"][:2], first.trials["value"])


class TestNothingStarts:
    """What cannot work is said before any trial is started, and leaves no run in MLflow."""

    def nothing_started(self, home: Path, name: str) -> None:
        assert Outbox(home / name).entries() == []

    def test_when_the_tracking_server_is_down(self, home: Path) -> None:
        with pytest.raises(TrackingUnavailable, match=r"http://127\.0\.0\.1:9"):
            run(spec("down"), home=home, tracking_uri="http://127.0.0.1:9")
        self.nothing_started(home, "down")

    def test_when_the_name_belongs_to_another_study(self, home: Path) -> None:
        StudyFolder.prepare(home, spec("taken"))
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

    def test_when_an_import_fails(self, home: Path) -> None:
        with pytest.raises(ImportFailed, match="no_such_package"):
            run(spec("lost", trial={**TRIAL, "model": {"name": "import:no_such_package:net"}}), home=home)
        self.nothing_started(home, "lost")


LONG = {**TRIAL, "data": {"batch_size": 16}, "schedule": {"epochs": 15, "shape": "cosine"}, "trace": {"every": 50}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> dict[str, float]:
    """What the trials of the interrupted study are worth when nothing interrupts it."""
    home = prepared(tmp_path_factory.mktemp("undisturbed") / "home", mlflow_database)
    return values_of(run(spec("cut", trial=LONG, trials=6), home=home).trials)


def values_of(trials: pd.DataFrame) -> dict[str, float]:
    return dict(sorted(trials.set_index("trial_id")["value"].to_dict().items()))


def start(folder: Path) -> subprocess.Popen[str]:
    """`study run spec.yaml` in a folder, in a process group of its own."""
    command = [sys.executable, "-m", "study", "run", "spec.yaml", "--home", "home"]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until_ended(ledger: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until so many trials have ended and another one is under way."""
    outbox, deadline = Outbox(ledger), time.monotonic() + 120
    while len(outbox.records()) < number or not any(entry.epoch for entry in outbox.running()):
        assert time.monotonic() < deadline, "the study hangs"
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the study ended first: {process.communicate()[0]}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_study_goes_on_where_it_stopped(name: str, tmp_path: Path, home: Path, undisturbed: dict[str, float]) -> None:
    """Ctrl-C, or the sudden death of the driver: every trial ends with one run and the value of an undisturbed study."""
    studied = spec("cut", trial=LONG, trials=6)
    (tmp_path / "spec.yaml").write_text(studied.to_yaml())
    process = start(tmp_path)
    wait_until_ended(home / "cut", 2, process)
    if name == "SIGINT":
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 130, said
        assert "go on with: study run spec.yaml --home home" in said
        _, children, _ = mlflow_runs(home, "cut")
        assert {child.info.status for child in children} == {"FINISHED", "KILLED"}
        assert "interrupted" in {child.data.tags["study.outcome"] for child in children}
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert StudyFolder(home / "cut").card().state == "interrupted"
    resumed = start(tmp_path)
    said, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, said
    all_agree(home, studied)
    assert values_of(pd.read_parquet(home / "cut" / "trials.parquet")) == undisturbed
