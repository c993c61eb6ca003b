"""Real Rays for tests: started as a user starts them, with a token, on ports of their own, and ended by their process ids."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import own_environment

STARTED = "Ray runtime started."
"""What `ray start` prints once it has."""

TRIES = 4
"""Ray gives up on a node that does not join within 30 seconds, which a busy machine may not let it."""


class Head(NamedTuple):
    """A real Ray cluster with token authentication on."""

    address: str
    """Of its dashboard."""
    environment: dict[str, str]
    """Of a client that knows the token."""
    home: Path
    token: str
    port: int
    """At which further nodes join."""


@contextmanager
def a_head(folder: Path, host: str = "127.0.0.1", enter: Sequence[str] = (), cpus: int = 2) -> Iterator[Head]:
    """`ray start --head`.

    Args:
        folder: For its log, its token and its study home.
        host: The address that its dashboard listens on.
        enter: What stands before each command, to run it elsewhere.
        cpus: How many Ray believes in.
    """
    home = folder / "studies"
    home.mkdir(exist_ok=True)
    (folder / "token").write_text(secrets.token_hex(32))
    known = {**own_environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    port, dashboard, client, agent = free_ports(4)
    options = [f"--num-cpus={cpus}", f"--port={port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard}"]
    options += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    if host != "127.0.0.1":
        options.append(f"--node-ip-address={host}")
    address = f"http://{host}:{dashboard}"
    with a_node(folder / "head.txt", {**known, "STUDY_HOME": str(home)}, enter, "--head", *options):
        deadline = time.monotonic() + 120
        while asked(address, enter) != "401":
            assert time.monotonic() < deadline, (folder / "head.txt").read_text()
            time.sleep(0.3)
        yield Head(address, known, home, (folder / "token").read_text(), port)


@contextmanager
def a_node(log: Path, environment: Mapping[str, str], enter: Sequence[str], *options: str) -> Iterator[None]:
    """`ray start` while the block lasts; it takes its own processes along, and those of no other Ray.

    In a temporary directory of its own, as on a machine of its own: a node that is to run a job unpacks the job's files anew, and those that
    another node unpacked in the same place would be gone from under its processes (ray 2.60).
    """
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(3)}"  # Ray's sockets need a short path
    try:
        with _a_node_in(temporary, log, environment, enter, *options):
            yield
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _a_node_in(temporary: Path, log: Path, environment: Mapping[str, str], enter: Sequence[str], *options: str) -> Iterator[None]:
    command = [*enter, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=200000000", "--disable-usage-stats"]
    command.append(f"--temp-dir={temporary}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(TRIES):
        with log.open("wb") as out:
            known = {**environment, "PATH": path, "PYTHONUNBUFFERED": "1"}
            ray = subprocess.Popen([*command, *options], env=known, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while ray.poll() is None and STARTED not in log.read_text():
                time.sleep(0.3)
            if ray.poll() is None:
                yield
                return
        finally:
            ray.terminate()
            ray.wait(timeout=120)
    pytest.fail(f"Ray did not start: {log.read_text()}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def asked(address: str, enter: Sequence[str] = ()) -> str:
    """The HTTP status with which a dashboard answers who shows no token; empty where nothing answers."""
    if enter:
        code = f"from tests.rays import asked; print(asked({address!r}))"
        done = subprocess.run([*enter, sys.executable, "-c", code], env=own_environment(), capture_output=True, text=True, timeout=60)
        return done.stdout.strip()
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError:
        return ""
