"""At the end of a study pictures are drawn of its best trials and of its plane, and nothing is lost where that fails."""

import logging
from pathlib import Path

import pandas as pd
import pytest

from study.home import StudyFolder
from study.measurement import LayerSample
from study.results import pictures
from study.results.pictures import draw
from study.spec import StudySpec
from study.traces import write_trace

SPACE = {
    "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True},
    "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"},
}


def spec(**changes: object) -> StudySpec:
    return StudySpec.model_validate({"name": "gains", "space": SPACE, "search": {"trials": 10}, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path)


def table(folder: StudyFolder, *, per_arm: int = 5, arms: int = 2) -> pd.DataFrame:
    """Trials of each arm with values that fall, the last stopped; every trial has a trace, except the very first."""
    rows = []
    for number in range(arms * per_arm):
        place, trial_id = number // arms, f"gains-{number:04}"
        trace = folder.path / "trials" / trial_id / "trace.parquet"
        trace.parent.mkdir(parents=True)
        if number:
            write_trace(trace, [LayerSample(step, "conv", "weight", "inner", True, True, 0.1, 5e-3, 2.0, 0.1, 0.025, 0.02, 0.02) for step in (1, 2)])
        outcome = "stopped" if place == per_arm - 1 else "completed"
        fields = {"optimizer.lr": 0.1 * (1 + number), "optimizer.weight_decay": 1e-3, "replicate_of": ""}
        rows.append({"trial_id": trial_id, "arm": f"optimizer.gamma=g{number % arms}", "outcome": outcome, "value": 1 / (1 + place), **fields})
    return pd.DataFrame(rows)


def test_the_traces_of_the_best_completed_trials_of_each_arm_are_drawn_and_attached(folder: StudyFolder) -> None:
    attached: dict[str, Path] = {}
    artifacts = draw(folder, spec(), table(folder), attached.__setitem__)
    assert list(attached) == ["gains-0006", "gains-0007", "gains-0004", "gains-0005", "gains-0002", "gains-0003"]
    assert attached["gains-0006"] == folder.path / "trials" / "gains-0006" / "traces.svg"
    assert ">gains-0006</text>" in attached["gains-0006"].read_text("utf-8")
    assert artifacts == [folder.path / "plane.svg"]
    assert ">val/error</text>" in artifacts[0].read_text("utf-8")


def test_the_best_of_a_study_that_maximizes_are_the_largest(folder: StudyFolder) -> None:
    attached: dict[str, Path] = {}
    draw(folder, spec(objective={"metric": "val/error", "direction": "maximize"}), table(folder), attached.__setitem__)
    assert "gains-0001" in attached
    assert "gains-0007" not in attached
    assert "gains-0000" not in attached  # it has no trace


def test_with_many_arms_fewer_of_each_are_drawn(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_TRACES", 4)
    attached: dict[str, Path] = {}
    draw(folder, spec(), table(folder, per_arm=3, arms=4), attached.__setitem__)
    assert list(attached) == ["gains-0004", "gains-0005", "gains-0006", "gains-0007"]


def test_a_study_that_varies_neither_learning_rate_nor_decay_has_no_plane(folder: StudyFolder) -> None:
    studied = spec(space={"optimizer.gamma": {"choices": ["none", "all"]}})
    assert draw(folder, studied, table(folder), lambda trial_id, file: None) == []
    assert not (folder.path / "plane.svg").exists()


def test_a_picture_that_fails_is_a_warning(folder: StudyFolder, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(trial_id: str, file: Path) -> None:
        raise ValueError("no such run")

    with caplog.at_level(logging.WARNING):
        assert draw(folder, spec(), table(folder), refuses) == []
    assert "not every picture of the study could be drawn (ValueError: no such run)" in caplog.text


def test_a_study_without_trials_has_no_pictures(folder: StudyFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert draw(folder, spec(), pd.DataFrame([]), lambda trial_id, file: None) == []
    assert not caplog.text
