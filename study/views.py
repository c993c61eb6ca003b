"""Views: how answers look in a terminal. Everything shown comes from the documents that `--json` prints.

status ─> study_view, studies_table    plan ─> plan_view    best ─> best_view
doctor ─> checks_view                  trace ─> trace_view            verify ─> claims_view
"""

import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from study.budget import budget_line
from study.home import StudyFolder
from study.optimizer import OptimizerSpec
from study.results.layers import LEVEL, verdict
from study.spec import StudySpec
from study.tracking.names import masked
from study.tuning.forecast import sentence

Document = Mapping[str, Any]

ENDED = ("completed", "stopped", "diverged", "failed")
"""Outcomes after which a trial is not continued."""

PIPE_WIDTH = 160
"""Columns where there is no terminal: wide enough that no name is cut."""

BLOCKS = "▁▂▃▄▅▆▇"
"""From the lowest to the highest value of a spark line; an odd number, so that what is level stays on the one in the middle."""

SPARK_COLUMNS = 24
"""Values that a spark line shows at most."""

LEAST_SPAN = math.log(2)
"""A spark line's whole height stands for a factor of 2 at least, so that noise looks as small as it is."""

NARROW = 120
"""Columns of a terminal below which the table of layers is shortened."""

STYLES = {"completed": "green", "stopped": "yellow", "diverged": "magenta", "failed": "red", "interrupted": "yellow", "running": "cyan"}
STATE_STYLES = {"equilibrium": "green", "off": "yellow", "dying": "red"}
VERDICT_STYLES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow"}
MARKS = {"ok": "green", "warn": "yellow", "fail": "red"}


def console(*, stderr: bool = False) -> Console:
    """A console for one of the two streams."""
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False)


def number(value: float | None) -> str:
    """A value to four digits; `-` for none."""
    return "-" if value is None else f"{value:.4g}"


def clock(seconds: float | None) -> str:
    """A duration as `1:40` or `2:03:10`; `-` when it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ended(trials: Document) -> int:
    """How many trials need no more training."""
    return sum(trials[outcome] for outcome in ENDED)


def total(trials: Document) -> int:
    """How many trials there are and will be."""
    return sum(count for count in trials.values() if isinstance(count, int))


def outcomes(trials: Document) -> Text:
    """`3 completed, 1 running`; outcomes that no trial has are left out."""
    shown = [(word, trials[word]) for word in (*ENDED, "interrupted", "running", "waiting") if trials[word]]
    return Text(", ").join(Text(f"{count} {word}", style=STYLES.get(word, "")) for word, count in shown)


def replicates_line(document: Document) -> str:
    """`; replicates: 3 completed, 2 running`; nothing without replicates."""
    counts = document["replicates"]
    return f"; replicates: {outcomes(counts).plain}" if total(counts) else ""


def best_line(document: Document) -> str:
    """`best 0.0711 val/error: gamma-roles-0003 (optimizer.gamma=last)`."""
    best = document["best"]
    if best is None:
        return "best -"
    arm = "" if best["arm"] == "all" else f" ({best['arm']})"
    mean = "" if best["mean"] is None else f", mean {number(best['mean'])} over {best['seeds']} fresh seeds"
    return f"best {number(best['value'])} {best['metric']}: {best['trial_id']}{arm}{mean}"


def arms_table(document: Document) -> Table:
    """One row for each arm: how its trials ended, and its best. Outcomes that no trial has are left out."""
    arms = document["arms"]
    words = ["completed", *(word for word in (*ENDED[1:], "interrupted", "running", "waiting") if document["trials"][word])]
    table = _table("arm", *words, "best", "trial", right=(*words, "best"))
    values = [arm["best"]["value"] for arm in arms.values() if arm["best"]]
    winner = document["best"]["value"] if document["best"] else None
    for label, arm in arms.items():
        best = arm["best"] or {"value": None, "trial_id": "-"}
        leads = len(values) > 1 and best["value"] is not None and best["value"] == winner
        table.add_row(label, *(str(arm[word]) for word in words), number(best["value"]), best["trial_id"], style="bold" if leads else "")
    return table


def study_view(document: Document) -> RenderableType:
    """A study in full: what `study status` shows."""
    seconds = document["budget"]["trial_seconds"]
    head = Text.assemble((document["name"], "bold"), f" ({document['study_id']}): {document['state']}, ", outcomes(document["trials"]))
    compared = [comparison_view(document["comparison"])] if document["comparison"] else []
    lines = [best_line(document), f"{clock(seconds)} of training in all trials together", budget_line(document["budget"]), *_store_lines(document)]
    return Group(head, arms_table(document), *compared, *(Text(line) for line in lines if line))


def _store_lines(document: Document) -> list[str]:
    """What MLflow has not heard yet; nothing where it has heard all."""
    waiting = f"{document['undelivered']} events wait for MLflow" if document["undelivered"] else ""
    silent = f"the MLflow store is {document['store']}" if document["store"] != "ok" else ""
    return ["; ".join(filter(None, (waiting, silent)))] if waiting or silent else []


def comparison_view(document: Document) -> RenderableType:
    """The verdict on the arms: their means over fresh seeds, how far they are behind the winner, and whether it would win again."""
    lost = any(arm["lost"] for arm in document["arms"])
    columns = ("arm", "trial", "seeds", *(("lost",) if lost else ()), "mean", "95% interval", "behind the winner", "95% interval", "told apart")
    table = _table(*columns, right=("seeds", "lost", "mean", "behind the winner"), title=f"fresh seeds: {document['metric']}")
    first, *_ = document["arms"]
    gaps = {gap["b"]: gap for gap in document["differences"] if gap["a"] == first["arm"]}
    sign = 1 if document["direction"] == "maximize" else -1
    for arm in document["arms"]:
        own = (arm["arm"], arm["trial_id"], str(arm["seeds"]), *((str(arm["lost"]),) if lost else ()), number(arm["mean"]), _ends(arm["interval"]))
        table.add_row(*own, *_behind(gaps.get(arm["arm"]), sign), style="bold" if arm is first and len(document["arms"]) > 1 else "")
    if document["wins_again"] is None:
        return table
    by_chance = 1 / len(document["arms"])
    again = f"P({first['arm']} wins again) {document['wins_again']:.2f}"
    said = f"{again}: whether the arm that leads also leads on one more fresh seed; among equal arms it would be {by_chance:.2f}"
    return Group(table, Text(said))


def _behind(gap: Document | None, sign: int) -> tuple[str, str, str]:
    """How far an arm is behind the winner, where less is better for the arm; with the interval, and whether that leaves out 0."""
    if gap is None or gap["estimate"] is None:
        return "-", "-", "-"
    ends = None if gap["interval"] is None else sorted(sign * end for end in gap["interval"])
    apart = "-" if ends is None else "no" if ends[0] <= 0 <= ends[1] else "yes"
    return number(sign * gap["estimate"]), _ends(ends), apart


def _ends(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else " to ".join(map(number, interval))


def confirming_line(forecast: Document) -> str:
    """What `study best --confirm` is about to do."""
    if not forecast["left"]:
        return f"confirmed with {forecast['seeds']} fresh seeds already: {', '.join(forecast['trials'])}"
    of = "trial" if len(forecast["trials"]) == 1 else "trials"
    return (
        f"training {len(forecast['trials'])} {of} again ({', '.join(forecast['trials'])}), solo, with {forecast['seeds']} fresh seeds: "
        f"{forecast['left']} trainings are left, {clock(forecast['seconds'])} of training in all"
    )


def studies_table(documents: Iterable[Document]) -> Table:
    """One row for each study of a home."""
    table = _table("study", "state", "trials", "best", "metric", "trial", right=("trials", "best"))
    for document in documents:
        best, trials = document["best"] or {"value": None, "metric": "-", "trial_id": "-"}, document["trials"]
        row = (document["name"], document["state"], f"{ended(trials)} of {total(trials)}", number(best["value"]), best["metric"], best["trial_id"])
        table.add_row(*row)
    return table


def plan_view(document: Document, optimizer: OptimizerSpec) -> RenderableType:
    """What `study plan` shows: the size of the study, its engine, the decay of every parameter in the base trial, warnings."""
    arms, forecast = document["arms"], document["forecast"]
    share = "" if len(arms) == 1 else f" over {len(arms)} arms, {document['trials'] // len(arms)} each: {'; '.join(arms)}"
    steps = f"{forecast['steps_per_trial']:,} steps per trial, {forecast['steps']:,} in all where none is stopped; {sentence(forecast)}"
    if forecast["replicates"]:
        steps += f"; then up to {forecast['replicates']} replicates, {forecast['replicate_steps']:,} steps"
    table = _table(
        "parameter",
        "role",
        "place",
        "rate",
        "anchor",
        "group",
        *document["compare"],
        right=("rate", "anchor"),
        title=f"decay in the base trial (gamma {optimizer.gamma}, weight_decay {number(optimizer.weight_decay)}, shift {optimizer.shift})",
    )
    for row in document["parameters"]:
        anchor = "-" if not row["rate"] else row["anchor"] if isinstance(row["anchor"], str) else number(row["anchor"])
        beside = (_treatment(row["name"], library) for library in document["compare"].values())
        table.add_row(row["name"], row["role"], row["place"] or "-", number(row["rate"]), anchor, row["group"], *beside)
    gains = sum(row["role"] == "gain" for row in document["parameters"])
    counts = [Text(_difference(name, library, gains, len(document["parameters"]))) for name, library in document["compare"].items()]
    warnings = [Text(f"warning: {sentence}", style="yellow") for sentence in document["warnings"]]
    return Group(Text(f"{document['trials']} trials{share}"), Text(steps), Text(engine_line(document["engine"])), table, *counts, *warnings)


def _treatment(name: str, library: Document) -> Text:
    """What a library's default does to a parameter; `*` where the study's policy does something else."""
    done = "decay" if name in library["decayed"] else "exempt" if name in library["exempt"] else "frozen"
    differs = name in library["differences"]
    return Text(f"{done} *" if differs else done, style="yellow" if differs else "")


def _difference(name: str, library: Document, gains: int, parameters: int) -> str:
    return (
        f"{name}: decays {library['gains_decayed']} of {gains} gains; "
        f"differs from this policy on {library['differs_on_gains']} gains, and on {library['differs']} of all {parameters} parameters (*)"
    )


def best_view(document: Document, varied: Mapping[str, object]) -> RenderableType:
    """A best config: its value, its arm, and the fields that the study varied."""
    value = f"{document['metric']} {number(document['value'])} ({document['direction']}d)"
    rows = {"best": document["trial_id"], "value": value}
    if known := document["confirmed"]:
        rows["fresh seeds"] = f"mean {number(known['mean'])}, 95% interval {_ends(known['interval'])}, {known['seeds']} seeds"
    rows |= {"MLflow run": document["run_id"]} if document["run_id"] else {}
    grid = Table.grid(padding=(0, 2))
    for name, shown in {**rows, **varied}.items():
        grid.add_row(Text(name, style="dim"), number(shown) if isinstance(shown, float) else str(shown))
    return grid


def checks_view(checks: Sequence[Document]) -> Text:
    """One line for each check: its mark, its name, what was found and what to do."""
    width = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        remedy = f"; {check['remedy']}" if check["remedy"] else ""
        lines.append(Text.assemble((f"{check['state']:4}", MARKS[check["state"]]), f"  {check['name']:{width}}  {check['message']}{remedy}"))
    return Text("\n").join(lines)


def claims_view(document: Document) -> RenderableType:
    """What `study verify` shows: each claim with what was expected and measured, and how many were tested."""
    if not document["claims"]:
        return Text("this study makes no claims; write some under `claims` of its spec, and `study run` tests them on the trials that it has")
    table = _table("claim", "expected", "measured", "interval", "n", "verdict", right=("measured", "n"))
    for claim in document["claims"]:
        ends = _ends(claim["interval"])
        verdict = Text(claim["verdict"], style=VERDICT_STYLES[claim["verdict"]]) + Text(f": {claim['note']}" if claim["note"] else "")
        table.add_row(claim["id"], _expected(claim["expected"]), number(claim["estimate"]), ends, str(claim["n"]), verdict)
    said = [Text(f"{claim['id']}: {claim['says']}{_source(claim)}") for claim in document["claims"]]
    tested = document["tested"]
    counts = f"{tested} claim{'s were' if tested > 1 else ' was'} tested, each by an interval that misses the truth once in 20 times; n counts seeds"
    return Group(table, *said, Text(counts))


def _expected(expected: Document) -> str:
    """`below 0.7`, `between 0.45 and 0.55`, `first last`, `order last, none`."""
    ((word, value),) = expected.items()
    if word == "between":
        return f"between {number(value[0])} and {number(value[1])}"
    return f"{word} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _source(claim: Document) -> str:
    return f" ({claim['source']})" if claim["source"] else ""


def trace_view(document: Document, effective_lrs: Mapping[str, Sequence[float | None]], width: int = PIPE_WIDTH) -> RenderableType:
    """What `study trace` shows; in a narrow terminal without those that follow from others.

    Args:
        document: Of `study trace --json`.
        effective_lrs: Layer to its effective lr at every sample, which the document leaves out.
        width: Columns of the terminal.
    """
    left_out = () if width >= NARROW else ("place", "rotation", "expected", "relaxed")
    rows = [_layer_row(layer, effective_lrs[layer["layer"]]) for layer in document["layers"]]
    heads = [word for word in (rows or [{}])[0] if word not in left_out]
    table = _table(*heads, right=("finally", "|w|", "rotation", "expected", "ratio", "relaxed"))
    table.padding = (0, 1, 0, 0)
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    return Group(Text.assemble((document["trial_id"], "bold"), f": {document['steps']:,} steps\n{verdict(document)}"), table)


def _layer_row(layer: Document, effective_lrs: Sequence[float | None]) -> dict[str, str | Text]:
    """A layer's cells by the heads of their columns."""
    ratio, passed = layer["rotation_ratio"], layer["relaxation_times"]
    return {
        "layer": layer["layer"],
        "place": layer["place"] or "-",
        "SI": "✓" if layer["scale_invariant"] else "-",
        "effective lr": spark_line(effective_lrs),
        "finally": number(layer["effective_lr"]),
        "|w|": number(layer["weight_norm"]),
        "rotation": number(layer["rotation"]),
        "expected": number(layer["rotation_expected"]),
        "ratio": "-" if ratio is None else f"{ratio:.2f}",
        "relaxed": "-" if passed is None else f"{passed:.1f}x",
        "state": Text(_fate(layer), style=STATE_STYLES.get(layer["state"], "")),
    }


def _fate(layer: Document) -> str:
    """A layer's state; where theory has none, the way that its norm goes."""
    if layer["state"] != "free":
        return str(layer["state"])
    change = layer["norm_change"] or 0.0
    return f"free {'→' if abs(change) <= LEVEL else '↗' if change > 0 else '↘'}"


def spark_line(values: Sequence[float | None], columns: int = SPARK_COLUMNS) -> str:
    """Positive values as blocks of seven heights on a logarithmic scale; a gap where there is none.

    Of values that share a column the one farthest from the median of all is shown, so that peaks and dips are.
    """
    logs = [math.log(value) if value is not None and value > 0 and math.isfinite(value) else None for value in values]
    known = [value for value in logs if value is not None]
    if not known:
        return ""
    span = max(max(known) - min(known), LEAST_SPAN)
    bottom, usual = (max(known) + min(known) - span) / 2, median(known)
    count = min(columns, len(logs))
    shares = [logs[position * len(logs) // count : (position + 1) * len(logs) // count] for position in range(count)]
    shown = [max((value for value in share if value is not None), key=lambda value: abs(value - usual), default=None) for share in shares]
    return "".join(" " if value is None else BLOCKS[min(int(len(BLOCKS) * (value - bottom) / span), len(BLOCKS) - 1)] for value in shown)


def summary_line(summary: Document) -> str:
    """A valid spec in one line."""
    arms = f"{len(summary['arms'])} arms" if len(summary["arms"]) > 1 else "1 arm"
    epochs = "a varied number of" if summary["epochs"] is None else summary["epochs"]
    axes = ", ".join(summary["axes"])
    return f"{summary['name']}: {summary['trials']} trials over {arms}, sampler {summary['sampler']}, {epochs} epochs, {len(summary['axes'])} axes: {axes}"


def headline(spec: StudySpec) -> str:
    """How big a study is, and where it runs."""
    address = os.environ.get("RAY_ADDRESS")
    arms = f" over {len(spec.arms)} arms" if len(spec.arms) > 1 else ""
    again = spec.replicate.top * spec.replicate.seeds * len(spec.arms)
    replicates = f", then up to {again} replicates," if again else ""
    return f"{spec.name}: {spec.search.trials} trials{arms}{replicates} on {f'the cluster {address}' if address else 'this machine'}"


def engine_line(engine: Document) -> str:
    """Which engine trains a study, and why."""
    return f"engine: {engine['name']}, as {engine['why']}"


def why_nothing(document: Document) -> str:
    """Why a study has no best trial."""
    counts = ", ".join(f"{document['trials'][word]} {word}" for word in ENDED if document["trials"][word])
    return f"the study ended without a usable result: no trial trained to its end with a finite value ({counts or 'none was started'})"


def what_then(document: Document, folder: StudyFolder) -> str:
    """What to do when a study has no best trial."""
    trials = document["trials"]
    if trials["failed"]:
        return f"see {first_traceback(folder)}"
    if trials["diverged"] >= max(1, trials["stopped"]):
        return "lower the upper end of optimizer.lr, or set optimizer.clip"
    return "raise budget.wall or stopping.grace"


def first_traceback(folder: StudyFolder) -> Path | None:
    """Where the traceback of the first failed trial lies."""
    return min(folder.path.glob("trials/*/artifacts/traceback.txt"), default=None)


def where_to_look(document: Document, folder: StudyFolder, home: Path | None, tracking_uri: str | None) -> str:
    """What a study left behind, and the commands that show it."""
    here = f" --home {shlex.quote(str(home))}" if home else ""
    store = f" --tracking-uri {shlex.quote(masked(tracking_uri))}" if tracking_uri else ""
    failed = document["trials"]["failed"]
    lines = [f"{failed} trials failed, see {first_traceback(folder)}"] if failed else []
    lines += [f"best config    {folder.best}", f"how to use it  study best {document['name']}{here}", f"every trial    study ui{here}{store}"]
    return "\n" + "\n".join(lines)


def how_to_use(source: str, **where: object) -> str:
    """Three lines of Python that build an optimizer from a best config."""
    given = "".join(f", {word}={masked(str(value))!r}" for word, value in where.items() if value is not None)
    lines = (
        f"best = study.load_best({source!r}{given})",
        "optimizer = study.build_optimizer(model, best.optimizer)",
        "scheduler = study.build_scheduler(optimizer, best.schedule, total_steps=10_000)",
    )
    return "\nIn Python:\n  " + "\n  ".join(lines)


def _table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
