"""Shipping: what goes to a cluster with a study: the files of a folder, the modules that a spec may import, and settings.

folder ──packed──> zip: its files, study-spec.yaml      without hidden files, environments, caches, studies, keys
spec ──import_problems──> `import:` paths that the cluster would not find, or must not run
environment ──forwarded──> Settings(plain, secret)      from an allow-list
"""

import os
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from study.errors import ClusterError, Problem
from study.spec import StudySpec
from study.trial import IMPORT

SPEC = "study-spec.yaml"
"""The spec, overrides included, among the files that are shipped."""

LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "venv", "node_modules", "build", "dist"),
    *("studies", "mlruns", "mlartifacts", "mlflow.db*"),
    *("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "credentials*", "kubeconfig*"),
)
"""Names of files and folders that stay here: hidden ones (.git, .venv, .env, caches), built ones, studies, keys."""

MOST_BYTES = 100_000_000
"""Size of all files together beyond which nothing is shipped: Ray keeps packages in the memory of the head."""

PLAIN = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_S3_IGNORE_TLS"),
    *("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "GOOGLE_CLOUD_PROJECT"),
)
"""Variables that are forwarded to the process that runs the study as they are; a URI with a password is a secret."""

SECRET = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCESS_KEY", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
)
"""Variables that are forwarded sealed, or not at all."""

REMOTE = ("http://", "https://", "postgresql", "mysql", "mssql", "databricks")
"""How tracking URIs begin that mean the same on another machine."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Variables for the process that runs a study."""

    plain: Mapping[str, str]
    secret: Mapping[str, str]


def forwarded(environment: Mapping[str, str], tracking_uri: str | None = None) -> Settings:
    """The settings of this environment that a submitted study gets.

    Args:
        environment: Of this process.
        tracking_uri: The MLflow store, in place of `$MLFLOW_TRACKING_URI`.
    """
    found = {name: value for name in (*PLAIN, *SECRET) if (value := environment.get(name))}
    if not found.get("MLFLOW_TRACKING_URI", "").startswith(REMOTE):
        found.pop("MLFLOW_TRACKING_URI", None)  # a path of this machine
    if tracking_uri:
        found["MLFLOW_TRACKING_URI"] = tracking_uri
    secret = {name: value for name, value in found.items() if name in SECRET or _names_a_user(value)}
    return Settings({name: value for name, value in found.items() if name not in secret}, secret)


def _names_a_user(value: str) -> bool:
    return "@" in value.partition("://")[2].partition("/")[0]


def packed(spec: StudySpec, folder: Path, file: Path) -> None:
    """Writes a folder and a spec into a zip; the same content makes the same bytes, so that Ray takes each only once.

    Raises:
        ClusterError: if the folder is too large.
    """
    files, size = [], 0
    for path in shipped_files(folder):
        files.append(path)
        size += path.stat().st_size
        if size > MOST_BYTES:
            raise ClusterError(
                f"more than {MOST_BYTES / 1e6:.0f} MB would be sent to the cluster (largest so far: {_largest(files, folder)})",
                where=str(folder),
                remedy="submit from the folder of the code alone, and put data where the cluster reads it",
            )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            _add(archive, str(path.relative_to(folder)), path.read_bytes())
        _add(archive, SPEC, spec.to_yaml().encode())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def _largest(files: list[Path], folder: Path) -> str:
    largest = sorted(files, key=lambda path: -path.stat().st_size)[:3]
    return ", ".join(f"{path.relative_to(folder)} {path.stat().st_size / 1e6:.1f} MB" for path in largest)


def shipped_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that a cluster gets, in order; links to folders are not followed, and a study home is left out whatever its name."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not _is_left_out(name) and not any((here / name).glob("*/study.json")))
        for name in sorted(files):
            if not _is_left_out(name) and name != SPEC and (here / name).is_file():
                yield here / name


def _is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def import_problems(spec: StudySpec, folder: Path) -> Iterator[Problem]:
    """What forbids a spec to run on a cluster: its `import:` paths may name modules of the shipped folder and installed packages, nothing else.

    Not the standard library, whose functions (`os.system`) a spec could call with arguments of its own, and no module that other ways lead to.
    No module is imported to find out.
    """
    for where, path in import_paths(spec):
        module = path.removeprefix(IMPORT).partition(":")[0]
        top = module.partition(".")[0]
        if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
            if _is_left_out(top):
                yield Problem("import", f"is not sent to the cluster (got {path!r})", where, f"rename {top}, as names like it stay behind")
        elif top in sys.stdlib_module_names:
            yield Problem(
                "import", f"names a module of Python itself (got {path!r})", where, "name a function of yours, in the folder that is submitted"
            )
        elif not _is_installed(top):
            remedy = f"submit from the folder that holds {top}, or install it on the cluster"
            yield Problem("import", f"names a module that is neither in {folder} nor an installed package (got {path!r})", where, remedy)


def _is_installed(top: str) -> bool:
    """Whether a package stands where pip installs packages; one that is installed in place, from a folder of its own, counts, too."""
    paths = sysconfig.get_paths()
    if PathFinder.find_spec(top, [paths["purelib"], paths["platlib"]]) is not None:
        return True
    from importlib.metadata import packages_distributions

    return top in packages_distributions()


def import_paths(spec: StudySpec) -> Iterator[tuple[str, str]]:
    """Every `import:` path of a spec, with the field that holds it; arguments of the user's functions are none."""
    trial = spec.trial
    fields: list[tuple[str, Any]] = [("trial.data.name", trial.data.name), ("trial.model.name", trial.model.name), ("trial.loss", trial.loss)]
    fields += [(f"trial.metrics.{place}", path) for place, path in enumerate(trial.metrics)]
    fields += [(f"space.{path}", choice) for path, axis in spec.space.items() for choice in axis.choices or ()]
    yield from ((where, value) for where, value in fields if isinstance(value, str) and value.startswith(IMPORT))
