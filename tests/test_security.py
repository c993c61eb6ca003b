"""What a file, a name or a server of somebody else cannot do here. Each has its details elsewhere; this is the list.

YAML bombs                     a spec is small and made of plain values
path traversal                 a name never leads out of the study home
`import:` when submitted       the shipped folder and installed packages, not Python's own modules   (tests/test_shipping.py)
secrets in specs               refused with advice, never shown                                      (tests/test_credentials.py)
pickled checkpoints            tensors and plain values are read, nothing is executed
servers                        bind to loopback unless told otherwise
"""

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from study.cli import app, main, upkeep
from study.engines.engine import Snapshot
from study.errors import NotFound, SpecError
from study.home import StudyFolder
from study.results.best import read_best
from study.spec import check, load_spec
from tests.conftest import ROOT

OUTSIDE = ("..", "../secret", "a/../../secret", "/etc", "secret/", "%2e%2e/secret", ".", "", "tiny\x00")
"""Names that would lead out of the study home."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A study home with one study, and another study outside it."""
    for place in ("home", ""):
        name = "tiny" if place else "secret"
        spec = check({"name": name, "space": {"optimizer.lr": {"low": 0.1, "high": 1}}, "search": {"trials": 2}})
        StudyFolder.prepare(tmp_path / place, spec)
    return tmp_path / "home"


def bomb(levels: int, width: int) -> str:
    """A few hundred bytes that would be width^levels values."""
    lines = ["a0: &a0 [0, 0]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [bomb(9, 9), bomb(30, 2), "a: &a\n  b: *a\n", "a: " + "[" * 600, "- " * 600, "a: !!python/object/apply:os.system ['touch hacked']"],
    ids=["wide", "deep", "recursive", "nested", "listed", "tagged"],
)
def test_a_file_neither_fills_the_memory_nor_runs_code(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(text)
    for read in (load_spec, read_best):
        with pytest.raises(SpecError):
            read(tmp_path / "spec.yaml")
    assert not (tmp_path / "hacked").exists()


def test_no_yaml_is_read_in_a_way_that_makes_objects() -> None:
    loaders = {
        source: (ROOT / "study" / source).read_text() for source in (path.relative_to(ROOT / "study") for path in (ROOT / "study").rglob("*.py"))
    }
    assert [str(name) for name, text in loaders.items() if "yaml.load(" in text or "yaml.unsafe_load" in text or "FullLoader" in text] == []
    assert [str(name) for name, text in loaders.items() if "pickle.load" in text or "weights_only=False" in text or "allow_pickle=True" in text] == []


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_of_a_study_never_leads_out_of_the_home(name: str, home: Path) -> None:
    with pytest.raises((NotFound, ValueError)):
        StudyFolder.find(home, name)
    with pytest.raises(SpecError, match="name"):
        check({"name": name, "space": {"optimizer.lr": {"low": 0.1, "high": 1}}, "search": {"trials": 2}})


TAKE_A_NAME = sorted(
    command.name or command.callback.__name__
    for command in app.registered_commands
    if command.callback and "name" in inspect.signature(command.callback).parameters
)
"""Every command that takes the name of a study."""


@pytest.mark.parametrize("command", TAKE_A_NAME)
@pytest.mark.parametrize("name", ["../secret", "..", "/etc"])
def test_no_command_leaves_the_home(command: str, name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(str(path) for path in home.parent.rglob("*"))
    assert main([command, name, "--home", str(home)]) == 2
    assert capsys.readouterr().out == ""
    assert sorted(str(path) for path in home.parent.rglob("*")) == before


@pytest.mark.parametrize("trial", ["../secret-0000", "tiny-0000/../../secret-0000", "..-0000", "tiny/trials/../../../secret-0001"])
def test_the_id_of_a_trial_never_leads_out_of_the_home(trial: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", trial, "--home", str(home)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"no such trace (got '{trial}')")  # read as the path of a file


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))], ids=["torch", "pickle"])
def test_a_snapshot_from_elsewhere_executes_nothing(write: Any, tmp_path: Path) -> None:
    hacked = tmp_path / "hacked"
    write({"format": 1, "trial": {}, "step": 0, "epoch": 0, "state": {"weights": Hostile(hacked)}}, tmp_path / "snapshot.pt")
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        Snapshot.load(tmp_path / "snapshot.pt")
    assert not hacked.exists()


def test_servers_are_on_loopback_unless_told_otherwise() -> None:
    assert inspect.signature(upkeep.ui).parameters["host"].default == "127.0.0.1"
    for name in ("cluster.yaml", "examples/services/compose.yaml"):
        text = (ROOT / name).read_text()
        assert yaml.safe_load(text)
        assert "0.0.0.0:" not in text and "dashboard-host=0.0.0.0" not in text
