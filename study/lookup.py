"""Lookup: the trace of a trial, wherever it lies.

trace.parquet, finished or not ───────────────────────────────────┐
gains-0007 ──> studies/gains/trials/gains-0007/trace.parquet ─────┼──> the trial's id, its samples
          └──> where that is missing: the artifact of its MLflow run
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from study.errors import NotFound
from study.home import StudyFolder, tracking_uri_for
from study.results.best import is_file
from study.traces import UNFINISHED, read_trace
from study.tracking.archive import trace_of_run
from study.tracking.delivery import TRACE
from study.tracking.outbox import Outbox

if TYPE_CHECKING:
    import pandas as pd

TRIAL = re.compile(r"(?P<study>[a-z0-9-]+)-\d{4,}(-r\d+)?")
"""A trial's id: the name of its study and its number; a replicate has a number of its own behind it."""


def find_trace(source: str, home: Path, tracking_uri: str | None = None) -> "tuple[str, pd.DataFrame]":
    """The id of a trial and its samples, one row for each layer and sampled step.

    Args:
        source: A trace.parquet, also one that is still being written, or the id of a trial of a study in the home.
        home: The study home.
        tracking_uri: The MLflow store that is asked where the home has no trace of the trial. Default: the home's.

    Raises:
        NotFound: if there is no such file, study or trial, or the trial has no trace yet.
        InputError: if the file is no trace.
        TrackingUnavailable: if the MLflow store is asked and does not answer.
    """
    if is_file(source):
        path = Path(source.removesuffix(UNFINISHED))
        return path.parent.name if TRIAL.fullmatch(path.parent.name) else source, read_trace(path)
    named = TRIAL.fullmatch(source)
    if named is None:
        remedy = "a trial is named by its study and its number, such as gains-0007"
        raise NotFound(f"no such file, and not the id of a trial (got {source!r})", remedy=remedy)
    folder = StudyFolder.find(home, named["study"])
    path = folder.path / "trials" / source / TRACE
    return source, read_trace(path) if path.exists() else trace_of_run(_run_of(folder, source), tracking_uri_for(home, tracking_uri))


def _run_of(folder: StudyFolder, trial_id: str) -> str:
    """The MLflow run of a trial."""
    outbox = Outbox(folder.path)
    entries = outbox.entries(trial_id)
    outbox.close()
    if not entries:
        raise NotFound(f"no trial of this id (got {trial_id!r})", where=str(folder.path), remedy="`study ui` shows every trial")
    if not entries[0].run_id:
        raise NotFound(f"this trial has no trace yet (got {trial_id!r})", where=str(folder.path), remedy="wait until it has ended")
    return entries[0].run_id
