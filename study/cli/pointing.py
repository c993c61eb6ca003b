"""Pointing: where in the file of a spec stands what turns out to be wrong only once data and model are there."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from study.errors import Problem
from study.problems import located
from study.spec import StudySpec, document_of
from study.trial import TrialSpec, flatten

NAMES = ("data.name", "data.path", "model.name", "loss")
"""Fields of a trial that name code or a file, by which errors in these call them."""


def pointed(problems: Sequence[Problem], spec: StudySpec, source: str | Path, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    """What was found wrong with a spec only once its data and model were there, with file, line and path as in `load_spec`.

    Args:
        problems: Each at a field, such as `data.batch_size`, or at a value, such as `import:nets:wide`; others stay as they are.
        spec: What was read.
        source: The file that it was read from.
        overrides: As in `load_spec`.
    """
    lines = document_of(source, overrides).lines
    found = [(problem, _at_its_field(problem, spec)) for problem in problems]
    return tuple(problem if at is None else located(at, str(source), lines)[1] for problem, at in found)


def _at_its_field(problem: Problem, spec: StudySpec) -> Problem | None:
    """The problem at its field in the spec, as keys joined by `/`: at the axis where there is one; None where it is at no field."""
    section, _, rest = problem.where.partition(".")
    if problem.where in spec.space:
        return replace(problem, where=f"space/{problem.where}")
    if section in TrialSpec.model_fields:
        return replace(problem, where="/".join(("trial", section, *filter(None, rest.split(".")))))
    if section in StudySpec.model_fields:
        return replace(problem, where=problem.where.replace(".", "/"))
    told = f"{problem.where}: {problem.message}" if problem.where else problem.message
    for path, value in flatten(spec.trial.canonical()).items():
        if isinstance(value, str) and re.match(rf"{re.escape(value)}[: ]", told) and path in NAMES:
            return replace(problem, where=f"trial/{path.replace('.', '/')}", message=told)
    return None
