"""`study delete` removes a study whole, in its home and in MLflow, and nothing else."""

import json
from pathlib import Path

import pytest

from study import removal
from study.cli import main
from study.errors import HomeError, InputError, NotFound
from study.home import StudyFolder
from study.removal import leavings, remove
from study.spec import check
from study.tracking.store import connect


def prepared(home: Path, name: str, uri: str) -> StudyFolder:
    """A study in the home with two MLflow runs, its own and one of a trial."""
    spec = check({"name": name, "space": {"optimizer.lr": {"low": 0.001, "high": 1, "log": True}}, "search": {"trials": 6}})
    folder, store = StudyFolder.prepare(home, spec), connect(uri)
    experiment, tags = store.experiment("shared"), {"study.id": folder.card().study_id}
    first = store.create(store.experiment(name), name, 0, tags)
    store.create(store.experiment(name), f"{name}-0000", 0, tags)
    store.create(experiment, "another", 0, {"study.id": "another"})
    folder.update(state="finished", run_id=first, tracking_uri=uri)
    (folder.path / "trials" / "gains-0000").mkdir()
    (folder.path / "trials" / "gains-0000" / "trace.parquet").write_bytes(b"1234")
    return folder


def runs(uri: str, name: str) -> int:
    store = connect(uri)
    return len(store.runs(store.experiments(name), {}))


def test_a_study_is_removed_whole_and_its_neighbours_stay(tmp_path: Path, tracking_uri: str) -> None:
    home = tmp_path / "studies"
    gone, stays = (prepared(home, name, tracking_uri) for name in ("gone", "stays"))
    left = leavings(home, "gone", tracking_uri)
    assert (len(left.runs), left.files) == (2, 3)
    assert str(left).startswith(f"{home}/gone (3 files, 0.0 MB) and 2 MLflow runs in sqlite:///")
    remove(left)
    assert not gone.path.exists()
    assert stays.path.exists()
    assert (runs(tracking_uri, "gone"), runs(tracking_uri, "stays"), runs(tracking_uri, "shared")) == (0, 2, 2)
    with pytest.raises(NotFound):
        leavings(home, "gone", tracking_uri)


@pytest.mark.parametrize("name", ["..", "../studies/gone", ".", ""])
def test_nothing_outside_the_home_is_removed(name: str, tmp_path: Path, tracking_uri: str) -> None:
    prepared(tmp_path / "studies", "gone", tracking_uri)
    with pytest.raises(NotFound):
        leavings(tmp_path / "studies", name, tracking_uri)


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path, tracking_uri: str) -> None:
    elsewhere = prepared(tmp_path / "elsewhere", "linked", tracking_uri)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "linked").symlink_to(elsewhere.path)
    with pytest.raises(HomeError, match="link"):
        leavings(tmp_path / "studies", "linked", tracking_uri)


def test_a_study_that_runs_is_refused(tmp_path: Path, tracking_uri: str) -> None:
    folder = prepared(tmp_path, "busy", tracking_uri)
    left = leavings(tmp_path, "busy", tracking_uri)
    folder.update(state="running")
    with folder.running():
        with pytest.raises(HomeError, match="study stop busy"):
            leavings(tmp_path, "busy", tracking_uri)
        with pytest.raises(HomeError, match="another process runs"):
            remove(left)
    assert folder.path.exists()


def test_runs_in_another_store_are_not_forgotten(tmp_path: Path, tracking_uri: str) -> None:
    prepared(tmp_path / "studies", "gone", tracking_uri)
    with pytest.raises(InputError, match=f"--tracking-uri: {tracking_uri}"):
        leavings(tmp_path / "studies", "gone")


def test_the_command_asks_and_says_what_it_removed(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "studies", "gone", tracking_uri)
    command = ["delete", "gone", "--home", str(tmp_path / "studies"), "--tracking-uri", tracking_uri]
    assert main(command) == 2
    assert "add --yes to remove" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda question, err: False)
    assert main(command) == 0
    assert "nothing was removed" in capsys.readouterr().err
    assert folder.path.exists()
    assert main([*command, "--yes", "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert (removed["name"], removed["runs"], removed["files"]) == ("gone", 2, 3)
    assert not folder.path.exists()


def test_a_study_without_runs_needs_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(removal, "connect", lambda uri: pytest.fail("asked for a store"))
    spec = check({"name": "fresh", "space": {"optimizer.lr": {"low": 0.001, "high": 1, "log": True}}, "search": {"trials": 6}})
    folder = StudyFolder.prepare(tmp_path, spec)
    left = leavings(tmp_path, "fresh")
    assert left.runs == ()
    remove(left)
    assert not folder.path.exists()
