"""Two machines, as network namespaces of this one: a study that is submitted to one trains on both."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import own_environment
from tests.rays import Head, a_head, a_node

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

FIRST, SECOND = "10.231.7.1", "10.231.7.2"


class Machines(NamedTuple):
    """What stands before a command to run it on one of the two."""

    first: list[str]
    second: list[str]


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Two namespaces with one cable between them."""
    names = [f"study{os.getpid()}{end}" for end in "ab"]
    ends = [f"st{os.getpid() % 100_000}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here (iproute2)")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        for name, end, address in zip(names, ends, (FIRST, SECOND), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Machines(*(["ip", "netns", "exec", name] for name in names))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


MODEL = """
import ray
from pathlib import Path
from torch import nn

def wide():
    if ray.is_initialized():
        with (Path(__file__).parent / {seen!r}).open("a") as file:
            file.write(f"{{ray.util.get_node_ip_address()}}\\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""
"""The user's own code, which says where it is called."""

SPEC = """
name: two
trial:
  data: {train_size: 320}
  model: {name: "import:nets:wide"}
  schedule: {epochs: 300, shape: constant}
space:
  optimizer.lr: {low: 1e-2, high: 1, log: true}
search: {sampler: random, trials: 4}
resources: {engine: solo}
"""


def test_a_study_trains_on_both_machines(machines: Machines, mlflow_database: Path, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    shutil.copy(mlflow_database, tmp_path / "studies" / "mlflow.db")
    project = tmp_path / "project"
    project.mkdir()
    (project / "nets.py").write_text(MODEL.format(seen=str(tmp_path / "seen")))
    (project / "two.yaml").write_text(SPEC)
    with a_head(tmp_path, FIRST, machines.first, cpus=1) as head:
        options = (f"--address={FIRST}:{head.port}", f"--node-ip-address={SECOND}", "--num-cpus=1")
        with a_node(tmp_path / "node.txt", {**head.environment, "STUDY_HOME": str(head.home)}, machines.second, *options):
            wait_for_nodes(2, head, machines, project)
            study("submit", "two.yaml", "--wait", head=head, machines=machines, project=project)
            found = json.loads(study("status", "two", "--json", head=head, machines=machines, project=project))
    assert (found["state"], found["trials"]["completed"]) == ("finished", 4)
    assert {FIRST, SECOND} <= set((tmp_path / "seen").read_text().split())


def study(*words: str, head: Head, machines: Machines, project: Path, code: int = 0) -> str:
    """A command on the first machine."""
    command = [*machines.first, sys.executable, "-m", "study", *words, "--address", head.address]
    done = subprocess.run(command, cwd=project, env={**own_environment(), **head.environment}, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def wait_for_nodes(number: int, head: Head, machines: Machines, project: Path) -> None:
    """Until the doctor sees so many nodes, all of which see the home."""
    deadline = time.monotonic() + 400
    while True:
        checks = json.loads(study("doctor", "--json", head=head, machines=machines, project=project))["checks"]
        [nodes] = [check for check in checks if check["name"] == "nodes"]
        if nodes["message"].endswith(f"({number})"):
            assert nodes["state"] == "ok"
            return
        assert time.monotonic() < deadline, nodes
