"""Studies as jobs of a Ray cluster: how it is reached, and one walk from the first submission to the end of the study, on a real head."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from study.cli import main
from study.cluster.attempts import Attempt
from study.cluster.client import ANSWER, Cluster, connect
from study.errors import ClusterError, NameTaken, NotFound, NotRunning, SpecError
from study.spec import StudySpec, check
from study.tracking.recorder import COMMIT, git_commit
from tests.conftest import ROOT
from tests.rays import Head, a_head

TOKEN = "0" * 64


class Dashboard(BaseHTTPRequestHandler):
    """Answers the first question of a client as Ray's dashboard does, by the token that the server wants."""

    wanted: str = ""
    seen: list[str]

    def do_GET(self) -> None:
        """Open, or only for who has the token."""
        given = self.headers.get("Authorization", "")
        self.seen.append(given)
        status = 200 if not self.wanted or given == f"Bearer {self.wanted}" else 403 if given else 401
        body = json.dumps({"ray_version": "2.60.0"} if status == 200 else {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def dashboard() -> Iterator[tuple[str, type[Dashboard]]]:
    """The address of a server that asks for a token, and what it saw."""
    handler = type("Own", (Dashboard,), {"wanted": TOKEN, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Some of MLflow's are set by the door to it, once a test of this process went through.
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
        "STUDY_HOME",
        *(name for name in os.environ if name.startswith("MLFLOW_")),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("study.cluster.client.git_commit", lambda: "c0ffee")


def spec(name: str = "tiny", epochs: int = 2, **sections: Any) -> StudySpec:
    trial = {"data": {"train_size": 320}, "model": {"name": "mlp", "width": 8}, "schedule": {"epochs": epochs, "shape": "constant"}}
    space = {"optimizer.lr": {"low": 0.01, "high": 1.0, "log": True}}
    return check({"name": name, "trial": {**trial, **sections.pop("trial", {})}, "space": space, "search": {"trials": 2, "sampler": "random"}})


def test_a_cluster_that_asks_for_a_token_gets_it(dashboard: tuple[str, type[Dashboard]], tmp_path: Path) -> None:
    address, _ = dashboard
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for environment in ({"RAY_AUTH_TOKEN": TOKEN}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        assert connect(address, environment).asks_for_a_token
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert connect(address.removeprefix("http://"), {}).url == address


def test_a_cluster_that_asks_for_none_never_sees_it(dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, handler = dashboard
    handler.wanted = ""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray's own client would go there
    assert not connect(address, {"RAY_AUTH_TOKEN": TOKEN}).asks_for_a_token
    assert handler.seen and set(handler.seen) == {""}
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "the cluster asks for a token, and there is none here; export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_TOKEN": "1" * 64}, "the cluster refuses this token; compare RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "/nowhere: the token cannot be read (No such file or directory); "),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_told(dashboard: tuple[str, type[Dashboard]], environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(ClusterError) as caught:
        connect(dashboard[0], environment)
    assert complaint in str(caught.value)
    assert "1" * 64 not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1: no Ray cluster answers ("),
        ("ray://head:10001", "ray://head:10001: is not the address of a dashboard; name it, as http://head:8265"),
    ],
)
@pytest.mark.parametrize("command", [("list",), ("status", "tiny"), ("logs", "tiny"), ("stop", "tiny"), ("submit", "spec.yaml")])
def test_an_address_where_no_cluster_is_ends_with_two(
    address: str, complaint: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(spec().to_yaml())
    assert main([*command, "--address", address]) == 2
    out, err = capsys.readouterr()
    assert complaint in err and "Traceback" not in err
    assert out == ""


def test_the_doctor_says_that_a_cluster_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", "http://127.0.0.1:1", "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out)["checks"]
    assert (found["name"], found["state"]) == ("cluster", "fail")
    assert "start the cluster" in found["remedy"]


class Job(NamedTuple):
    """A job as Ray's client shows it."""

    submission_id: str
    status: str
    metadata: dict[str, str]
    message: str = ""
    driver_exit_code: int | None = None


class Jobs:
    """A cluster's jobs without a cluster: what was submitted stays as it is."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = list(jobs)
        self.environments: list[dict[str, Any]] = []
        self.found: dict[str, Any] | None = None
        """The status of the study that a home there holds."""

    def list_jobs(self) -> list[Job]:
        """All of them."""
        return self.jobs

    def submit_job(self, *, entrypoint: str, metadata: dict[str, str], submission_id: str = "", runtime_env: dict[str, Any] | None = None) -> str:
        """One more, which waits; one that reads has read."""
        if runtime_env is not None:
            self.environments.append(runtime_env)
        self.jobs.append(Job(submission_id, "PENDING" if submission_id else "SUCCEEDED", metadata))
        return submission_id

    def get_job_info(self, submission_id: str) -> Job:
        """The one of that id."""
        return next(job for job in self.jobs if job.submission_id == submission_id)

    def get_job_logs(self, submission_id: str) -> str:
        """What it has read."""
        return f"Running entrypoint\n{ANSWER}{json.dumps([self.found])}\n"

    def delete_job(self, submission_id: str) -> bool:
        """Forgets it."""
        self.jobs.remove(self.get_job_info(submission_id))
        return True


def job(number: int, status: str, home: str = "/mnt/studies", spec_hash: str = "", **more: Any) -> Job:
    known = {"study": "tiny", "attempt": str(number), "home": home, "spec_hash": spec_hash or spec().spec_hash()}
    return Job(f"tiny-{number}", status, known, **more)


def cluster(*jobs: Job, token: str = TOKEN) -> tuple[Cluster, Jobs]:
    client = Jobs(*jobs)
    return Cluster("http://head:8265", client, token), client  # type: ignore[arg-type]


def test_a_study_is_submitted_again_under_the_next_number(tmp_path: Path) -> None:
    foreign = Job("raysubmit_1", "RUNNING", {})
    there, client = cluster(job(10, "STOPPED"), job(9, "FAILED"), foreign)
    attempt, kept = there.submit(spec(), tmp_path, home="/mnt/studies")
    assert (attempt.id, attempt.number, attempt.running, kept) == ("tiny-11", 11, True, [])
    assert there.latest("tiny") == attempt
    assert [each.id for each in there.latest_of_each()] == ["tiny-11"]
    assert client.environments[0]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300", "STUDY_GIT_COMMIT": "c0ffee"}


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_study_that_runs_there_is_not_submitted_twice(status: str, tmp_path: Path) -> None:
    there, client = cluster(job(1, "FAILED"), job(2, status))
    with pytest.raises(ClusterError, match=r"tiny: this study runs there already, as tiny-2; follow it with `study logs tiny -f --address URL`"):
        there.submit(spec(), tmp_path, home="/elsewhere")
    assert client.environments == []


def test_a_name_that_belongs_to_another_study_there_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    there, client = cluster(job(1, "STOPPED"))
    client.found = {"study_id": "tiny-1234", "spec_hash": spec().spec_hash()}
    with pytest.raises(NameTaken, match="submitted as tiny-1"):
        there.submit(spec(epochs=3), tmp_path, home="/mnt/studies")
    assert client.environments == []
    assert [one.submission_id for one in client.jobs] == ["tiny-1"]
    assert there.submit(spec(epochs=3), tmp_path, home="/mnt/others")[0].number == 2


@pytest.mark.parametrize("found", [None, {"study_id": "tiny-5678", "spec_hash": spec(epochs=3).spec_hash()}], ids=["deleted", "replaced"])
def test_a_name_is_free_again_once_the_study_is_gone_from_the_home(found: dict[str, Any] | None, tmp_path: Path) -> None:
    there, client = cluster(job(1, "STOPPED"))
    client.found = found
    assert there.submit(spec(epochs=3), tmp_path, home="/mnt/studies")[0].number == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"home": "studies"}, r"--home: the home on the cluster must be an absolute path \(got 'studies'\)"),
        ({"requirements": "missing.txt"}, r"--pip: no such file among those that are sent from .* \(got 'missing.txt'\)"),
        ({"requirements": "../outside.txt"}, r"--pip: no such file among those that are sent from .* \(got '../outside.txt'\)"),
    ],
)
def test_what_the_cluster_could_not_find_is_refused(options: dict[str, str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=complaint):
        cluster()[0].submit(spec(), tmp_path, **options)  # type: ignore[arg-type]


def test_a_spec_that_imports_what_it_must_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"trial.model.name: names a module of Python itself \(got 'import:os:system'\)"):
        cluster()[0].submit(spec(trial={"model": {"name": "import:os:system"}}), tmp_path)


def test_secrets_are_sealed_or_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    there, client = cluster()
    assert there.submit(spec(), tmp_path, tracking_uri="http://me:hunter3@head:5000")[1] == []
    shown = json.dumps(client.environments) + json.dumps(client.jobs)
    assert "hunter" not in shown and "head:5000" not in shown
    assert client.environments[0]["env_vars"].keys() == {"AWS_DEFAULT_REGION", "STUDY_SEALED", "STUDY_GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"}
    anybody, client = cluster(token="")
    assert anybody.submit(spec(), tmp_path)[1] == ["MLFLOW_TRACKING_PASSWORD"]
    assert client.environments[0]["env_vars"].keys() == {"AWS_DEFAULT_REGION", "STUDY_GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"}


def test_a_submitted_study_knows_the_commit_that_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, client = cluster()
    there.submit(spec(), tmp_path)
    [environment] = client.environments
    monkeypatch.chdir(tmp_path)  # as on the head: no repository
    monkeypatch.delenv(COMMIT, raising=False)
    assert git_commit() == ""
    monkeypatch.setenv(COMMIT, environment["env_vars"][COMMIT])
    assert git_commit() == "c0ffee"


def test_a_study_that_was_never_submitted_is_told_with_those_that_were() -> None:
    there, _ = cluster(job(1, "STOPPED"))
    with pytest.raises(NotFound, match=r"http://head:8265: no study of this name was submitted \(got 'gains'\); studies there: tiny"):
        there.latest("gains")


@pytest.mark.parametrize(("status", "remedy"), [("STOPPED", "submit it again to go on"), ("SUCCEEDED", "it has finished")])
def test_a_study_that_has_ended_cannot_be_stopped(status: str, remedy: str) -> None:
    with pytest.raises(NotRunning, match=rf"this study does not run \(its last attempt, tiny-1, is {status}\); {remedy}"):
        cluster(job(1, status))[0].stop("tiny")


@pytest.mark.parametrize(("status", "exit_code", "code"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 130)])
def test_an_attempt_ends_with_the_code_of_its_study(status: str, exit_code: int | None, code: int) -> None:
    assert Attempt("tiny-1", "tiny", 1, "", "", status, exit_code=exit_code).code == code


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Iterator[Head]:
    """A real Ray of one machine, with an empty MLflow store in its study home."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "studies").mkdir()
    shutil.copy(mlflow_database, folder / "studies" / "mlflow.db")
    with a_head(folder) as head:
        yield head


MODEL = """
import os
from pathlib import Path
from torch import nn

def wide():
    with Path(os.environ["STUDY_HOME"], "password").open("a") as file:
        file.write(f"{os.environ.get('MLFLOW_TRACKING_PASSWORD')}\\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""
"""The user's own code, which says what it finds in the environment."""


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_study_is_submitted_followed_stopped_and_gone_on_with(head: Head, tmp_path: Path) -> None:
    """The whole walk, each command in a process of its own as a user starts it."""
    address = ("--address", head.address)

    def study(*words: str, code: int = 0, token: str = "") -> tuple[str, str]:
        environment = {**head.environment, "MLFLOW_TRACKING_PASSWORD": "hunter2", **({"RAY_AUTH_TOKEN": token} if token else {})}
        command = [sys.executable, "-m", "study", *words, *address]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    (tmp_path / "nets.py").write_text(MODEL)
    lasting = spec("halted", epochs=100_000, trial={"model": {"name": "import:nets:wide"}})
    (tmp_path / "halted.yaml").write_text(lasting.to_yaml())

    _, said = study("submit", "halted.yaml", code=2, token="1" * 64)
    assert said.startswith(f"{head.address}: the cluster refuses this token; ") and said.count("\n") == 1

    began = time.monotonic()
    submitted = json.loads(study("submit", "halted.yaml", "--json")[0])
    assert (submitted["id"], submitted["status"]) == ("halted-1", "PENDING")
    assert time.monotonic() - began < 100  # does not wait for the study
    assert "this study runs there already, as halted-1" in study("submit", "halted.yaml", code=2)[1]
    assert study("submit", "halted.yaml", "--json", code=2)[0].count("this study runs there already") == 1

    deadline = time.monotonic() + 500
    while (found := json.loads(study("status", "halted", "--json")[0]))["trials"]["running"] == 0:
        assert found["job"]["status"] in ("PENDING", "RUNNING") and time.monotonic() < deadline, study("logs", "halted")[0]
        time.sleep(1)
    assert (found["state"], found["job"]["status"]) == ("running", "RUNNING")
    following = subprocess.Popen(
        [sys.executable, "-m", "study", "logs", "halted", "-f", *address], env=head.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )

    stopped = json.loads(study("stop", "halted", "--json")[0])
    assert (stopped["state"], stopped["job"]["status"]) == ("interrupted", "STOPPED")
    assert stopped["trials"]["running"] == 0 and stopped["trials"]["interrupted"] > 0
    assert "running" in following.communicate(timeout=60)[0] and following.returncode == 0
    assert "this study does not run (its last attempt, halted-1, is STOPPED)" in study("stop", "halted", code=2)[1]
    assert {run["status"] for run in _trial_runs(head.home)} == {"KILLED"}

    shorter = ("--set", "search.trials=2", "--set", "budget.wall=30s")  # changes that a study may see
    printed, followed = study("submit", "halted.yaml", "--wait", *shorter, code=1)
    assert printed == "halted-2\n" and "no trial trained to its end" in followed
    [again] = json.loads(study("list", "--json")[0])
    assert (again["study_id"], again["job"]["attempt"], again["state"]) == (stopped["study_id"], 2, "failed")
    assert {run["status"] for run in _trial_runs(head.home)} == {"KILLED"}
    assert len(_trial_runs(head.home)) == 2

    seen = (head.home / "password").read_text().split()
    assert "hunter2" in seen and "None" in seen  # the process that speaks to MLflow has it, those that train do not
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        shown = answer.read().decode()
    assert "halted-1" in shown and "hunter2" not in shown

    checks = {one["name"]: one for one in json.loads(study("doctor", "--json")[0])["checks"]}
    assert checks["cluster"]["message"].endswith("takes this token")
    assert checks["nodes"]["message"] == f"{head.home} is the same folder on all nodes (1)"


def _trial_runs(home: Path) -> list[dict[str, Any]]:
    """The MLflow runs of trials."""
    query = "select status from runs join tags on tags.run_uuid = runs.run_uuid where tags.key = 'study.trial_id'"
    with sqlite3.connect(home / "mlflow.db") as db:
        return [{"status": status} for (status,) in db.execute(query)]
