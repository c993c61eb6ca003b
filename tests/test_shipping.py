"""What goes to a cluster with a study: which files, which modules, which settings, and how secrets travel."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from study.cli import main
from study.cluster import shipping
from study.cluster.sealing import seal, token_of, unseal
from study.cluster.shipping import PLAIN, SECRET, SPEC, forwarded, import_problems, packed, shipped_files
from study.errors import ClusterError
from study.spec import StudySpec, check, load_spec


def spec(**trial: Any) -> StudySpec:
    return check({"name": "tiny", "trial": trial, "space": {"optimizer.lr": {"low": 0.1, "high": 1}}, "search": {"trials": 2}})


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_hidden_files_environments_studies_and_keys_stay_here(tmp_path: Path) -> None:
    sent = ("nets.py", "data/images.npz", "package/__init__.py", "package/deep/model.py", "requirements.txt")
    write(tmp_path, *sent)
    write(tmp_path, ".env", ".git/config", ".venv/bin/python", "venv/bin/python", "package/__pycache__/model.pyc", "build/lib.py")
    write(tmp_path, "studies/a/study.json", "elsewhere/a/study.json", "mlflow.db", "mlruns/0/meta.yaml", "server.pem", "id_rsa", "credentials.json")
    (tmp_path / "outside").symlink_to("/etc")
    assert {str(path.relative_to(tmp_path)) for path in shipped_files(tmp_path)} == set(sent)


def test_the_same_content_makes_the_same_package_with_the_spec_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    write(folder, "nets.py", SPEC)
    packages = [tmp_path / "one.zip", tmp_path / "two.zip"]
    for package in packages:
        (folder / "nets.py").touch()
        packed(spec(seed=3), folder, package)
    assert packages[0].read_bytes() == packages[1].read_bytes()
    with zipfile.ZipFile(packages[0]) as archive:
        assert archive.namelist() == ["nets.py", SPEC]
        archive.extractall(tmp_path / "there")
    assert load_spec(tmp_path / "there" / SPEC) == spec(seed=3)


def test_a_folder_that_is_too_large_is_told_with_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "MOST_BYTES", 1_000_000)
    (tmp_path / "images.npz").write_bytes(bytes(2_000_000))
    with pytest.raises(ClusterError, match=r"more than 1 MB would be sent to the cluster \(largest so far: images.npz 2.0 MB\); submit from"):
        packed(spec(), tmp_path, tmp_path.parent / "package.zip")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("import:nets:wide", None),
        ("import:package.deep:wide", None),
        ("import:torch.nn:Identity", None),
        ("import:os:system", "names a module of Python itself"),
        ("import:subprocess:Popen", "names a module of Python itself"),
        ("import:builtins:eval", "names a module of Python itself"),
        ("import:elsewhere:wide", "names a module that is neither in "),
        ("import:build.nets:wide", "is not sent to the cluster"),
    ],
)
def test_imports_come_from_the_folder_or_from_packages(path: str, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    write(folder, "nets.py", "package/deep.py", "build/nets.py")
    write(tmp_path / "path", "elsewhere.py")
    monkeypatch.syspath_prepend(tmp_path / "path")  # importable here, but by no way that leads to the cluster
    problems = [*import_problems(spec(model={"name": path}, metrics=["import:nets:metric"]), folder)]
    assert [problem.where for problem in problems] == ([] if complaint is None else ["trial.model.name"])
    assert complaint is None or problems[0].message.startswith(complaint)


def test_imports_that_an_axis_or_a_loss_names_are_seen() -> None:
    studied = check(
        {
            "name": "tiny",
            "trial": {"loss": "import:os:a", "data": {"name": "import:os:b"}, "metrics": ["import:os:c"], "model": {"args": {"x": "import:os:no"}}}
            | {"model": {"name": "import:os:d", "args": {"x": "import:os:no"}}},
            "space": {"model.name": {"choices": ["import:os:e", "import:os:f"]}},
            "search": {"trials": 2},
        }
    )
    assert {path[-1] for _, path in shipping.import_paths(studied)} == set("abcdef")


def test_the_head_refuses_such_a_spec_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from study.job import main as job

    (tmp_path / SPEC).write_text(spec(model={"name": "import:os:system"}).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert job(["run", SPEC, "--home", str(tmp_path / "home")]) == 2
    assert "trial.model.name: names a module of Python itself (got 'import:os:system')" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_the_head_has_no_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from study.job import main as job

    monkeypatch.delenv("STUDY_HOME", raising=False)
    (tmp_path / SPEC).write_text(spec().to_yaml())
    monkeypatch.chdir(tmp_path)
    assert job(["run", SPEC]) == 2
    assert "submit with --home DIR, or set STUDY_HOME for `ray start` on every node" in capsys.readouterr().err


def test_settings_are_forwarded_from_a_list_and_nothing_else() -> None:
    everything = dict.fromkeys((*PLAIN, *SECRET), "x") | {"MLFLOW_TRACKING_URI": "http://head:5000"}
    found = forwarded({**everything, "HOME": "/home/me", "OPENAI_API_KEY": "x", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "x"})
    assert found.plain.keys() == set(PLAIN)
    assert found.secret.keys() == set(SECRET)


@pytest.mark.parametrize(
    ("inherited", "given", "plain", "secret"),
    [
        ("sqlite:////home/me/mlflow.db", None, None, None),
        ("/home/me/mlruns", None, None, None),
        ("http://head:5000", None, "http://head:5000", None),
        ("http://head:5000", "sqlite:////mnt/mlflow.db", "sqlite:////mnt/mlflow.db", None),
        ("postgresql://me:x@head/mlflow", None, None, "postgresql://me:x@head/mlflow"),
        ("http://head:5000", "https://me:x@there", None, "https://me:x@there"),
    ],
)
def test_a_tracking_uri_goes_along_where_it_means_the_same(inherited: str, given: str | None, plain: str | None, secret: str | None) -> None:
    found = forwarded({"MLFLOW_TRACKING_URI": inherited}, given)
    assert (found.plain.get("MLFLOW_TRACKING_URI"), found.secret.get("MLFLOW_TRACKING_URI")) == (plain, secret)


def test_what_is_sealed_is_opened_by_the_same_token_alone() -> None:
    sealed = seal({"MLFLOW_TRACKING_PASSWORD": "hunter2"}, "token")
    assert "hunter2" not in sealed and "PASSWORD" not in sealed
    assert unseal(sealed, "token") == {"MLFLOW_TRACKING_PASSWORD": "hunter2"}
    for wrong in ("other", ""):
        with pytest.raises(ClusterError, match="STUDY_SEALED: the settings that came with this study are sealed with another token"):
            unseal(sealed, wrong)


def test_the_head_opens_sealed_settings_and_keeps_them_to_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    from study.job import ANSWER
    from study.job import main as job

    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setenv("STUDY_SEALED", seal({"MLFLOW_TRACKING_PASSWORD": "hunter2"}, "token"))
    assert job(["status", "nothing=/nowhere"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}{json.dumps([None])}\n"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
    assert "STUDY_SEALED" not in os.environ


def test_the_token_is_taken_from_where_ray_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_of({}) == ""
    write(tmp_path, ".ray/auth_token", "mine")
    assert token_of({}) == ".ray/auth_token"
    assert token_of({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "mine")}) == "mine"
    assert token_of({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "mine"), "RAY_AUTH_TOKEN": " first\n"}) == "first"


def test_submitting_needs_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "spec.yaml"]) == 2
    assert "--address" in capsys.readouterr().err
