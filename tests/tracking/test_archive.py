"""Facts about what is read back from MLflow."""

import json
from pathlib import Path

import pytest

from study.document import to_yaml
from study.errors import NotFound
from study.measurement import Ending, Outcome
from study.tracking.archive import best_of_run, study_records, trace_of_run, trial_of_run
from study.tracking.names import CUT, masked, metric_name, params_of, trial_of
from study.tracking.recorder import Recorder
from study.trial import TrialSpec
from tests.tracking.scenes import measurement, study_spec

SPEC = study_spec()
ODD = TrialSpec.model_validate({"seed": 7, "model": {"places": {"layer*.bn": "last"}}, "optimizer": {"lr": 0.3, "gamma": "last@1"}})
LONG = TrialSpec.model_validate({"data": {"name": "import:mine:data", "args": {"words": "x" * 7000, "text": "5", "none": None}}})


@pytest.fixture
def study(tracking_uri: str, tmp_path: Path) -> Recorder:
    """Three trials: a completed one, a replicate of it that diverged, and one still running."""
    recorder = Recorder(tmp_path / "roles", tracking_uri, SPEC, "study-1", engine="solo")
    recorder.open()
    outbox = recorder.outbox
    outbox.start("roles-0000", arm="optimizer.gamma=last", trial=ODD.canonical())
    outbox.start("roles-0000-r1", arm="optimizer.gamma=last", trial=LONG.canonical(), replicate_of="roles-0000")
    outbox.start("roles-0001", arm="optimizer.gamma=none", trial=SPEC.trial.canonical())
    for trial_id in ("roles-0000", "roles-0000-r1", "roles-0001"):
        outbox.measure(trial_id, measurement(1))
        outbox.measure(trial_id, measurement(2))
    outbox.end("roles-0000", Ending(Outcome.COMPLETED), 0.25)
    outbox.end("roles-0000-r1", Ending(Outcome.DIVERGED, "exploded"), None)
    recorder.start()
    recorder.close()
    return recorder


def best_yaml(folder: Path) -> Path:
    path = folder / "best.yaml"
    objective = {"metric": "val/error", "direction": "minimize", "at": "final", "value": 0.25, "seeds": 5, "mean": 0.3, "interval": [0.2, 0.4]}
    path.write_text(to_yaml({"version": 1, "study_id": "study-1", "trial_id": "roles-0000", "objective": objective, "trial": ODD.canonical()}))
    return path


@pytest.mark.parametrize("study_name", ["roles", "study-1"])
def test_the_records_of_a_study_are_those_of_its_own_ledger(study: Recorder, study_name: str) -> None:
    records = study_records(study.tracking_uri, study_name)
    assert [record.trial_id for record in records] == ["roles-0000", "roles-0000-r1"]
    assert records == study.outbox.records()


def test_a_name_means_its_latest_study(study: Recorder, tmp_path: Path) -> None:
    later = Recorder(tmp_path / "later", study.tracking_uri, SPEC, "study-2", engine="solo")
    later.open()
    assert study_records(study.tracking_uri, "roles") == []
    assert len(study_records(study.tracking_uri, "study-1")) == 2


@pytest.mark.parametrize("name", ["absent", "it's"])
def test_a_study_that_is_not_there_is_not_found(study: Recorder, name: str) -> None:
    with pytest.raises(NotFound, match="no such study"):
        study_records(study.tracking_uri, name)


def test_a_trial_comes_with_its_provenance(study: Recorder) -> None:
    run_id = study.run_id("roles-0000") or ""
    trial, provenance = trial_of_run(run_id, study.tracking_uri)
    assert TrialSpec.model_validate(trial) == ODD
    expected = {"study_id": "study-1", "trial_id": "roles-0000", "run_id": run_id, "value": 0.25, "metric": "val/error", "direction": "minimize"}
    assert provenance.items() >= {**expected, "spec_hash": SPEC.spec_hash(), "arm": "optimizer.gamma=last"}.items()
    assert provenance["date"].endswith("+00:00")
    assert provenance["git_commit"] == study.identity.git_commit


def test_a_spec_too_long_for_params_is_read_from_its_artifact(study: Recorder) -> None:
    trial, _ = trial_of_run(study.run_id("roles-0000-r1") or "", study.tracking_uri)
    assert TrialSpec.model_validate(trial) == LONG


def test_a_studys_run_gives_its_best_trial_as_best_yaml_has_it(study: Recorder, tmp_path: Path) -> None:
    study.finish("finished", [best_yaml(tmp_path)])
    assert best_of_run(study.parent, study.tracking_uri)["objective"]["mean"] == 0.3
    trial, provenance = trial_of_run(study.parent, study.tracking_uri)
    assert TrialSpec.model_validate(trial) == ODD
    assert (provenance["trial_id"], provenance["value"], provenance["direction"]) == ("roles-0000", 0.25, "minimize")


def test_the_versions_of_a_study_come_with_its_trials(study: Recorder, tmp_path: Path) -> None:
    assert best_of_run(study.run_id("roles-0000") or "", study.tracking_uri)["versions"] == {}
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    study.finish("finished", [tmp_path / "environment.json"])
    assert best_of_run(study.run_id("roles-0000") or "", study.tracking_uri)["versions"] == {"torch": "2.13.0"}


def test_a_study_without_a_best_trial_and_an_unknown_run_are_not_found(study: Recorder) -> None:
    with pytest.raises(NotFound, match=r"no artifact best\.yaml"):
        trial_of_run(study.parent, study.tracking_uri)
    for run_id in ("0" * 32, "nonsense"):
        with pytest.raises(NotFound, match="no such run"):
            trial_of_run(run_id, study.tracking_uri)
    with pytest.raises(NotFound, match=r"no artifact trace\.parquet"):
        trace_of_run(study.run_id("roles-0001") or "", study.tracking_uri)


def test_a_trace_is_read_back_as_a_table(study: Recorder) -> None:
    table = trace_of_run(study.run_id("roles-0000") or "", study.tracking_uri)
    assert list(table["step"].unique()) == [10, 20, 30, 40]
    assert table["rotation"].max() == 0.8


@pytest.mark.parametrize("spec", [TrialSpec(), ODD])
def test_params_read_back_as_the_spec_that_was_written(spec: TrialSpec) -> None:
    assert trial_of(params_of(spec.model_dump(mode="json"))) == spec.model_dump(mode="json")


def test_text_that_looks_like_another_value_is_quoted_in_params() -> None:
    tree = {"args": {"a": "5", "b": 5, "c": "null", "d": None, "e": "none", "f": True, "g": "true", "h": '"', "i": "", "j": [1, "x"], "k": {}}}
    assert trial_of(params_of(tree)) == tree
    assert params_of(tree)["args.e"] == "none"


def test_a_value_too_long_for_a_param_is_cut_and_marked() -> None:
    params = params_of({"text": "x" * 7000})
    assert len(params["text"]) == 6000
    assert params["text"].endswith(CUT)
    assert trial_of(params) is None


def test_names_of_metrics_hold_only_what_mlflow_takes() -> None:
    assert metric_name("rotation/layer1.0.conv1") == "rotation/layer1.0.conv1"
    assert metric_name("rotation/a,b*é") == "rotation/a_b__"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://ann:hush@host:5000/x", "http://ann:***@host:5000/x"),
        ("https://hush@host", "https://***@host"),
        ("postgresql://host/db?user=ann&password=hush", "postgresql://host/db?user=ann&password=***"),
        ("cannot reach http://ann:hush@host and http://b:hush@c/d", "cannot reach http://ann:***@host and http://b:***@c/d"),
        ("sqlite:///studies/mlflow.db", "sqlite:///studies/mlflow.db"),
    ],
)
def test_credentials_are_hidden_wherever_a_uri_is_shown(text: str, hidden: str) -> None:
    assert masked(text) == hidden
