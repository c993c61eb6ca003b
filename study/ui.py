"""UI: the MLflow UI on a study home, as a server of our own that ends with us.

uri ── checked ──> mlflow server ── answers ──> its address on stdout ── Ctrl-C ──> ended, with all its processes
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request

from study.errors import InputError, NotFound, TrackingUnavailable
from study.tracking.names import masked
from study.tracking.store import sqlite_path

READY_WITHIN = 120.0
"""Seconds that the MLflow server may take to start."""


def show(uri: str, host: str, port: int) -> None:
    """Runs the MLflow UI on a tracking store until Ctrl-C; of a store that is a server itself, prints its address.

    Raises:
        NotFound: if nothing was recorded in the store yet.
        InputError: if the port is taken.
        TrackingUnavailable: if the server ends by itself.
    """
    if uri.startswith(("http://", "https://")):
        print(f"this MLflow store has a UI of its own: {masked(uri)}")
        return
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise NotFound("nothing was recorded here yet", where=str(path), remedy="run a study first, or name another home with --home")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port} ({error.strerror})", remedy="choose another with --port") from None
    _serve(uri, host, port)


def _serve(uri: str, host: str, port: int) -> None:
    """Runs the MLflow server until Ctrl-C, and takes its processes along when this one is told to end."""
    # SIGINT too: where this was started in the background of a script, Python leaves it ignored.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    # In the environment the URI, which may hold a password, is hidden from other users' process lists.
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
        try:
            print("starting the MLflow UI ...", file=sys.stderr)
            if _ready(server, f"http://{host}:{port}"):
                print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
                server.wait()
            log.seek(0)
            raise TrackingUnavailable("the MLflow server ended by itself", remedy=f"its last words:\n{masked(log.read()[-2000:])}")
        except KeyboardInterrupt:
            pass
        finally:
            _end(server)


def _ready(server: "subprocess.Popen[bytes]", url: str) -> bool:
    """Waits until the server answers; False if it ended before."""
    for _ in range(int(READY_WITHIN / 0.3)):
        try:
            server.wait(timeout=0.3)
            return False
        except subprocess.TimeoutExpired:
            pass
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return True
        except OSError:
            continue
    return False


def _end(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
