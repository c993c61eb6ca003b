"""Continuing: a study goes on from its own folder, with as many trials as before or with more.

resume NAME ──> the folder's spec            extend NAME --trials N ──> the same with N more trials: none is repeated
"""

from pathlib import Path

from study.errors import InputError
from study.home import StudyFolder, home_path
from study.spec import StudySpec


def resumed(name: str, home: str | Path | None = None) -> StudySpec:
    """The spec of a study's latest start.

    Raises:
        NotFound: if the home has no study of that name.
    """
    return StudyFolder.find(home_path(home), name).load_spec()


def extended(name: str, more: int, home: str | Path | None = None) -> StudySpec:
    """The spec of a study's latest start, with so many more trials.

    Raises:
        NotFound: if the home has no study of that name.
        InputError: if it runs, or the trials do not divide evenly over its arms; the error names the nearest two numbers.
    """
    folder = StudyFolder.find(home_path(home), name)
    if folder.is_running():
        raise InputError("runs now", where=name, remedy="extend it once it has ended")
    spec = folder.load_spec()
    arms = len(spec.arms)
    if more % arms:
        below, above = more - more % arms, more + arms - more % arms
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(f"trials must divide evenly over {arms} arms (got {more})", where="--trials", remedy=f"use {near}")
    return spec.model_copy(update={"search": spec.search.model_copy(update={"trials": spec.search.trials + more})})
