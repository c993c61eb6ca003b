"""The study home: folders that are made, found and held, and cards that are damaged."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from study.errors import HomeError, NameTaken, NotFound, NotRunning
from study.home import StudyFolder, home_path, tracking_uri_for
from study.spec import StudySpec, check, load_spec

ROOT = Path(__file__).parents[1]

HOLD = """
import sys, pathlib
from study.home import StudyFolder
folder = StudyFolder(pathlib.Path(sys.argv[1]))
with folder.running():
    print("held", flush=True)
    sys.stdin.read()
"""


def spec(name: str = "tiny", **more: Any) -> StudySpec:
    return check({"name": name, "space": {"optimizer.lr": {"low": 0.001, "high": 1, "log": True}}, "search": {"trials": 6}, **more})


def files(folder: StudyFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


@contextmanager
def another_process(folder: StudyFolder, code: str = HOLD) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds a study."""
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_home_is_the_argument_or_the_environment_or_a_folder_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUDY_HOME", raising=False)
    assert home_path() == Path("studies")
    monkeypatch.setenv("STUDY_HOME", "elsewhere")
    assert home_path() == Path("elsewhere")
    assert home_path("here") == Path("here")


def test_the_store_is_the_argument_or_the_environment_or_a_file_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri_for(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri_for(tmp_path) == "http://there:5000"
    assert tracking_uri_for(tmp_path, "sqlite:///mine.db") == "sqlite:///mine.db"


def test_a_first_start_makes_the_folder(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path / "deep" / "home", spec())
    card = folder.card()
    assert (card.name, card.spec_hash, card.state) == ("tiny", spec().spec_hash(), "interrupted")
    assert card.study_id.startswith("tiny-")
    assert files(folder) == {"study.json", "spec.yaml", "trials"}
    assert folder.load_spec() == load_spec(folder.spec) == spec()


def test_a_later_start_keeps_the_identity_and_takes_the_spec_that_is_new(tmp_path: Path) -> None:
    first = StudyFolder.prepare(tmp_path, spec()).card()
    longer = spec(search={"trials": 12})
    folder = StudyFolder.prepare(tmp_path, longer)
    folder.remember(longer)
    assert folder.card() == first
    assert folder.load_spec() == longer


def test_a_name_that_belongs_to_another_study_is_refused(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    folder.update(run_id="0" * 32, state="running")
    with pytest.raises(NameTaken) as caught:
        StudyFolder.prepare(tmp_path, spec(trial={"seed": 1, "data": {"label_noise": 0.1}}, search={"trials": 12}))
    assert str(caught.value) == (
        f"{tmp_path}/tiny: this name belongs to a study of another trial, space, sampler, seed, objective or stopping "
        "(got 'tiny', which differs in trial.seed, trial.data.label_noise); "
        "give the changed study another name, or remove the old one: study delete tiny"
    )
    assert folder.load_spec() == spec()
    folder.spec.write_text("name: [")
    with pytest.raises(NameTaken, match=r"\(got 'tiny'\)"):
        StudyFolder.prepare(tmp_path, spec(trial={"seed": 1}))


def test_a_study_that_never_began_gives_its_name_to_a_corrected_spec(tmp_path: Path) -> None:
    StudyFolder.prepare(tmp_path, spec())
    corrected = spec(trial={"seed": 1})
    folder = StudyFolder.prepare(tmp_path, corrected)
    assert (folder.card().spec_hash, folder.load_spec()) == (corrected.spec_hash(), corrected)


def test_a_study_that_another_process_is_about_to_begin_keeps_its_name(tmp_path: Path) -> None:
    with another_process(StudyFolder.prepare(tmp_path, spec())), pytest.raises(NameTaken):
        StudyFolder.prepare(tmp_path, spec(trial={"seed": 1}))


@pytest.mark.parametrize("below", ["file", "file/deep"])
def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match=r"the study home cannot be written \(.+\); choose another with --home or \$STUDY_HOME") as caught:
        StudyFolder.prepare(tmp_path / below, spec())
    assert str(caught.value).startswith(f"{tmp_path}/{below}: ")


def test_studies_are_found_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        StudyFolder.prepare(tmp_path, spec(name))
    (tmp_path / "no-study").mkdir()
    assert [folder.path for folder in StudyFolder.all(tmp_path)] == [tmp_path / "a", tmp_path / "b"]
    assert StudyFolder.find(tmp_path, "b").card().name == "b"


def test_a_home_that_does_not_exist_has_no_studies(tmp_path: Path) -> None:
    assert StudyFolder.all(tmp_path / "none") == []
    with pytest.raises(NotFound, match=r"no study of this name \(got 'tiny'\); studies here: none"):
        StudyFolder.find(tmp_path / "none", "tiny")


@pytest.mark.parametrize("name", ["c", "no-study", "..", ".", "", "a/../b"])
def test_a_study_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, name: str) -> None:
    for there in ("b", "a"):
        StudyFolder.prepare(tmp_path, spec(there))
    (tmp_path / "no-study").mkdir()
    with pytest.raises(NotFound) as caught:
        StudyFolder.find(tmp_path, name)
    assert str(caught.value) == f"{tmp_path}: no study of this name (got {name!r}); studies here: a, b"


def test_changes_of_the_card_are_kept(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    before = folder.card()
    folder.update(state="finished", run_id="0" * 32)
    after = folder.card()
    assert after == before.model_copy(update={"state": "finished", "run_id": "0" * 32, "ended": after.ended})
    assert datetime.fromisoformat(after.ended) <= datetime.now(UTC)
    assert files(folder) == {"study.json", "spec.yaml", "trials"}


def test_a_running_study_is_held_by_one_process_as_long_as_that_lives(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    folder.update(state="running")
    with another_process(folder) as process:
        assert folder.is_running()
        assert folder.card().state == "running"
        with pytest.raises(HomeError) as caught, folder.running():
            pass
        assert str(caught.value) == f"{tmp_path}/tiny: another process runs this study; wait for it, or stop it with `study stop`"
        process.kill()
        process.wait()
        with folder.running():
            assert folder.is_running()


STOPPABLE = """
import sys, time, pathlib
from study.home import StudyFolder
folder = StudyFolder(pathlib.Path(sys.argv[1]))
with folder.running():
    try:
        print("held", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        folder.update(state="interrupted")
"""
"""A process that runs a study, and ends well at Ctrl-C."""


def test_a_running_study_is_stopped_from_outside(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    folder.update(state="running")
    with another_process(folder, STOPPABLE) as process:
        card = folder.card()
        assert (card.host, card.pid) == (socket.gethostname(), process.pid)
        folder.stop()
        assert process.wait(timeout=10) == 0
    card = folder.card()
    assert (card.state, card.host, card.pid) == ("interrupted", "", 0)
    assert not folder.is_running()


@pytest.mark.parametrize(("state", "remedy"), [("interrupted", "`study run` goes on with it"), ("finished", "there is nothing to stop")])
def test_a_study_that_nobody_runs_cannot_be_stopped(tmp_path: Path, state: str, remedy: str) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    folder.update(state=state)
    with pytest.raises(NotRunning) as caught:
        folder.stop()
    assert str(caught.value) == f"{tmp_path}/tiny: no process runs this study (it is {state}); {remedy}"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"host": "elsewhere"}, "this study runs on another machine (got 'elsewhere'); stop it there, or with --address"),
        # A number that now belongs to another process, such as this one: it must not be hit.
        ({"pid": os.getpid(), "born": "1"}, "this study is just starting or ending; try again in a moment"),
        ({"pid": 0, "born": ""}, "this study is just starting or ending; try again in a moment"),
    ],
)
def test_only_the_process_that_runs_a_study_is_stopped(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    with another_process(folder, STOPPABLE) as process:
        folder.update(**changes)
        with pytest.raises(NotRunning) as caught:
            folder.stop()
        assert complaint in str(caught.value)
        assert process.poll() is None


def test_a_study_that_runs_in_no_process_counts_as_interrupted(tmp_path: Path) -> None:
    folder = StudyFolder.prepare(tmp_path, spec())
    folder.update(state="running")
    assert not folder.is_running()
    assert folder.card().state == "interrupted"
    assert json.loads((folder.path / "study.json").read_text())["state"] == "running"


DAMAGED = [
    (lambda text: "", "is damaged: invalid JSON: EOF while parsing"),
    (lambda text: text[:80], "is damaged: invalid JSON: EOF while parsing"),
    (lambda text: "tiny", "is damaged: invalid JSON: "),
    (lambda text: "[" * 100_000, "is damaged: invalid JSON: recursion limit exceeded"),
    (lambda text: "[1, 2]", "is damaged: must be a mapping of fields (got a list of 2); "),
    (lambda text: '{"name": "tiny"}', "is damaged: study_id: field required; "),
    (lambda text: text.replace('"name"', '"nickname"'), "is damaged: name: field required; "),
    (lambda text: text.replace("{", '{"color": "red",'), "is damaged: color: extra inputs are not permitted (got 'red'); "),
    (lambda text: text.replace("interrupted", "asleep"), "is damaged: state: input should be 'running', 'finished', 'interrupted' or 'failed'"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGED, ids=[str(index) for index in range(len(DAMAGED))])
def test_a_damaged_card_says_which_file_and_what_to_do(tmp_path: Path, damage: Any, complaint: str) -> None:
    for name in ("broken", "whole"):
        StudyFolder.prepare(tmp_path, spec(name))
    card = tmp_path / "broken" / "study.json"
    card.write_text(damage(card.read_text()))
    broken, whole = StudyFolder.all(tmp_path)
    assert whole.card().name == "whole"
    assert StudyFolder.find(tmp_path, "broken").path == broken.path
    for use in (broken.card, lambda: broken.update(state="finished"), lambda: StudyFolder.prepare(tmp_path, spec("broken"))):
        with pytest.raises(HomeError) as caught:
            use()
        assert str(caught.value).startswith(f"{card}: {complaint}")
        assert str(caught.value).endswith("; put a copy of it back, or move the study's folder away and run the study anew")


def test_a_card_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "odd" / "study.json").mkdir(parents=True)
    [folder] = StudyFolder.all(tmp_path)
    with pytest.raises(HomeError, match=r"odd/study\.json: cannot be read \(Is a directory\)"):
        folder.card()
