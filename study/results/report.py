"""Report: all that a study found as one JSON document, from which the page is written.

folder ─findings─> Findings ─report_document─> {question, answer, best, arms, differences, outcomes, claims, warnings, provenance}
                                                                        └─ study.results.page ─> report.html
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from study.home import Card, State, StudyFolder
from study.measurement import History, Outcome
from study.results.advice import advice_documents, advise, best_of_arms, searched
from study.results.answer import answer
from study.results.arms import Comparison, compare_arms
from study.results.best import BestConfig, document, read_best, varied
from study.results.claims import verdicts_document, verify_each
from study.results.layers import trace_document, verdict
from study.space import arm_label
from study.spec import StudySpec
from study.traces import read_trace

if TYPE_CHECKING:
    import pandas as pd

MOST_FAILURES = 5
"""Failed trials whose errors are shown."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a report is made of."""

    spec: StudySpec
    card: Card
    state: State
    table: "pd.DataFrame"
    """One row for each trial that has ended, as in `trials.parquet`."""
    histories: Mapping[str, History]
    """Trial to the objective at its measurements."""
    best: BestConfig | None
    environment: Mapping[str, Any]
    """Versions, platform and commit that the study ran with; empty until it has ended."""
    failures: Mapping[str, str]
    """Failed trial to the last line of its traceback."""
    traces: "Mapping[str, tuple[str, pd.DataFrame]]"
    """Arm to its best trial and that trial's trace, best arm first."""
    comparison: Comparison
    budget: Mapping[str, Any]
    """The part of `study status` about it; empty where it is not known."""


def findings(
    folder: StudyFolder,
    spec: StudySpec,
    table: "pd.DataFrame",
    histories: Mapping[str, History],
    state: State,
    budget: Mapping[str, Any] | None = None,
) -> Findings:
    """Gathers from a study's folder what a report is made of; arguments as in `Findings`."""
    comparison = compare_arms(table, spec.objective) if len(table) else Comparison(spec.objective.metric, spec.objective.direction, (), (), None, ())
    environment = folder.path / "environment.json"
    return Findings(
        spec=spec,
        card=folder.card(),
        state=state,
        table=table,
        histories=histories,
        best=read_best(folder.best) if folder.best.exists() else None,
        environment=json.loads(environment.read_text("utf-8")) if environment.exists() else {},
        failures=_failures(folder, table),
        traces=_traces(folder, representatives(spec, table, comparison)),
        comparison=comparison,
        budget=budget or {},
    )


def representatives(spec: StudySpec, table: "pd.DataFrame", comparison: Comparison) -> dict[str, str]:
    """Arm to the trial that stands for it, best first: that of its replicates, else its best completed one."""
    if table.empty:
        return {}
    best = best_of_arms(searched(table), spec.objective.direction)
    return {arm.arm: arm.trial_id for arm in comparison.arms} | {
        row["arm"]: row["trial_id"] for row in best.to_dict("records") if row["arm"] not in {arm.arm for arm in comparison.arms}
    }


def _traces(folder: StudyFolder, trials: Mapping[str, str]) -> "dict[str, tuple[str, pd.DataFrame]]":
    paths = {arm: folder.path / "trials" / trial_id / "trace.parquet" for arm, trial_id in trials.items()}
    return {arm: (trials[arm], trace) for arm, path in paths.items() if path.exists() and len(trace := read_trace(path))}


def _failures(folder: StudyFolder, table: "pd.DataFrame") -> dict[str, str]:
    """The first failed trials with the last lines of their tracebacks."""
    found = {}
    for trial_id in table.loc[table["outcome"] == "failed", "trial_id"].head(MOST_FAILURES) if len(table) else ():
        file = folder.path / "trials" / trial_id / "artifacts" / "traceback.txt"
        lines = file.read_text("utf-8").strip().splitlines() if file.exists() else []
        found[trial_id] = lines[-1] if lines else "its traceback was not kept"
    return found


def report_document(found: Findings) -> dict[str, Any]:
    """The JSON document of `study report`."""
    spec, comparison = found.spec, found.comparison
    verdicts, untested = verify_each(spec.claims, found.table) if len(found.table) else ([], [])
    compared = comparison.document()
    return {
        "study_id": found.card.study_id,
        "name": spec.name,
        "state": found.state,
        "question": spec.question,
        "answer": answer(spec, found.table, comparison, verdicts, found.best),
        "metric": spec.objective.metric,
        "direction": spec.objective.direction,
        "best": None if found.best is None else {**document(found.best), "varied": varied(found.best, spec)},
        "arms": _arms(found),
        "differences": compared["differences"],
        "wins_again": compared["wins_again"],
        "outcomes": _outcomes(found),
        "claims": {**verdicts_document(verdicts), "not_tested": [str(problem) for problem in untested]},
        "layers": [_layers(arm, trial_id, trace) for arm, (trial_id, trace) in found.traces.items()],
        "warnings": advice_documents(advise(spec, found.table, found.histories)),
        "provenance": _provenance(found),
    }


def _arms(found: Findings) -> list[dict[str, Any]]:
    """One row for each arm: the best first, those without a result last, in the order of the spec."""
    direction, results = found.spec.objective.direction, {arm.arm: arm for arm in found.comparison.arms}
    best = {} if found.table.empty else {row["arm"]: row for row in best_of_arms(searched(found.table), direction).to_dict("records")}
    labels = [arm_label(arm) for arm in found.spec.arms]
    rows = []
    for label in dict.fromkeys((*results, *best, *labels)):
        own = searched(found.table)[lambda table: table["arm"] == label] if len(found.table) else found.table  # noqa: B023
        result = asdict(results[label]) if label in results else {"trial_id": None, "mean": None, "interval": None, "seeds": 0, "values": {}}
        first = {"trial_id": best[label]["trial_id"], "value": float(best[label]["value"])} if label in best else None
        counts = {str(outcome): int((own["outcome"] == outcome).sum()) if len(own) else 0 for outcome in Outcome}
        replicated = {key: result[key] for key in ("mean", "interval", "seeds")} | {
            "replicated": result["trial_id"],
            "values": list(result["values"].values()),
        }
        rows.append({"arm": label, "trials": len(own), **counts, "best": first, **replicated})
    return rows


def _outcomes(found: Findings) -> dict[str, Any]:
    """How trials ended, and why."""
    trials = searched(found.table) if len(found.table) else found.table
    counts = {str(outcome): int((trials["outcome"] == outcome).sum()) if len(trials) else 0 for outcome in Outcome}
    reasons: list[dict[str, Any]] = []
    if len(trials):
        for (outcome, reason), count in trials[trials["reason"] != ""].groupby(["outcome", "reason"], sort=True).size().items():
            reasons.append({"outcome": outcome, "reason": reason, "count": int(count)})
    return {
        "planned": found.spec.search.trials,
        "ended": len(trials) - counts[Outcome.INTERRUPTED],
        **counts,
        "reasons": reasons,
        "replicates": len(found.table) - len(trials),
        "failures": dict(found.failures),
    }


def _layers(arm: str, trial_id: str, trace: "pd.DataFrame") -> dict[str, Any]:
    """What became of the layers of an arm's trial."""
    ends = trace_document(trial_id, trace)
    return {"arm": arm, "verdict": verdict(ends), **ends}


def _provenance(found: Findings) -> dict[str, Any]:
    seconds = float(found.table["seconds"].sum()) if len(found.table) else 0.0
    return {
        "spec_hash": found.spec.spec_hash(),
        "git_commit": found.environment.get("git_commit", ""),
        "run_id": found.card.run_id,
        "created": found.card.created,
        "reported": datetime.now(UTC).isoformat(timespec="seconds"),
        "trial_seconds": seconds,
        "budget": dict(found.budget),
        "versions": dict(found.environment.get("versions", {})),
        "platform": found.environment.get("platform", ""),
        "cores": found.environment.get("cores"),
        "spec": found.spec.to_yaml(),
    }
