"""Removal: a study and all that it left behind, found first and removed then.

study ─found─> Leavings(folder, files, bytes, runs) ── asked ──> remove: MLflow's runs, then the folder
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.errors import HomeError, InputError
from study.home import Card, StudyFolder, tracking_uri_for
from study.tracking.names import masked
from study.tracking.store import connect, sqlite_path


@dataclass(frozen=True, slots=True)
class Leavings:
    """What a study left behind."""

    folder: StudyFolder
    card: Card
    files: int
    bytes: int
    tracking_uri: str
    runs: tuple[str, ...]
    """The ids of its MLflow runs, its own and those of its trials."""

    def document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "study_id": self.card.study_id,
            "name": self.card.name,
            "folder": str(self.folder.path),
            "files": self.files,
            "bytes": self.bytes,
            "runs": len(self.runs),
            "tracking_uri": masked(self.tracking_uri),
        }

    def __str__(self) -> str:
        runs = f"{len(self.runs)} MLflow runs in {masked(self.tracking_uri)}" if self.runs else "no MLflow runs"
        return f"{self.folder.path} ({self.files} files, {self.bytes / 1e6:.1f} MB) and {runs}"


def leavings(home: Path, name: str, tracking_uri: str | None = None) -> Leavings:
    """What there is of a study, in its home and in MLflow.

    Raises:
        NotFound: if the home has no study of that name.
        HomeError: if the folder is a link to somewhere else, or a process runs the study.
        InputError: if its runs are in another MLflow store than the one that is asked.
        TrackingUnavailable: if the MLflow store does not answer.
    """
    folder = StudyFolder.find(home, name)
    if folder.path.resolve() != home.resolve() / name:
        raise HomeError("this folder is a link, and what it leads to is not removed", where=str(folder.path), remedy="remove the link by hand")
    card, uri = folder.card(), tracking_uri_for(home, tracking_uri)
    if card.state == "running":
        raise HomeError("this study runs, and is not removed", where=str(folder.path), remedy=f"stop it first: study stop {name}")
    runs = _runs(card, uri)
    if not runs and card.run_id and masked(uri) != card.tracking_uri:
        remedy = f"name that store with --tracking-uri: {card.tracking_uri}"
        raise InputError(f"the runs of this study are in another MLflow store than {masked(uri)}", where=str(folder.path), remedy=remedy)
    files = [file for file in folder.path.rglob("*") if file.is_file()]
    return Leavings(folder, card, len(files), sum(file.stat().st_size for file in files), uri, runs)


def _runs(card: Card, uri: str) -> tuple[str, ...]:
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return ()
    store = connect(uri)
    experiments = store.experiments(card.name)
    return tuple(run.run_id for run in store.runs(experiments, {"study.id": card.study_id})) if experiments else ()


def remove(left: Leavings) -> None:
    """Removes the runs, then the folder: what is interrupted in between can be repeated.

    Raises:
        HomeError: if a process has begun to run the study, or its files cannot be removed.
        TrackingUnavailable: if the MLflow store does not answer.
    """
    with left.folder.running():
        if left.runs:
            store = connect(left.tracking_uri)
            for run_id in left.runs:
                store.delete(run_id)
        try:
            shutil.rmtree(left.folder.path)
        except OSError as error:
            raise HomeError(f"cannot be removed ({error.strerror})", where=str(left.folder.path), remedy="check your rights to it") from None
