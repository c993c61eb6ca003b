"""What a user finds in MLflow after the quickstart, read through MLflow's own client: from the SQLite file, and from a real server."""

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import study
from study.measurement import LayerSample, Outcome
from study.trial import TrialSpec

SPEC = study.load_spec(Path(__file__).parents[1] / "search_spaces/quickstart.yaml")

STATUS = {"completed": "FINISHED", "stopped": "KILLED", "diverged": "FAILED"}

STEPS_PER_EPOCH = 1437 // 64
"""1,797 digits, a fifth of them for validation, in batches of 64."""

SERIES = {"train/loss", "train/error", "val/loss", "val/error", "lr", "weight_decay", "intrinsic_lr"}
MEDIANS = {"effective_lr/median", "rotation/median", "rotation_ratio/median"}
LAYERS = {"stem.conv", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.conv", "head"}
PLACES = {"stem", "inner", "last", "down"}
TAGS = {"study.name", "study.id", "study.spec_hash", "study.git_commit", "study.engine"}
NAMES = {
    *SERIES,
    *MEDIANS,
    *(f"{quantity}/{layer}" for quantity in ("effective_lr", "rotation", "weight_norm") for layer in LAYERS),
    *(f"gamma_rms/{place}" for place in PLACES),
    *(f"final/{name}" for name in SERIES | MEDIANS),
    *(f"final/{quantity}/{layer}" for quantity in ("effective_lr", "rotation") for layer in LAYERS),
    *(f"final/rotation_ratio/{layer}" for layer in LAYERS - {"head"}),
    *(f"final/gamma_rms/{place}" for place in PLACES),
    "final/equilibrated",
    "best/val/error",
}


@pytest.fixture(scope="module", params=["sqlite", "server"])
def client(request: pytest.FixtureRequest, quickstart_home: Path) -> Iterator[Any]:
    """MLflow's own client, on the file itself or on a server in front of it."""
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if request.param == "sqlite":
            yield MlflowClient(tracking_uri=f"sqlite:///{quickstart_home}/mlflow.db")
        else:
            yield MlflowClient(tracking_uri=request.getfixturevalue("quickstart_server"))


@pytest.fixture(scope="module")
def runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("quickstart")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    assert not found.token
    return list(found)


@pytest.fixture(scope="module")
def parent(runs: list[Any]) -> Any:
    (only,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    return only


@pytest.fixture(scope="module")
def children(runs: list[Any]) -> list[Any]:
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


@pytest.fixture(scope="module")
def completed(children: list[Any]) -> list[Any]:
    return [run for run in children if run.data.tags["study.outcome"] == "completed"]


@pytest.fixture(scope="module")
def table(quickstart_home: Path) -> pd.DataFrame:
    """The study's own table of trials."""
    return pd.read_parquet(quickstart_home / "quickstart" / "trials.parquet").set_index("trial_id")


def searched(children: list[Any]) -> list[Any]:
    """The runs of the search's own trials."""
    return [run for run in children if "study.replicate_of" not in run.data.tags]


def artifacts(client: Any, run: Any) -> set[str]:
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def test_every_trial_has_exactly_one_run_below_the_study(runs: list[Any], parent: Any, children: list[Any]) -> None:
    assert len(runs) == 1 + len(children)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    names = sorted(run.data.tags["study.trial_id"] for run in searched(children))
    assert names == [f"quickstart-{number:04d}" for number in range(SPEC.search.trials)]


def test_the_best_of_each_arm_are_trained_again_with_the_same_seeds(children: list[Any]) -> None:
    again = [run for run in children if run not in searched(children)]
    tops = {run.data.tags["study.replicate_of"] for run in again}
    assert len(tops) == SPEC.replicate.top * len(SPEC.arms)
    for run in again:
        assert run.data.tags["study.trial_id"].startswith(f"{run.data.tags['study.replicate_of']}-r")
    pairs = {(run.data.tags["study.trial_id"].rpartition("-")[2], run.data.params["seed"], run.data.params["data.seed"]) for run in again}
    assert len(pairs) == len({number for number, *_ in pairs}) == (len(again) // len(tops) if tops else 0)


def test_the_study_is_a_finished_run_with_its_question_and_its_files(client: Any, parent: Any) -> None:
    assert (parent.info.run_name, parent.info.status) == ("quickstart", "FINISHED")
    assert parent.data.tags["mlflow.note.content"] == SPEC.question
    assert artifacts(client, parent) >= {"spec.yaml", "trials.parquet", "best.yaml", "environment.json", "report.html"}


def test_the_report_answers_the_question_with_what_the_table_holds(client: Any, parent: Any, table: pd.DataFrame, tmp_path: Path) -> None:
    page = Path(client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))).read_text("utf-8")
    best = table[(table["outcome"] == "completed") & (table["replicate_of"] == "")].sort_values("value").iloc[0]
    assert f"<h1>{SPEC.question}</h1>" in page
    if not SPEC.replicate.top:
        assert f"The lowest val/error, {best['value']:.4g}, is that of {best['arm']}" in page
        assert "differences are not findings" in page
    assert f"{best['value']:.4g}</td>" in page
    assert all(name in page for name in (f"{parent.info.run_id}</code>", 'aria-labelledby="plane-title"', 'aria-labelledby="traces0-title"', *LAYERS))
    assert len(page) < 1_500_000
    assert "<script" not in page


def test_every_run_carries_the_tags_of_its_study(runs: list[Any], parent: Any) -> None:
    expected = {name: parent.data.tags[name] for name in TAGS}
    assert (expected["study.name"], expected["study.spec_hash"], expected["study.engine"]) == ("quickstart", SPEC.spec_hash(), "solo")
    for run in runs:
        assert {name: run.data.tags[name] for name in TAGS} == expected


def test_arms_have_equally_many_trials(children: list[Any]) -> None:
    arms = [run.data.tags["study.arm"] for run in searched(children)]
    assert {arm: arms.count(arm) for arm in arms} == {f"optimizer.gamma={gamma}": 9 for gamma in ("none", "inner+last", "all")}


def test_a_run_ends_as_its_trial_ended(children: list[Any], table: pd.DataFrame) -> None:
    outcomes = {run.data.tags["study.outcome"] for run in children}
    assert {"completed", "stopped"} <= outcomes <= set(STATUS)
    for run in children:
        tags, row = run.data.tags, table.loc[run.data.tags["study.trial_id"]]
        outcome = tags["study.outcome"]
        assert run.info.status == STATUS[outcome]
        assert run.info.end_time is not None
        assert (outcome, tags["study.arm"], run.info.run_id) == (row["outcome"], row["arm"], row["run_id"])
        assert tags.get("study.stop_reason") == ("scheduler" if outcome == Outcome.STOPPED else None)
        assert ("study.divergence" in tags) == (outcome == Outcome.DIVERGED)


def test_params_are_every_field_of_the_trial(children: list[Any], table: pd.DataFrame) -> None:
    names = TrialSpec().dotted().keys()
    for run in children:
        params, row = run.data.params, table.loc[run.data.tags["study.trial_id"]]
        assert params.keys() == names
        assert float(params["optimizer.lr"]) == row["optimizer.lr"]
        assert float(params["optimizer.intrinsic_lr"]) == pytest.approx(row["optimizer.lr"] * row["optimizer.weight_decay"])
        assert f"optimizer.gamma={params['optimizer.gamma']}" == run.data.tags["study.arm"]


def test_every_metric_of_the_contract_is_there_and_all_are_finite(children: list[Any]) -> None:
    for run in children:
        if run.data.tags["study.outcome"] in ("completed", "stopped"):
            assert run.data.metrics.keys() >= NAMES
        assert all(math.isfinite(value) and abs(value) < 1e300 for value in run.data.metrics.values())


def test_completed_trials_trace_every_layer_over_many_steps(client: Any, completed: list[Any]) -> None:
    every, epochs = SPEC.trial.trace.every, SPEC.trial.schedule.epochs
    sampled = list(range(every, epochs * STEPS_PER_EPOCH + 1, every))
    assert len(sampled) > 5
    for run in completed:
        for name in [f"{quantity}/{layer}" for quantity in ("effective_lr", "rotation") for layer in LAYERS]:
            assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == sampled, name


def test_measurements_are_points_at_the_end_of_every_epoch(client: Any, children: list[Any]) -> None:
    for run in children:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/error")]
        assert steps == [STEPS_PER_EPOCH * (epoch + 1) for epoch in range(int(run.data.tags["study.epoch"]))]


def test_the_trace_of_every_trial_can_be_read(client: Any, children: list[Any], tmp_path: Path) -> None:
    for run in children:
        assert artifacts(client, run) >= {"trace.parquet", "spec.yaml"}
        (tmp_path / run.info.run_id).mkdir()
        trace = pd.read_parquet(client.download_artifacts(run.info.run_id, "trace.parquet", str(tmp_path / run.info.run_id)))
        assert list(trace.columns) == [field.name for field in fields(LayerSample)]
        assert set(trace["layer"]) == LAYERS
        assert set(trace.loc[trace["scale_invariant"], "layer"]) == LAYERS - {"head"}
        last = trace[trace["step"] == trace["step"].max()].set_index("layer")
        assert last.loc["stem.conv", "effective_lr"] == run.data.metrics["effective_lr/stem.conv"]
        assert trace["effective_lr"].to_numpy() == pytest.approx((trace["lr"] / trace["weight_norm"] ** 2).to_numpy(), rel=1e-12)


def test_the_best_config_is_the_completed_trial_with_the_lowest_mean_error_over_fresh_seeds(
    client: Any, parent: Any, completed: list[Any], quickstart_home: Path, tmp_path: Path
) -> None:
    best = study.load_best("quickstart", home=quickstart_home)
    errors: dict[str, list[float]] = {}
    for run in completed if not SPEC.replicate.top else (run for run in completed if run not in searched(completed)):
        own = run.data.tags.get("study.replicate_of", run.data.tags["study.trial_id"])
        errors.setdefault(own, []).append(run.data.metrics["final/val/error"])
    means = {trial_id: math.fsum(values) / len(values) for trial_id, values in errors.items()}
    assert means[best.trial_id] == pytest.approx(min(means.values()))
    assert best.run_id in {run.info.run_id for run in completed if run.data.tags["study.trial_id"] == best.trial_id}
    copy = client.download_artifacts(parent.info.run_id, "best.yaml", str(tmp_path))
    assert study.load_best(Path(copy)) == best
    assert study.load_best(best.run_id, tracking_uri=client.tracking_uri).trial == best.trial


def test_the_environment_names_the_versions_that_ran(client: Any, parent: Any, tmp_path: Path) -> None:
    environment = json.loads(Path(client.download_artifacts(parent.info.run_id, "environment.json", str(tmp_path))).read_text("utf-8"))
    assert {"python", "torch", "ray", "optuna", "mlflow"} <= environment["versions"].keys()
