"""What the README says is so: its commands run, its specs are valid, its Python works, its files and links are there."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from study.cli import main
from study.spec import load_spec
from tests.conftest import ROOT, own_environment

README = (ROOT / "README.md").read_text("utf-8")

SETUP = ("make demo", "make test")
"""Installs things; what they run is checked, not done."""

UI = "study ui"
"""Runs until Ctrl-C."""


def blocks(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every shell command, in order, without comments."""
    lines = [re.sub(r"(^|\s+)#.*", "", line) for block in blocks("(?:sh|console)") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(quickstart_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the README speaks of, where `make demo` has been run: its environment, its commands and its study are there."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("search_spaces", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "docs" / "effective_lr.svg").unlink()
    shorten(folder / "search_spaces" / "readme.yaml")
    shutil.copytree(quickstart_home, folder / "studies")
    (folder / "bin").mkdir()
    for name, arguments in (("study", "-m study"), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    return folder


def shorten(spec: Path) -> None:
    """The study behind the picture, with a tenth of its epochs: that its commands run does not take the picture itself."""
    text = spec.read_text("utf-8")
    assert "epochs: 20," in text
    spec.write_text(text.replace("epochs: 20,", "epochs: 2,"), "utf-8")


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    return {**own_environment(), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.timeout(600)
def test_every_command_runs(folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as a user starts it; of a command that only reads, further examples run in this process, which spares seconds of imports each."""
    monkeypatch.chdir(folder)
    for name in ("STUDY_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    ran = [command for command in commands() if command not in (*SETUP, UI)]
    used = {command.split()[1] for command in ran if command.startswith("study ")}
    assert used == {"run", "list", "status", "doctor", "schema", "validate", "plan", "best", "verify", "export", "trace", "init", "report"}
    started: set[str] = set()
    for command in ran:
        program, name, *arguments = shlex.split(command)
        if program == "study" and (name in ("init", "report") or (name in started and name in ("plan", "best", "export"))):
            assert main([name, *arguments]) == 0, command
            continue
        started.add(name)
        done = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "</svg>" in (folder / "docs" / "effective_lr.svg").read_text("utf-8")
    assert {path.parent.name for path in (folder / "studies").glob("*/best.yaml")} == {"quickstart", "readme", "user-model"}
    assert (folder / "best.json").exists() and (folder / "study.schema.json").exists()


@pytest.mark.long
def test_the_ui_starts_and_ends_with_ctrl_c(folder: Path, environment: dict[str, str]) -> None:
    assert UI in commands()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*UI.split(), "--port", str(port)]
    ui = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert ui.stdout is not None
        assert f"http://127.0.0.1:{port}" in ui.stdout.readline()
        ui.send_signal(signal.SIGINT)
        assert ui.wait(timeout=60) == 0
    finally:
        if ui.poll() is None:
            ui.terminate()  # which ends its server, too
        ui.communicate(timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_of_the_set_up_run_what_the_readme_says(target: str) -> None:
    assert f"make {target}" in commands()
    (said,) = re.findall(rf"^- `make {target}` (.*?)(?=^- |^$)", README, re.MULTILINE | re.DOTALL)
    documented = [command.replace("\n", " ") for command in re.findall(r"`((?:study|python) [^`]*)`", said)]
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.removeprefix(".venv/bin/") for line in planned if re.match(r"\.venv/bin/(study|python -m pytest)", line)] == documented


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_spec_is_valid(block: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(block, "utf-8")
    load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_works(block: str, folder: Path, environment: dict[str, str]) -> None:
    (folder / "block.py").write_text(block, "utf-8")
    done = subprocess.run([sys.executable, "-W", "error", "block.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^print\(.*?\)\s+# (.*)$", block, re.MULTILINE)
    assert done.stdout.splitlines()[: len(printed)] == printed


def test_the_tree_of_the_readme_is_the_tree_of_the_code() -> None:
    (tree,) = blocks("text")
    assert set(named_in(tree)) == {
        str(path.relative_to(ROOT)) for path in (ROOT / "study").rglob("*.py") if path.parent.name == "study" or path.stat().st_size
    }


def named_in(tree: str) -> Iterator[str]:
    """The Python files that a drawn tree names, with their folders."""
    folder = "study"
    for line in tree.splitlines():
        if found := re.match(r"├── (\w+)/", line):
            folder = f"study/{found[1]}"
        elif not line.startswith("│"):
            folder = "study"
        yield from (f"{folder}/{name}" for name in re.findall(r"\w+\.py\b", line))


def test_every_file_that_the_readme_points_to_is_there() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_picture_is_small_enough_for_a_repository() -> None:
    assert (ROOT / "docs" / "effective_lr.svg").stat().st_size < 200_000
