"""Studies end to end, through real Ray, Optuna and MLflow: what was trained, told and remembered agrees."""

import json
import math
import os
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


def spec(name: str, *, trial: dict[str, Any] | None = None, space: dict[str, Any] | None = None, trials: int = 4, **sections: Any) -> StudySpec:
    search = {"sampler": "random", "trials": trials}
    return check({"name": name, "trial": trial or TRIAL, "space": space or SPACE, "search": search, **sections})


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all studies of this module: starting it takes seconds."""
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


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


def all_agree(home: Path, studied: StudySpec) -> None:
    """Ledger, journal and MLflow hold the same trials, ended the same way, and none is left running."""
    records = Outbox(home / studied.name).records()
    _, children, client = mlflow_runs(home, studied.name)
    by_tag = {child.data.tags["study.trial_id"]: child for child in children}
    assert len(by_tag) == len(children) == len(records) == studied.search.trials
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


def test_a_study_is_trained_told_and_remembered(tmp_path: Path) -> None:
    studied = spec("whole", trials=6, stopping={"scheduler": "asha", "grace": 1, "reduction": 2})
    result = run(studied, home=tmp_path)
    all_agree(tmp_path, studied)
    assert result.best is not None
    assert set(result.trials["trial_id"]) == {f"whole-{number:04d}" for number in range(6)}
    parent, children, client = mlflow_runs(tmp_path, "whole")
    assert (parent.info.status, parent.data.tags["study.id"]) == ("FINISHED", result.study_id)
    assert {"spec.yaml", "trials.parquet", "best.yaml", "environment.json", "model.safetensors"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    completed = [child for child in children if child.data.tags["study.outcome"] == "completed"]
    assert completed
    for child in completed:
        assert child.data.params["optimizer.gamma"] in ("none", "all")
        for layer in ("layer1.linear", "layer2.linear", "head"):
            for metric in ("effective_lr", "rotation", "weight_norm"):
                assert len(client.get_metric_history(child.info.run_id, f"{metric}/{layer}")) > 5
        trace = pd.read_parquet(client.download_artifacts(child.info.run_id, "trace.parquet", str(tmp_path)))
        assert sorted(trace["step"].unique()) == list(range(2, 16, 2))
    stopped = [child for child in children if child.data.tags["study.outcome"] == "stopped"]
    assert {child.data.tags["study.stop_reason"] for child in stopped} <= {"scheduler"}
    best = result.best
    assert best.objective.value == min(child.data.metrics["val/error"] for child in completed)
    assert not list((tmp_path / "whole" / "trials").glob("*/snapshot*"))


def test_the_same_seed_gives_the_same_values_twice(tmp_path: Path) -> None:
    studied = spec("twin")
    first, second = run(studied, home=tmp_path / "a"), run(studied, home=tmp_path / "b")
    columns = ["trial_id", "value", "optimizer.lr", "val/loss"]
    pd.testing.assert_frame_equal(*(result.trials.sort_values("trial_id")[columns].reset_index(drop=True) for result in (first, second)))


def test_a_space_that_reaches_into_divergence_finishes_with_a_finite_best(tmp_path: Path) -> None:
    trial = {**TRIAL, "model": {"name": "mlp", "norm": "none", "width": 16}}
    space = {"optimizer.lr": {"low": 1e-2, "high": 1e4, "log": True}}
    studied = spec("cliff", trial=trial, space=space, trials=12, objective={"metric": "val/loss"})
    result = run(studied, home=tmp_path)
    all_agree(tmp_path, studied)
    outcomes = result.trials.set_index("trial_id")["outcome"]
    assert (outcomes == "diverged").sum() >= 2
    assert result.best is not None and math.isfinite(result.best.objective.value)
    assert outcomes[result.best.trial_id] == "completed"
    _, children, _ = mlflow_runs(tmp_path, "cliff")
    reasons = {child.data.tags["study.divergence"] for child in children if child.data.tags["study.outcome"] == "diverged"}
    assert reasons <= {"nan", "inf", "exploded"} and reasons


def test_an_error_in_the_users_code_fails_that_trial_and_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brittle.py").write_text(
        "def metric(logits, labels):\n    if logits.abs().max() > 8:\n        raise ArithmeticError('too sure of itself')\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    studied = spec("brittle", trial={**TRIAL, "metrics": ["import:brittle:metric"]}, space={"optimizer.lr": {"choices": [1e-3, 50.0]}}, trials=2)
    studied = studied.model_copy(update={"search": studied.search.model_copy(update={"sampler": "grid"})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        result = run_in_its_own_process(studied, tmp_path)
    outcomes = {row["trial_id"]: row["outcome"] for row in result}
    assert outcomes == {"brittle-0000": "completed", "brittle-0001": "failed"}
    all_agree(tmp_path / "home", studied)
    _, children, client = mlflow_runs(tmp_path / "home", "brittle")
    (failed,) = (child for child in children if child.data.tags["study.outcome"] == "failed")
    text = Path(client.download_artifacts(failed.info.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "too sure of itself" in text and "brittle.py" in text


def run_in_its_own_process(studied: StudySpec, folder: Path) -> list[dict[str, Any]]:
    (folder / "spec.yaml").write_text(studied.to_yaml())
    done = subprocess.run([sys.executable, "-m", "study", "run", "spec.yaml", "--home", "home"], cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(pd.read_parquet(folder / "home" / studied.name / "trials.parquet").to_dict("records"))


def environment() -> dict[str, str]:
    here = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}


def test_the_budget_ends_trials_as_stopped_and_the_study_cleanly(tmp_path: Path) -> None:
    trial = {**TRIAL, "schedule": {"epochs": 5000, "shape": "constant"}}
    studied = spec("short", trial=trial, trials=2, budget={"wall": 6})
    result = run(studied, home=tmp_path)
    all_agree(tmp_path, studied)
    assert result.best is None
    assert set(result.trials["outcome"]) == {"stopped"} and set(result.trials["reason"]) == {"budget"}
    parent, _, _ = mlflow_runs(tmp_path, "short")
    assert parent.info.status == "FAILED"


def test_a_finished_study_is_not_run_again_but_can_be_given_more_trials(tmp_path: Path) -> None:
    first = run(spec("more", trials=2), home=tmp_path)
    ledger = (tmp_path / "more" / "outbox.sqlite").stat().st_mtime_ns
    again = run(spec("more", trials=2), home=tmp_path)
    assert again.best == first.best and (tmp_path / "more" / "outbox.sqlite").stat().st_mtime_ns == ledger
    longer = run(spec("more", trials=4), home=tmp_path)
    all_agree(tmp_path, spec("more", trials=4))
    assert longer.study_id == first.study_id
    pd.testing.assert_series_equal(longer.trials["value"][:2], first.trials["value"])


class TestNothingStarts:
    """What cannot work is said before any trial is started, and leaves no run in MLflow."""

    def nothing_started(self, home: Path, name: str) -> None:
        assert Outbox(home / name).entries() == []

    def test_when_the_tracking_server_is_down(self, tmp_path: Path) -> None:
        with pytest.raises(TrackingUnavailable, match=r"http://127\.0\.0\.1:9"):
            run(spec("down"), home=tmp_path, tracking_uri="http://127.0.0.1:9")
        self.nothing_started(tmp_path, "down")

    def test_when_the_name_belongs_to_another_study(self, tmp_path: Path) -> None:
        StudyFolder.prepare(tmp_path, spec("taken"))
        with pytest.raises(NameTaken, match=r"another trial, space.*'taken'.*another name"):
            run(spec("taken", trial={**TRIAL, "seed": 7}), home=tmp_path)
        self.nothing_started(tmp_path, "taken")

    def test_when_the_policy_names_gains_that_the_model_has_not(self, tmp_path: Path) -> None:
        space = {"optimizer.gamma": {"choices": ["none", "down"], "role": "scientific"}}
        with pytest.raises(ModelError, match="no gain at down"):
            run(spec("gone", space=space), home=tmp_path)
        self.nothing_started(tmp_path, "gone")

    def test_when_the_data_has_too_few_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="batch"):
            run(spec("few", trial={**TRIAL, "data": {"train_size": 10}}), home=tmp_path)
        self.nothing_started(tmp_path, "few")

    def test_when_an_import_fails(self, tmp_path: Path) -> None:
        with pytest.raises(ImportFailed, match="no_such_package"):
            run(spec("lost", trial={**TRIAL, "model": {"name": "import:no_such_package:net"}}), home=tmp_path)
        self.nothing_started(tmp_path, "lost")


LONG = {**TRIAL, "model": {"name": "mlp", "width": 64}, "data": {"batch_size": 16}, "schedule": {"epochs": 25, "shape": "cosine"}, "trace": {"every": 50}}


def start(folder: Path, home: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "study", "run", "spec.yaml", "--home", home]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_until_ended(ledger: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until so many trials have ended and another one is under way."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        outbox = Outbox(ledger)
        if ledger.joinpath("outbox.sqlite").exists() and len(outbox.records()) >= number and any(entry.epoch for entry in outbox.running()):
            return
        outbox.close()
        time.monotonic()
    raise AssertionError(f"the study ended or hung first: {process.communicate(timeout=5)[0] if process.poll() is not None else ''}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_study_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    """Ctrl-C, or the sudden death of the driver: every trial ends with one run and the value of an undisturbed study."""
    studied = spec("cut", trial=LONG, trials=6)
    (tmp_path / "spec.yaml").write_text(studied.to_yaml())
    process = start(tmp_path, "home")
    wait_until_ended(tmp_path / "home" / "cut", 2, process)
    if name == "SIGINT":
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 130, said
        assert "the same command continues it" in said
        _, children, _ = mlflow_runs(tmp_path / "home", "cut")
        assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}
        interrupted = [child for child in children if child.data.tags["study.outcome"] == "interrupted"]
        assert interrupted
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert StudyFolder(tmp_path / "home" / "cut").card().state == "interrupted"
    resumed = start(tmp_path, "home")
    said, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, said
    all_agree(tmp_path / "home", studied)
    undisturbed = run(studied, home=tmp_path / "undisturbed").trials.set_index("trial_id")["value"]
    values = pd.read_parquet(tmp_path / "home" / "cut" / "trials.parquet").set_index("trial_id")["value"]
    assert json.loads(values.sort_index().to_json()) == json.loads(undisturbed.sort_index().to_json())
