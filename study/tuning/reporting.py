"""Reporting: a study's report and warnings from its folder alone, whether or not it has ended.

folder ─┬─ ledger ──> table, histories ─┬─> study.results.report ──> document
        └─ best.yaml, traces, ... ──────┘                        └─> study.results.page ──> report.html
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from study.document import write_whole
from study.home import State, StudyFolder
from study.measurement import History
from study.results.advice import Advice, advise, best_of_arms, searched
from study.results.page import Figures, draw_figures, page
from study.results.pictures import PLANE
from study.results.report import Findings, findings, report_document
from study.results.table import trial_table
from study.spec import StudySpec
from study.tracking.outbox import Outbox
from study.tuning.status import status

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

REPORT = "report.html"
"""The page in the study's folder."""


def gathered(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame | None" = None, state: State | None = None) -> Findings:
    """What a study has found up to now.

    Args:
        folder: The study.
        spec: Its spec.
        table: Its trials. Default: those that have ended, as the ledger has them.
        state: Where it stands. Default: as its folder says.
    """
    table = trials_of(folder) if table is None else table
    return findings(folder, spec, table, _histories(folder, spec, table), state or folder.card().state, status(folder)["budget"])


def trials_of(folder: StudyFolder) -> "pd.DataFrame":
    """One row for each trial that has ended, as in `trials.parquet`."""
    outbox = Outbox(folder.path)
    records = outbox.records()
    outbox.close()
    return trial_table(records)


def _histories(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame") -> dict[str, History]:
    """The objective of the best trial of each arm at its measurements."""
    if table.empty:
        return {}
    outbox, metric = Outbox(folder.path), spec.objective.metric
    histories: dict[str, History] = {
        trial_id: [(found.epoch, found.values[metric]) for found in outbox.history(trial_id) if metric in found.values]
        for trial_id in best_of_arms(searched(table), spec.objective.direction)["trial_id"]
    }
    outbox.close()
    return histories


def warnings_of(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame | None" = None) -> list[Advice]:
    """What a careful colleague would say of a study's trials; the table as in `gathered`."""
    table = trials_of(folder) if table is None else table
    return advise(spec, table, _histories(folder, spec, table))


def report_page(found: Findings, plane: str = "") -> str:
    """The HTML of a report; figures that cannot be drawn are logged and left out. The plane as in `draw_figures`."""
    try:
        figures = draw_figures(found, plane)
    except Exception as error:
        log.warning("warning: the figures of the report could not be drawn (%s: %s)", type(error).__name__, error)
        figures = Figures("", ())
    return page(report_document(found), figures)


def write_report(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame", state: State) -> list[Path]:
    """Writes report.html into the folder of a study that has ended and been drawn; what fails is logged, never raised: a study without a report is whole."""
    path = folder.path / REPORT
    try:
        plane = folder.path / PLANE
        write_whole(path, report_page(gathered(folder, spec, table, state), plane.read_text("utf-8") if plane.exists() else ""))
    except Exception as error:
        log.warning("warning: the report could not be written (%s: %s)", type(error).__name__, error)
        return []
    return [path]
