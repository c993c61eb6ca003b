"""Doctor: checks what a study needs before one is started, and says what to do about each thing that is missing.

ok    torch     torch 2.13.0, numpy 2.3.5, ...
warn  disk      0.9 GB free; a study of 100 trials writes about 1 GB
fail  tracking  the tracking store does not answer; start the server
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from study.cluster.sealing import token_of
from study.errors import ClusterError, StudyError
from study.tracking.names import masked
from study.tracking.store import connect, sqlite_path

DISTRIBUTION = "effective-lr-study"

EXTRAS = {
    "core": ("pydantic", "PyYAML"),
    "torch": ("torch", "numpy", "scikit-learn", "mlxtend", "safetensors"),
    "service": ("ray", "optuna", "mlflow", "pandas", "pyarrow", "scipy", "cmaes", "greenlet", "filelock", "matplotlib", "jinja2", "typer", "rich"),
}
"""What each part of the installation is known by."""

LITTLE_DISK, TOO_LITTLE_DISK = 2e9, 2e8
"""Bytes below which a full disk is near, and below which no study fits."""

SHARED_MEMORY = 3e8
"""Bytes of /dev/shm that a local Ray wants, for an object store of 200 MB."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was found about one thing."""

    name: str
    state: Literal["ok", "warn", "fail"]
    message: str
    remedy: str = ""


def examine(home: Path, tracking_uri: str) -> list[Check]:
    """Every check, in the order in which a study would come upon them."""
    return [
        *(_installed(extra, packages) for extra, packages in EXTRAS.items()),
        _device(),
        _home(home),
        _disk(home),
        _tracking(tracking_uri),
        *_shared_memory(),
        *_ray(),
        *_token(),
    ]


def examine_cluster(address: str, home: str, tracking_uri: str | None) -> list[Check]:
    """Whether a cluster can be reached from here, and what the doctor finds on its head: a short job asks there.

    Args:
        address: Of its dashboard.
        home: The study home there; empty for the cluster's own.
        tracking_uri: The MLflow store as the head reaches it.
    """
    from study.cluster.client import connect

    try:
        cluster = connect(address)
        there = [Check(**found) for found in cluster.checks(home, tracking_uri)]
    except StudyError as error:
        return [Check("cluster", "fail", problem.message, problem.remedy) for problem in error.problems]
    if cluster.asks_for_a_token:
        reached = Check("cluster", "ok", f"{cluster.url} takes this token")
    else:
        remedy = "start it with RAY_AUTH_MODE=token on every node; see docs/cluster.md"
        reached = Check("cluster", "warn", f"{cluster.url} asks for no token: whoever reaches it runs what they like", remedy)
    return [reached, *there]


def _installed(extra: str, packages: tuple[str, ...]) -> Check:
    """Whether the packages of an extra are there, in versions that are tested."""
    install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra != "core" else f"pip install {DISTRIBUTION}"
    found = {package: _version(package) for package in packages}
    if missing := [package for package, version in found.items() if version is None]:
        return Check(extra, "fail", f"not installed: {', '.join(missing)}", install)
    shown = ", ".join(f"{package} {version}" for package, version in found.items())
    if strange := [sentence for package, version in found.items() if (sentence := _outside(package, version or ""))]:
        return Check(extra, "warn", f"not what this version is tested with: {'; '.join(strange)}", install)
    return Check(extra, "ok", f"Python {platform.python_version()}, {shown}" if extra == "core" else shown)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _outside(package: str, version: str) -> str:
    """`ray 2.70.0 (wants >=2.60,<2.61)` where a version is outside its tested range; empty where it is inside, or the range is not known."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return ""
    for requirement in wanted:
        if requirement.name.lower() == package.lower() and not requirement.specifier.contains(version, prereleases=True):
            return f"{package} {version} (wants {requirement.specifier})"
    return ""


def _device() -> Check:
    """What torch would train on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", "fail", f"torch cannot be imported ({error})", f"pip install '{DISTRIBUTION}[torch]'")
    cores = os.cpu_count()
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check("device", "ok", f"GPU: {names}; {cores} CPU cores; trials use a GPU where resources.gpus_per_trial is above 0")
    if shutil.which("nvidia-smi"):
        return Check(
            "device", "warn", f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU", "install a CUDA build of torch"
        )
    return Check("device", "ok", f"{cores} CPU cores, no GPU")


def _nearest(path: Path) -> Path:
    """The path itself, or the deepest of its parents that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _home(home: Path) -> Check:
    """Whether studies can be written, without leaving anything behind."""
    there = _nearest(home)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Check("home", "fail", f"{home} cannot be written ({error.strerror})", "choose another with --home or $STUDY_HOME")
    return Check("home", "ok", f"{home} can be written" if there == home.absolute() else f"{home} will be created by the first study")


def _disk(home: Path) -> Check:
    free = shutil.disk_usage(_nearest(home)).free
    state: Literal["ok", "warn", "fail"] = "fail" if free < TOO_LITTLE_DISK else "warn" if free < LITTLE_DISK else "ok"
    return Check("disk", state, f"{free / 1e9:.1f} GB free for {home}", "" if state == "ok" else "free some, or choose another disk with --home")


def _tracking(uri: str) -> Check:
    """Whether the MLflow store answers; one that does not exist yet is not made."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return Check("tracking", "ok", f"{masked(uri)} will be created by the first study")
    try:
        experiments = connect(uri).experiments()
    except ImportError as error:
        return Check("tracking", "fail", f"MLflow cannot be imported ({error})", f"pip install '{DISTRIBUTION}[service]'")
    except StudyError as error:
        return Check("tracking", "fail", error.problems[0].message, error.problems[0].remedy)
    return Check("tracking", "ok", f"{masked(uri)} answers, with {len(experiments)} experiments")


def _shared_memory() -> list[Check]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return []
    size = shutil.disk_usage(shared).free
    if size < SHARED_MEMORY:
        remedy = "Ray will use a slower disk; in a container, start it with --shm-size=1g"
        return [Check("shared memory", "warn", f"{size / 1e6:.0f} MB free in /dev/shm", remedy)]
    return [Check("shared memory", "ok", f"{size / 1e9:.1f} GB free in /dev/shm")]


def _ray() -> list[Check]:
    """Whether the cluster that `RAY_ADDRESS` names can be reached."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return []
    remedy = "start the cluster, or unset RAY_ADDRESS to run on this machine alone"
    if address.startswith(("http://", "https://")):
        return [
            Check(
                "ray",
                "fail",
                f"RAY_ADDRESS is the address of a dashboard (got {address!r})",
                "name the cluster, such as host:6379 or ray://host:10001",
            )
        ]
    reached = _runs_here() if address == "auto" else _connects(address)
    return [
        Check("ray", "ok", f"the cluster at RAY_ADDRESS={address} answers")
        if reached
        else Check("ray", "fail", f"no cluster answers at RAY_ADDRESS={address}", remedy)
    ]


def _token() -> list[Check]:
    """Whether a token that others may read lies here."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or Path.home() / ".ray" / "auth_token")
    try:
        found = token_of(os.environ)
    except ClusterError as error:
        return [Check("token", "fail", f"{error.problems[0].message} (RAY_AUTH_TOKEN_PATH={named})", error.problems[0].remedy)]
    if os.environ.get("RAY_AUTH_MODE") == "token" and not found:
        return [Check("token", "fail", "RAY_AUTH_MODE is token, and there is none", "export RAY_AUTH_TOKEN_PATH, or `ray get-auth-token --generate`")]
    if found and not os.environ.get("RAY_AUTH_TOKEN") and path.stat().st_mode & 0o077:
        return [Check("token", "warn", f"{path} can be read by others; who has it runs what they like on the cluster", f"chmod 600 {path}")]
    return [Check("token", "ok", "a token for a Ray cluster is here")] if found else []


def _connects(address: str) -> bool:
    split = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        socket.create_connection((split.hostname or "", split.port or 10001), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _runs_here() -> bool:
    """Whether `ray.init("auto")` would find a cluster; asked in a process of its own, as connecting is for good."""
    probe = "import ray; ray.init('auto', log_to_driver=False, logging_level='ERROR')"
    try:
        return subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False
