"""Writes what docs/papers.md and README.md show of the papers' claims, from studies that were run, or from the tables that are kept of them:

study run search_spaces/papers/effective_lr.yaml      # and the other three
python docs/papers.py --home studies                  # keeps docs/papers/<study>.csv, then writes the tables
python docs/papers.py                                 # writes the tables again, from what is kept

    trials.parquet ──columns that the claims speak of──> docs/papers/<study>.csv ──verify──> tables between <!-- papers --> marks
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from study.claimspec import ClaimSpec, Contrast, Level, Rank, Slope, Spread
from study.errors import StudyError
from study.home import StudyFolder
from study.results.claims import Verdict, verify
from study.spec import StudySpec, load_spec

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "search_spaces" / "papers"
KEPT = ROOT / "docs" / "papers"

STUDIES = ("effective_lr", "gamma_guidelines", "rotational_equilibrium", "iso_product")
"""In the order of the tables; each has a `_full` version that is not run here."""

OWN = ("trial_id", "arm", "outcome", "replicate_of", "equilibrated", "seed", "data.seed", "seconds")
"""Columns that are kept of every study."""

MARKS = "<!-- papers -->\n", "<!-- /papers -->"
"""What stands between these is generated."""


def columns_of(claim: ClaimSpec) -> Iterator[str]:
    """The columns of the table of trials that a claim speaks of."""
    yield from (name for name in claim.where if name != "replicate")
    match claim.form:
        case Level(metric=metric):
            yield from metric
        case Slope(y=y, x=x):
            yield from (*y, *x)
        case Spread(metric=metric, over=over, by=by, against=against):
            yield from (*metric, *over, *by, *against)
        case Contrast(metric=metric, arm=arm, paired_by=paired_by) | Rank(metric=metric, arm=arm, paired_by=paired_by):
            yield from (metric, arm, *paired_by)


def keep(spec: StudySpec, home: Path, kept: Path) -> None:
    """Writes the kept table of a finished study.

    Raises:
        SystemExit: if the study has not finished, or the shipped spec is not the one that was run.
    """
    folder = StudyFolder.find(home, spec.name)
    if not folder.table.exists():
        raise SystemExit(f"{spec.name}: not finished")
    table = pd.read_parquet(folder.table)
    if load_spec(folder.path / "spec.yaml").spec_hash() != spec.spec_hash():
        raise SystemExit(f"{spec.name}: the study in {home} is not the shipped one")
    wanted = dict.fromkeys((*OWN, *spec.space, *(name for claim in spec.claims for name in columns_of(claim))))
    kept.parent.mkdir(exist_ok=True)
    table[[name for name in wanted if name in table]].to_csv(kept, index=False, float_format="%.9g")


def kept_table(kept: Path) -> pd.DataFrame:
    """A kept table as the claims read it."""
    table = pd.read_csv(kept, dtype={"replicate_of": str, "arm": str})
    return table.assign(equilibrated=table["equilibrated"].astype(str).str.lower() == "true")


def minutes(table: pd.DataFrame) -> float:
    """Minutes that trials trained, each on one thread: on a machine that does other things, too, an upper bound of CPU minutes."""
    return float(table["seconds"].sum()) / 60


def number(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def expectation(expected: dict[str, Any]) -> str:
    """`below 0.7`, `0.45 to 0.55`."""
    ((name, bound),) = expected.items()
    return f"{bound[0]:g} to {bound[1]:g}" if name == "between" else f"{name} {bound:g}"


def row(verdict: Verdict) -> str:
    """A claim as a row of the long table."""
    estimate = "-" if verdict.estimate is None else number(verdict.estimate)
    interval = "-" if verdict.interval is None else " to ".join(map(number, verdict.interval))
    cells = (f"`{verdict.id}`", verdict.says, expectation(verdict.expected), estimate, interval, str(verdict.n), f"**{verdict.verdict}**")
    return f"| {' | '.join(cells)} |"


def long_table(spec: StudySpec, table: pd.DataFrame, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A study's heading, cost and claims."""
    source = next(claim.source for claim in spec.claims)
    done = Counter(table["outcome"])
    said = ", ".join(f"{count} {outcome}" for outcome, count in done.most_common())
    yield f"### {spec.name} ({source})\n"
    yield f"{len(table)} trials ({said}), {table['seed'].nunique()} seeds, {minutes(table):.1f} minutes of training, {len(verdicts)} claims.\n"
    yield "| claim | what it says | expected | measured | 95% interval | n | verdict |\n" + "|---" * 7 + "|"
    yield from map(row, verdicts)
    yield ""


def short_table(found: Sequence[tuple[StudySpec, pd.DataFrame, Sequence[Verdict]]]) -> Iterator[str]:
    """One row for each study."""
    yield "| study | paper | trials | seeds | CPU minutes, at most | claims | confirmed | refuted | inconclusive |\n" + "|---" * 9 + "|"
    for spec, table, verdicts in found:
        counts = Counter(verdict.verdict for verdict in verdicts)
        each = " | ".join(str(counts[verdict]) for verdict in ("confirmed", "refuted", "inconclusive"))
        source = next(claim.source for claim in spec.claims).partition(",")[0]
        yield f"| `{spec.name}` | {source} | {len(table)} | {table['seed'].nunique()} | {minutes(table):.1f} | {len(verdicts)} | {each} |"


def written(page: str, lines: Iterator[str]) -> str:
    """A page with what stands between the marks replaced."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}" + "\n".join(lines).rstrip("\n") + f"\n{MARKS[1]}{after}"


def pages(kept: Path = KEPT) -> dict[Path, str]:
    """Both pages as they should be, by path."""
    found = []
    for name in STUDIES:
        spec, table = load_spec(SPECS / f"{name}.yaml"), kept_table(kept / f"{name}.csv")
        found.append((spec, table, verify(spec.claims, table)))
    long = (line for each in found for line in long_table(*each))
    shown = {ROOT / "docs" / "papers.md": long, ROOT / "README.md": short_table(found)}
    return {path: written(path.read_text("utf-8"), lines) for path, lines in shown.items()}


def main() -> None:
    """Reads the command line, and writes."""
    parser = argparse.ArgumentParser(description="Write the tables of claims into docs/papers.md and README.md.")
    parser.add_argument("--home", type=Path, help="folder of all studies; keeps their tables first")
    options = parser.parse_args()
    try:
        for name in STUDIES if options.home is not None else ():
            keep(load_spec(SPECS / f"{name}.yaml"), options.home, KEPT / f"{name}.csv")
        for path, page in pages().items():
            path.write_text(page, "utf-8")
    except StudyError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
