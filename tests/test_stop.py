"""`study stop` on this machine: what Ctrl-C does, from another terminal."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from study.cli import main
from tests.conftest import own_environment

SPEC = """
name: halted
trial:
  data: {train_size: 320}
  model: {name: mlp, width: 16}
  schedule: {epochs: 100000, shape: constant}
space:
  optimizer.lr: {low: 1e-2, high: 1, log: true}
search: {sampler: random, trials: 2}
resources: {engine: solo}
"""


@contextmanager
def running(command: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does not outlive the block."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=own_environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=120)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_running_study_reports_closes_its_runs_and_can_be_gone_on_with(
    tmp_path: Path, mlflow_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(mlflow_database, home / "mlflow.db")
    (tmp_path / "halted.yaml").write_text(SPEC)
    command = [sys.executable, "-m", "study", "run", "halted.yaml", "--home", str(home)]
    with running(command, tmp_path) as run:
        deadline = time.monotonic() + 400
        while True:
            code, printed = main(["status", "halted", "--home", str(home), "--json"]), capsys.readouterr().out
            if code == 0 and json.loads(printed)["trials"]["running"]:
                break
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.3)
        assert main(["stop", "halted", "--home", str(home), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert run.wait(timeout=120) == 130
    assert found["state"] == "interrupted"
    assert found["trials"]["running"] == 0 and found["trials"]["interrupted"] > 0
    with sqlite3.connect(home / "mlflow.db") as db:
        assert {status for (status,) in db.execute("select status from runs")} == {"KILLED"}
    assert main(["stop", "halted", "--home", str(home)]) == 2
    assert "no process runs this study (it is interrupted); `study run` goes on with it" in capsys.readouterr().err
