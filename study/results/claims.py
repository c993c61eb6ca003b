"""Claims: tested on the study's table of trials, with seeds as units.

    completed trials ─where─> rows ─┬─ slope, spread: one number for each seed ────────────────┐
                                    └─ contrast, rank: of each arm and seed, or of each pair ──┴─> mean, 95% interval ─> verdict

    confirmed      the interval lies inside the expectation
    refuted        it lies outside
    inconclusive   it reaches across, or there are fewer than five seeds

A seed is a pair of `seed` and `data.seed`: several trials of one seed count once, and never a layer or a step.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from study.claimspec import ClaimSpec, Expectation
from study.document import write_whole
from study.errors import Problem, SpecError
from study.results.intervals import Interval
from study.results.quantities import Measured, measured

if TYPE_CHECKING:
    import pandas as pd

LEAST_UNITS = 5
"""Fewer seeds give no verdict."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one claim."""

    id: str
    says: str
    source: str
    expected: dict[str, Any]
    """As the claim has it: `{"below": 0.7}`."""
    estimate: float | None
    """What was measured; None where nothing could be. Of a rank, the smallest margin by which an arm is ahead of one that it should be ahead of."""
    interval: Interval | None
    """95% confidence interval of the estimate; None with fewer than two units."""
    n: int
    """Units: seeds; of an unpaired comparison, those of the arm that has fewer."""
    verdict: Literal["confirmed", "refuted", "inconclusive"]
    note: str = ""
    """Why it is inconclusive."""


def verify(claims: Sequence[ClaimSpec], table: "pd.DataFrame") -> list[Verdict]:
    """Tests every claim.

    Args:
        claims: A study's claims.
        table: One row for each trial, as in `trials.parquet`.

    Raises:
        SpecError: with every claim that does not fit the table.
    """
    verdicts, problems = verify_each(claims, table)
    if problems:
        raise SpecError(problems)
    return verdicts


def verify_each(claims: Sequence[ClaimSpec], table: "pd.DataFrame") -> tuple[list[Verdict], list[Problem]]:
    """The verdicts of all claims that fit the table, and why the others do not."""
    verdicts: list[Verdict] = []
    problems: list[Problem] = []
    for claim in claims:
        try:
            verdicts.append(_verdict(claim, table))
        except SpecError as error:
            problems += error.problems
    return verdicts, problems


def verdicts_document(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What `study verify --json` prints and `claims.json` holds."""
    return {"claims": [asdict(verdict) for verdict in verdicts], "tested": len(verdicts)}


def write_verdicts(verdicts: Sequence[Verdict], path: Path) -> None:
    """Writes `claims.json`, whole or not at all."""
    write_whole(path, json.dumps(verdicts_document(verdicts), indent=2, ensure_ascii=False) + "\n")


def judged(expect: Expectation, found: Measured) -> tuple[Literal["confirmed", "refuted", "inconclusive"], str]:
    """The verdict, and why it is inconclusive."""
    if found.n < LEAST_UNITS or found.interval is None:
        return "inconclusive", f"{found.n} of the {LEAST_UNITS} seeds that a verdict needs"
    low, high = found.interval
    match expect.given:
        case {"below": bound}:
            inside, outside = high < bound, low >= bound
        case {"between": (least, most)}:
            inside, outside = least <= low and high <= most, high < least or most < low
        case given:
            bound = given.get("above", 0)
            inside, outside = low > bound, high <= bound
    if inside or outside:
        return ("confirmed" if inside else "refuted"), ""
    return "inconclusive", "the interval reaches across the expectation"


def _verdict(claim: ClaimSpec, table: "pd.DataFrame") -> Verdict:
    found = measured(claim, table)
    verdict, note = judged(claim.expect, found)
    return Verdict(claim.id, claim.says, claim.source, claim.expect.given, found.estimate, found.interval, found.n, verdict, note)
