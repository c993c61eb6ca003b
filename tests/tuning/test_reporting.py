"""`study report` speaks of a study's folder as it is, finished or not; where it cannot be written, nothing else is lost."""

import json
import logging
from pathlib import Path

import pandas as pd
import pytest

from study.cli import main
from study.home import StudyFolder
from study.measurement import Ending, LayerSample, Measurement, Outcome
from study.space import arm_label
from study.traces import write_trace
from study.tracking.outbox import Outbox
from study.tuning import reporting
from study.tuning.reporting import gathered, report_page, warnings_of, write_report
from tests.results.tables import ALL, NONE, spec

STUDY = spec(search={"trials": 10})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a study of ten trials, six of which have ended and still improved, all at the largest learning rates."""
    folder = StudyFolder.prepare(tmp_path, STUDY)
    outbox = Outbox(folder.path)
    for number in range(6):
        trial_id, arm = f"gains-{number:04}", STUDY.arms[number % 2]
        outbox.start(trial_id, arm=arm_label(arm), trial=STUDY.trial_for({**arm, "optimizer.lr": 0.9, "optimizer.weight_decay": 1e-3}).canonical())
        for epoch in range(1, 11):
            outbox.measure(trial_id, Measurement(22 * epoch, epoch, {"val/error": (1 + number / 10) * 0.5 * 0.8**epoch}, seconds=1.0))
        outbox.end(trial_id, Ending(Outcome.COMPLETED), (1 + number / 10) * 0.5 * 0.8**10)
        (folder.path / "trials" / trial_id).mkdir()
        sample = LayerSample(2, "conv", "weight", "inner", True, True, 0.1, 5e-3, 2.0, 0.1, 0.025, 0.02, 0.02)
        write_trace(folder.path / "trials" / trial_id / "trace.parquet", [sample])
    outbox.close()
    return tmp_path


def test_a_report_is_written_into_the_folder_with_its_answer_on_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "gains", "--home", str(home)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"The lowest val/error, 0.05369, is that of {NONE}, then {ALL} with 0.05906.")
    assert "warning: one seed: differences between arms are not findings; set replicate.top" in out
    assert f"written to {home}/gains/report.html" in err
    page = (home / "gains" / "report.html").read_text("utf-8")
    assert "6 of 10 planned trials have ended; everything below may change." in page
    assert ">conv</text>" in page


def test_a_report_is_a_document_with_json(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "gains", "--home", str(home), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"study_id", "question", "answer", "best", "arms", "differences", "outcomes", "claims", "warnings", "provenance"} <= set(found)
    assert found["provenance"]["trial_seconds"] == 60
    assert {warning["kind"] for warning in found["warnings"]} == {"one-seed", "edge", "still-improving"}
    assert not (home / "gains" / "report.html").exists()
    assert main(["report", "gains", "--home", str(home), "-o", str(tmp_path / "r.html"), "--json"]) == 0
    assert (tmp_path / "r.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_study_without_trials_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StudyFolder.prepare(tmp_path, STUDY)
    assert main(["report", "gains", "--home", str(tmp_path)]) == 0
    assert "has no answer" in capsys.readouterr().out
    assert main(["report", "other", "--home", str(tmp_path)]) == 2


def test_warnings_follow_from_the_ledger(home: Path) -> None:
    edge, improving = warnings_of(StudyFolder(home / "gains"), STUDY)[1:]
    assert edge.says.startswith("the best optimizer.lr is within 5% of the upper end 1")
    assert "gains-0000 of optimizer.gamma=none from 0." in improving.says


def test_figures_that_fail_are_left_out(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(found: object, plane: str) -> None:
        raise ValueError("no pen")

    monkeypatch.setattr(reporting, "draw_figures", fails)
    with caplog.at_level(logging.WARNING):
        page = report_page(gathered(StudyFolder(home / "gains"), STUDY))
    assert "figures of the report could not be drawn (ValueError: no pen)" in caplog.text
    assert "Best config" in page and "<figure" not in page


def test_a_plane_that_is_drawn_already_is_not_drawn_again(home: Path) -> None:
    folder = StudyFolder(home / "gains")
    (folder.path / "plane.svg").write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><text>drawn before</text></svg>')
    assert write_report(folder, STUDY, reporting.trials_of(folder), "finished") == [folder.path / "report.html"]
    assert "<text>drawn before</text></svg>" in (folder.path / "report.html").read_text("utf-8")


def test_a_report_that_fails_is_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert write_report(StudyFolder(home / "gains"), STUDY, pd.DataFrame([{"trial_id": "gains-0000"}]), "finished") == []
    assert "the report could not be written (KeyError" in caplog.text
    assert not (home / "gains" / "report.html").exists()
