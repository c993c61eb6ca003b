"""Best: who is chosen, what best.yaml holds, and that reading one runs nothing."""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import study
from study.errors import HomeError, NotFound, SpecError
from study.measurement import Ending, Outcome, TrialRecord
from study.results.best import BestConfig, ObjectiveResult, choose_best, document, load_best, read_best
from study.results.export import export
from study.spec import ObjectiveSpec
from study.tracking.recorder import Recorder
from study.trial import TrialSpec
from tests.tracking.scenes import measurement, study_spec


def record(number: int, value: float | None, outcome: Outcome = Outcome.COMPLETED, replicate_of: str = "") -> TrialRecord:
    return TrialRecord(f"tiny-{number:04d}", "all", outcome, "", {}, value, replicate_of=replicate_of)


def best(**changes: Any) -> BestConfig:
    fields: dict[str, Any] = {
        "study_id": "tiny-5f3a",
        "name": "tiny",
        "trial_id": "tiny-0007",
        "run_id": "0" * 32,
        "arm": "optimizer.gamma=last",
        "objective": ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.0421),
        "spec_hash": "a" * 64,
        "git_commit": "c" * 40,
        "versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "date": "2026-03-01T12:00:00+00:00",
        "trial": TrialSpec.model_validate({"optimizer": {"lr": 0.3, "intrinsic_lr": 1.1e-5, "gamma": "last@1"}, "schedule": {"shape": "linear"}}),
    }
    return BestConfig(**{**fields, **changes})


@pytest.mark.parametrize(("direction", "winner"), [("minimize", "tiny-0001"), ("maximize", "tiny-0002")])
def test_the_best_is_the_one_at_the_better_end(direction: Literal["minimize", "maximize"], winner: str) -> None:
    chosen = choose_best([record(0, 0.5), record(1, 0.1), record(2, 0.9)], ObjectiveSpec(direction=direction))
    assert chosen is not None
    assert chosen.trial_id == winner


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.COMPLETED])
def test_only_a_completed_trial_is_the_best(outcome: Outcome) -> None:
    chosen = choose_best([record(0, 0.01, outcome), record(1, 0.5)], ObjectiveSpec())
    assert chosen is not None
    assert chosen.trial_id == "tiny-0001"
    assert choose_best([record(0, 0.01, outcome)], ObjectiveSpec()) is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_value_that_is_no_number_never_wins(value: float | None, direction: Literal["minimize", "maximize"]) -> None:
    for records in ([record(0, value), record(1, 0.5)], [record(1, 0.5), record(2, value)]):
        chosen = choose_best(records, ObjectiveSpec(direction=direction))
        assert chosen is not None
        assert chosen.trial_id == "tiny-0001"


def test_of_equals_the_earlier_trial_wins_however_they_are_listed() -> None:
    records = [record(10_000, 0.5), record(9999, 0.5), record(3, 0.5), record(7, 0.5)]
    chosen = choose_best(records, ObjectiveSpec())
    assert chosen is not None
    assert chosen.trial_id == "tiny-0003"
    chosen = choose_best(records[:2], ObjectiveSpec())
    assert chosen is not None
    assert chosen.trial_id == "tiny-9999"


def test_replicates_do_not_compete() -> None:
    chosen = choose_best([record(0, 0.5), record(1, 0.1, replicate_of="tiny-0000")], ObjectiveSpec())
    assert chosen is not None
    assert chosen.trial_id == "tiny-0000"


def test_without_trials_there_is_no_best() -> None:
    assert choose_best([], ObjectiveSpec()) is None


def test_what_is_saved_reads_back_equal(tmp_path: Path) -> None:
    best().save(tmp_path / "best.yaml")
    assert read_best(tmp_path / "best.yaml") == best()
    assert os.listdir(tmp_path) == ["best.yaml"]


def test_the_file_says_how_to_use_it_and_holds_the_whole_trial() -> None:
    text = best().to_yaml()
    assert text.splitlines()[:4] == [
        "# The best trial of the study tiny. In Python:",
        '#   best = study.load_best("best.yaml")',
        "#   optimizer = study.build_optimizer(model, best.optimizer)",
        "#   scheduler = study.build_scheduler(optimizer, best.schedule, total_steps=10_000)",
    ]
    trial = yaml.safe_load(text)["trial"]
    assert trial == best().trial.canonical()
    assert (trial["optimizer"]["lr"], trial["optimizer"]["weight_decay"]) == (0.3, 1.1e-5 / 0.3)
    assert "intrinsic_lr" not in trial["optimizer"]


def test_parts_of_the_trial_are_at_hand() -> None:
    config = best()
    assert (config.optimizer, config.schedule) == (config.trial.optimizer, config.trial.schedule)
    assert (config.model, config.data) == (config.trial.model, config.trial.data)


@pytest.mark.parametrize("to", ["yaml", "json"])
def test_an_export_reads_back_equal(tmp_path: Path, to: Literal["yaml", "json"]) -> None:
    path = tmp_path / f"exported.{to}"
    path.write_text(export(best(), to).text)
    assert read_best(path) == best()


def test_the_document_has_the_promised_keys() -> None:
    found = document(best())
    assert {"study_id", "trial_id", "run_id", "value", "metric", "direction", "spec", "confirmed"} <= found.keys()
    assert found["confirmed"] is None
    assert found["spec"]["optimizer"]["gamma"] == "last@1"
    assert json.loads(json.dumps(found)) == found


def test_a_confirmed_best_tells_mean_interval_and_seeds(tmp_path: Path) -> None:
    confirmed = best(
        objective=ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.04, seeds=5, mean=0.05, interval=(0.04, 0.06))
    )
    assert document(confirmed)["confirmed"] == {"mean": 0.05, "interval": [0.04, 0.06], "seeds": 5}
    confirmed.save(tmp_path / "best.yaml")
    assert read_best(tmp_path / "best.yaml") == confirmed


def test_a_best_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="cannot be written"):
        best().save(tmp_path / "no such folder" / "best.yaml")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "b.yaml:1: is empty"),
        ("hello", "b.yaml: is not a best.yaml (it has no study_id, trial_id, trial); use the best.yaml in a study's folder"),
        ("name: tiny\nspace: {}\ntrial: {}\n", "b.yaml: is not a best.yaml (it has no study_id, trial_id)"),
        ("\x89PNG\r\n\x1a\n", "b.yaml:1: is not valid YAML: a control character (got '\\x89')"),
        (b"\x89PNG\r\n\x1a\n", "b.yaml: is not UTF-8 (byte 0x89 at offset 0)"),
        (b"#" * 2_000_000, "b.yaml: is larger than 1 MB (got 2.0 MB)"),
        ("study_id: !!python/object/apply:os.system [touch ran]\n", "b.yaml:1: tags are not allowed (got '!!python/object/apply:os.system')"),
        ("study_id: !!python/object/new:type [x]\n", "b.yaml:1: tags are not allowed"),
        ("{" * 5000, "b.yaml:1: nests too deeply"),
    ],
)
def test_a_file_that_is_no_best_config_is_told_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "b.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as caught:
        study.load_best(path)
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(complaint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("lr: 0.3", "lr: -0.3", "trial.optimizer.lr: input should be greater than 0 (got -0.3)"),
        ("lr: 0.3", "lr: 0.3\n    lrr: 1", "trial.optimizer.lrr: unknown key (got 'lrr'); did you mean 'lr'?"),
        ("gamma: last@1", "gamma: tail", "trial.optimizer.gamma: 'tail' is not a place of gains (got 'tail')"),
        ("version: 1", "version: 2", "version: input should be 1 (got 2)"),
        ("date: '2026", "date: 'x", "date: invalid isoformat string"),
        ("spec_hash: a", "spec_hash: z", "spec_hash: must be a SHA-256 of 64 hexadecimal digits (got 'zaaa"),
        ("value: 0.0421", "value: .nan", "objective.value: input should be a finite number"),
        ("mean: null", "mean: 0.05", "objective: mean and interval are both given"),
        ("name: digits", "name: import:os.system", "trial.data.name: must be written import:package.module:function (got 'import:os.system')"),
    ],
)
def test_a_damaged_best_config_says_where(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = best().to_yaml()
    assert old in text
    (tmp_path / "best.yaml").write_text(text.replace(old, new))
    with pytest.raises(SpecError) as caught:
        read_best(tmp_path / "best.yaml")
    line, _, said = str(caught.value).removeprefix(f"{tmp_path}/best.yaml:").partition(": ")
    assert said.startswith(complaint)
    assert int(line) > 1


def test_a_best_config_is_loaded_by_file_or_by_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies" / "tiny").mkdir(parents=True)
    path = tmp_path / "studies" / "tiny" / "best.yaml"
    best().save(path)
    assert study.load_best(path) == best()
    assert study.load_best(str(path)) == best()
    assert study.load_best("tiny", home=tmp_path / "studies") == best()
    monkeypatch.setenv("STUDY_HOME", str(tmp_path / "studies"))
    assert study.load_best("tiny") == best()
    monkeypatch.delenv("STUDY_HOME")
    monkeypatch.chdir(tmp_path)
    assert study.load_best("tiny") == best()
    monkeypatch.chdir(path.parent)
    assert study.load_best("best.yaml") == best()


def test_a_study_by_its_name_is_read_from_the_home_whatever_the_store(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    best().save(tmp_path / "tiny" / "best.yaml")
    store = tmp_path / "untouched.db"
    assert study.load_best("tiny", home=tmp_path, tracking_uri=f"sqlite:///{store}") == best()
    with pytest.raises(NotFound, match="no such file, and no study of this name"):
        study.load_best("absent", home=tmp_path, tracking_uri=f"sqlite:///{store}")
    assert not store.exists()


def test_a_best_config_is_loaded_by_the_run_of_a_trial_or_of_its_study(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, trial = study_spec(), best().trial
    recorder = Recorder(tmp_path / "roles", tracking_uri, spec, "roles-5f3a", engine="solo")
    parent = recorder.open()
    for number, value in enumerate((0.25, 0.5)):
        trial_id = f"roles-{number:04d}"
        recorder.outbox.start(trial_id, arm="optimizer.gamma=last", trial=trial.canonical())
        recorder.outbox.measure(trial_id, measurement(1, value))
        recorder.outbox.end(trial_id, Ending(Outcome.COMPLETED), value)
    recorder.start()
    recorder.close()
    second = recorder.run_id("roles-0001") or ""

    found = study.load_best(second, home=tmp_path, tracking_uri=tracking_uri)
    assert (found.study_id, found.name, found.trial_id, found.run_id) == ("roles-5f3a", "roles", "roles-0001", second)
    assert (found.objective.metric, found.objective.value, found.spec_hash) == ("val/error", 0.5, spec.spec_hash())
    assert found.trial == trial

    best(run_id=second).save(tmp_path / "best.yaml")
    recorder.finish("finished", [tmp_path / "best.yaml"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    assert study.load_best(parent) == best(run_id=second)
    with pytest.raises(NotFound, match="0" * 32):
        study.load_best("0" * 32)


def test_what_cannot_be_found_is_told(tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    with pytest.raises(NotFound, match=r"no such file, and no study of this name \(got 'tiny'\); give a best\.yaml, or name the study home"):
        load_best("tiny", tmp_path)
    with pytest.raises(NotFound, match=r"this study has no best config yet; finish it with `study run`"):
        load_best("young", tmp_path)
    with pytest.raises(NotFound, match=r"no\.yaml: no such file; a study writes best\.yaml into its folder when it ends"):
        load_best(tmp_path / "no.yaml")
    with pytest.raises(NotFound, match="no such file"):
        load_best("../tiny", tmp_path)
