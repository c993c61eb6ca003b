"""Pictures: what is drawn of a study when it has ended, into its folder.

trials.parquet ─┬─ the plane of learning rate and decay ───────> plane.svg
                └─ the best completed trials of each arm ──────> trials/<trial_id>/traces.svg
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from study.home import StudyFolder
from study.optimizer import PRODUCT
from study.spec import StudySpec
from study.traces import read_trace

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PLANE = "plane.svg"
"""The picture of the plane in the study's folder."""

BEST_OF_ARM = 3
"""Completed trials of each arm whose traces are drawn."""

MOST_TRACES = 48
"""Trials whose traces are drawn: with more arms fewer of each, so that a large study does not spend its time drawing."""


def draw(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame", attach: Callable[[str, Path], None]) -> list[Path]:
    """Draws all of them and returns the study's own; what fails is logged, never raised: a study without pictures is whole.

    Args:
        table: The study's table of trials.
        attach: Takes the id of a trial and its picture.
    """
    if table.empty:
        return []
    try:
        for trial_id, picture in draw_traces(folder, spec, table).items():
            attach(trial_id, picture)
        plane = draw_plane(folder, spec, table)
    except Exception as error:
        log.warning("warning: not every picture of the study could be drawn (%s: %s)", type(error).__name__, error)
        return []
    return [] if plane is None else [plane]


def draw_plane(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame") -> Path | None:
    """Draws the plane of learning rate and decay; None where the study varies neither."""
    if not set(PRODUCT) & set(spec.space):
        return None
    from study.results.planes import plane_figure
    from study.results.plots import save

    picture = folder.path / PLANE
    save(plane_figure(table, spec.objective.metric, spec.objective.direction), picture)
    return picture


def draw_traces(folder: StudyFolder, spec: StudySpec, table: "pd.DataFrame") -> dict[str, Path]:
    """Draws the traces of the best completed trials of each arm: trial id to picture."""
    from study.results.plots import save, trace_figure

    pictures = {}
    for trial_id in _best_of_arms(table, spec.objective.direction):
        trace = folder.path / "trials" / trial_id / "trace.parquet"
        if trace.exists():
            pictures[trial_id] = trace.with_name("traces.svg")
            save(trace_figure(read_trace(trace), trial_id), pictures[trial_id])
    return pictures


def _best_of_arms(table: "pd.DataFrame", direction: str) -> list[str]:
    """Trial ids: the best of each arm, then the second best of each, and so on."""
    rivals = table[(table["outcome"] == "completed") & (table["replicate_of"] == "") & table["value"].notna()]
    ranked = rivals.sort_values("value", ascending=direction == "minimize", kind="stable")
    ranked = ranked.assign(place=ranked.groupby("arm").cumcount()).sort_values("place", kind="stable")
    return list(ranked.loc[ranked["place"] < BEST_OF_ARM, "trial_id"])[:MOST_TRACES]
