"""Page: a report as one self-contained HTML page, readable without scripts and without a network.

report document ─┬─ report.html, a template ──> the page        everything that a user wrote is escaped
figures ─────────┘                                              figures stand in it as SVG, on white cards in dark mode, too
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from study.budget import budget_line
from study.optimizer import PRODUCT
from study.results.advice import best_of_arms, searched
from study.results.best import USE
from study.results.report import Findings
from study.results.wording import counted, number, span

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "report.html"
"""The template beside this module."""

BESIDE = 3
"""Traces that stand beside each other in one figure."""

MOST_TRACED = 6
"""Arms whose traces are drawn: the best ones."""

MOST_POINTS = 40_000
"""Points of all traces together, so that the page stays below about a megabyte."""

MOST_DOTS = 4_000
"""Trials in the plane: of more, an even selection with the best of each arm."""

FEWEST, MOST = 40, 200
"""Samples that a layer is drawn with."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a page, as SVG elements."""

    plane: str
    """Empty where the study varies neither learning rate nor decay."""
    traces: tuple[str, ...]


def draw_figures(found: Findings, plane: str = "") -> Figures:
    """Draws the plane of learning rate and decay, and the traces of each arm's trial.

    Args:
        found: What a study found.
        plane: An SVG document of the plane of all trials, where it is already drawn.
    """
    from study.results.inline import inline_svg
    from study.results.plots import comparison_figure, svg_text

    if not set(PRODUCT) & set(found.spec.space) or found.table.empty:
        plane = ""
    elif not plane or len(found.table) > MOST_DOTS:
        plane = _plane(found)
    title = f"{found.spec.objective.metric} of every trial in the plane of learning rate and weight decay"
    plane = plane and inline_svg(plane, "plane", title)
    arms = list(found.traces)[:MOST_TRACED]
    traces = {arm: found.traces[arm][1] for arm in arms}
    layers = sum(trace["layer"].nunique() for trace in traces.values())
    samples = min(MOST, max(FEWEST, MOST_POINTS // (2 * layers))) if layers else MOST
    rows = [arms[start : start + BESIDE] for start in range(0, len(arms), BESIDE)]
    figures = []
    for place, row in enumerate(rows):
        drawn = comparison_figure({_title(found, arm): _thinned(traces[arm], samples) for arm in row})
        title = f"Effective learning rate and rotation of every layer over the steps: {', '.join(_title(found, arm) for arm in row)}"
        figures.append(inline_svg(svg_text(drawn), f"traces{place}", title))
    return Figures(plane, tuple(figures))


def _plane(found: Findings) -> str:
    from study.results.planes import plane_figure
    from study.results.plots import svg_text

    objective = found.spec.objective
    return svg_text(plane_figure(_selected(searched(found.table), objective.direction), objective.metric, objective.direction))


def _selected(trials: "pd.DataFrame", direction: str) -> "pd.DataFrame":
    """All trials, or an even selection of them with the best of each arm."""
    if len(trials) <= MOST_DOTS:
        return trials
    kept = {*trials.index[:: -(-len(trials) // MOST_DOTS)], *best_of_arms(trials, direction).index}
    return trials[trials.index.isin(kept)]


def _title(found: Findings, arm: str) -> str:
    return found.traces[arm][0] if arm == "all" else arm.replace(",", "\n")


def _thinned(trace: "pd.DataFrame", samples: int) -> "pd.DataFrame":
    """At most so many samples of each layer, evenly chosen, the last one included."""
    steps = sorted(trace["step"].unique(), reverse=True)
    return trace[trace["step"].isin(steps[:: -(-len(steps) // samples)])]


def page(document: Mapping[str, Any], figures: Figures) -> str:
    """The HTML of a report.

    Args:
        document: Of `study report --json`.
        figures: What is drawn in it; nothing else is taken as HTML.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {
        "number": number,
        "span": span,
        "cell": _cell,
        "counted": counted,
        "duration": _duration,
        "expected": _expected,
        "budget_line": budget_line,
    }
    drawn = {"plane": Markup(figures.plane), "traces": [Markup(figure) for figure in figures.traces]}
    return templates.get_template(TEMPLATE).render(
        report=document, figures=drawn, use=USE, shown_traces=MOST_TRACED, shown_trials=MOST_DOTS, forests=_forests(document["arms"])
    )


def _cell(value: object) -> str:
    """A field's value in a table."""
    return number(value) if isinstance(value, float) else "-" if value is None else str(value)


def _duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _expected(expected: Mapping[str, Any]) -> str:
    """`below 0.7`, `between 0.45 and 0.55`, `first last`."""
    ((word, value),) = expected.items()
    if word == "between":
        return f"between {number(value[0])} and {number(value[1])}"
    return f"{word} {', '.join(map(_cell, value)) if isinstance(value, list | tuple) else _cell(value)}"


def _forests(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm to places on a common scale, in percent: of the values of its seeds, its mean and the ends of its interval."""
    shown = {arm["arm"]: [*arm["values"], *(arm["interval"] or ())] for arm in arms if arm["mean"] is not None}
    values = [float(value) for own in shown.values() for value in own]
    if not values or min(values) == max(values):
        return {}
    low, high = min(values), max(values)

    def place(value: float) -> float:
        return 4 + 92 * (value - low) / (high - low)

    return {
        arm["arm"]: {
            "values": [place(value) for value in arm["values"]],
            "mean": place(arm["mean"]),
            "interval": [place(end) for end in arm["interval"]] if arm["interval"] else None,
        }
        for arm in arms
        if arm["arm"] in shown
    }
