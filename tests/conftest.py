"""What tests share: empty MLflow stores and real servers, and the finished quickstart, run once for all who look at it.

mlflow_database ──> tracking_uri      a SQLite store of the test's own
                └─> mlflow_server     a server for a module
quickstart_home ──> quickstart_server
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
"""The project's folder."""

# Before anybody imports torch: the processes of the tests share the cores, and small tensors are slower on several threads, much slower there.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings that MLflow's own code raises when it first touches a SQLite store; ours are errors."""
    config.addinivalue_line("filterwarnings", "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


QUICKSTART = ("test_mlflow_ui.py", "test_quickstart.py", "test_readme.py")
"""Files that look at the quickstart."""

SLOW = ("quickstart", "test_driver.py", "test_actor.py", "test_conformance.py")
"""Groups of tests that take minutes: begun first, so that the last process does not work alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow groups come first, then files that may start Ray."""
    items.sort(key=lambda item: (group(item.nodeid) not in SLOW, not item.nodeid.startswith("tests/tuning/")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Every group of tests runs in one process.

    Not by marks: pytest-xdist 3.8 does not see them with pytest 9.2 (pytest-dev/pytest-xdist#1386), and says nothing.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped here
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # else groups of many tests would come before slow ones
    return Groups(config, log)


def group(nodeid: str) -> str:
    """Tests of one file, which may share what takes seconds, are a group, and so are all that look at the quickstart, which is then run once."""
    path = nodeid.partition("::")[0]
    name = path.rpartition("/")[2]
    return "quickstart" if name in QUICKSTART else name if name in SLOW else path


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables and nothing in them; making one takes seconds, copying it none."""
    from study.tracking.store import connect

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def tracking_uri(mlflow_database: Path, tmp_path: Path) -> str:
    """A real, empty MLflow store of the test's own."""
    return f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"


@pytest.fixture(scope="module")
def mlflow_server(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on loopback, with an empty store of its own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    with serving(f"sqlite:///{folder}/mlflow.db", folder, "--artifacts-destination", str(folder / "artifacts")) as address:
        yield address


@pytest.fixture(scope="session")
def quickstart_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study home with the finished quickstart, run once for all tests as a user runs it; more than a minute."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    home = (tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.getbasetemp()) / "quickstart"
    home.mkdir()  # fails in a second process: a file that looks at the quickstart is missing in QUICKSTART
    run_study("run", "search_spaces/quickstart.yaml", "--home", str(home), timeout=280)
    return home


@pytest.fixture(scope="session")
def quickstart_server(quickstart_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on loopback, on the store of the finished quickstart."""
    with serving(f"sqlite:///{quickstart_home}/mlflow.db", tmp_path_factory.mktemp("server")) as address:
        yield address


def run_study(*arguments: str, timeout: float = 120) -> str:
    """Runs the command line in a process of its own, in the project's folder, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "study", *arguments], cwd=ROOT, env=own_environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"study {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def own_environment() -> dict[str, str]:
    """This environment without what would send a study elsewhere; this tree comes first, installed or not."""
    kept = {name: value for name, value in os.environ.items() if name not in ("STUDY_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    return {**kept, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}


@contextmanager
def serving(store: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of a real MLflow server on loopback while the block runs; its log goes into the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    host, port = address.split(":")
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port, "--workers", "1", "--backend-store-uri", store, *options],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not answers(address):
            try:
                server.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(f"the MLflow server did not start: {(folder / 'log.txt').read_text()}")
        yield f"http://{address}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    """Whether an MLflow server answers there."""
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
