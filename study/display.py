"""Display: how studies look in a terminal. Everything shown comes from the documents that `--json` prints.

status document ──┬─ progress_view    the live display of `study run`, twice a second
                  ├─ progress_line    the same as one line, where there is no terminal
                  └─ study_view       the arms and the best, once it has ended
"""

import math
import os
import shlex
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from study.errors import StudyError
from study.home import StudyFolder
from study.spec import StudySpec
from study.tracking.names import masked
from study.tracking.outbox import Outbox
from study.trial import OptimizerSpec
from study.tuning.status import status

Document = Mapping[str, Any]

ENDED = ("completed", "stopped", "diverged", "failed")
"""Outcomes after which a trial is not continued."""

REFRESH = 0.5
"""Seconds between two looks at a study in a terminal."""

BETWEEN_LINES = 5.0
"""Seconds between two lines where there is no terminal, and only when something changed."""

MANY_EVENTS = 200
"""More events than this on their way to MLflow are worth a word."""

PIPE_WIDTH = 160
"""Columns where there is no terminal: wide enough that no name is cut."""

STYLES = {"completed": "green", "stopped": "yellow", "diverged": "magenta", "failed": "red", "interrupted": "yellow", "running": "cyan"}
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


@dataclass(slots=True)
class Pace:
    """How fast trials end, counted from the moment at which the first one runs."""

    wall: float | None = None
    """The budget of wall time, in seconds."""
    began: float | None = None
    first: float | None = None
    before: int = 0
    """Trials that had ended before this start of the study."""
    elapsed: float = 0.0
    per_minute: float | None = None
    left: float | None = None

    def see(self, trials: Document, now: float) -> None:
        """Takes in the counts at a moment."""
        if self.began is None:
            self.began, self.before = now, ended(trials)
        self.elapsed = now - self.began
        if self.first is None and (trials["running"] or ended(trials) > self.before):
            self.first = now
        done = ended(trials) - self.before
        if self.first is not None and done and now > self.first:
            self.per_minute = 60 * done / (now - self.first)
            self.left = 60 * (total(trials) - ended(trials)) / self.per_minute
        if self.wall is not None:
            self.left = min(self.left if self.left is not None else math.inf, max(0.0, self.wall - self.elapsed))


class Watcher:
    """Shows the progress of a study while it runs: live in a terminal, else a line now and then."""

    def __init__(self, out: Console, *, live: bool = True) -> None:
        self.out = out
        self.live = live and out.is_interactive and out.file.isatty()
        self.watched = False
        """Whether anything was run."""
        self._behind = 0
        self._stopping = False

    @contextmanager
    def __call__(self, folder: StudyFolder, interrupt: threading.Event) -> Iterator[None]:
        """Watches a study until the block is left; says so when the user has asked it to stop."""
        self.watched = True
        done = threading.Event()
        thread = threading.Thread(target=self._live if self.live else self._lines, args=(folder, done, interrupt), name="display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self._behind:
                self.out.print(f"bringing the last {self._behind} events to MLflow")

    def _live(self, folder: StudyFolder, done: threading.Event, interrupt: threading.Event) -> None:
        with Live(console=self.out, auto_refresh=False, transient=True) as live:
            for document, pace, self._behind in _looks(folder, done, REFRESH):
                self._say_that_it_stops(interrupt)
                live.update(progress_view(document, pace, self._behind), refresh=True)

    def _say_that_it_stops(self, interrupt: threading.Event) -> None:
        if interrupt.is_set() and not self._stopping:
            self._stopping = True
            self.out.print("stopping: running trials are closed and can be continued later; Ctrl-C again ends at once")

    def _lines(self, folder: StudyFolder, done: threading.Event, interrupt: threading.Event) -> None:
        told = None
        for document, pace, self._behind in _looks(folder, done, BETWEEN_LINES):
            self._say_that_it_stops(interrupt)
            if (document["trials"], document["best"]) != told:
                told = document["trials"], document["best"]
                self.out.print(progress_line(document, pace, self._behind), soft_wrap=True)


def _looks(folder: StudyFolder, done: threading.Event, between: float) -> Iterator[tuple[Document, Pace, int]]:
    """Status, pace and undelivered events, again and again, and once more at the end; what cannot be read now is read at the next look."""
    outbox, pace, last = Outbox(folder.path), Pace(), False
    while True:
        try:
            document, behind = status(folder), outbox.progress()["undelivered"]
        except (StudyError, OSError, sqlite3.Error):
            pass
        else:
            pace.wall = document["budget"]["wall"]
            pace.see(document["trials"], time.monotonic())
            yield document, pace, behind
        if last:
            outbox.close()
            return
        last = done.wait(between)


def progress_view(document: Document, pace: Pace, behind: int = 0) -> RenderableType:
    """The live display."""
    trials = document["trials"]
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(document["name"], style="bold"),
        f"{ended(trials)} of {total(trials)} trials",
        ProgressBar(total=total(trials), completed=ended(trials), width=30),
        _rate(pace),
        f"{clock(pace.elapsed)} so far",
    )
    lines: list[RenderableType] = [head, _outcomes(trials), Text(best_line(document)), arms_table(document)]
    if behind > MANY_EVENTS:
        lines.append(Text(f"{behind} events are on their way to MLflow", style="yellow"))
    return Group(*lines)


def progress_line(document: Document, pace: Pace, behind: int = 0) -> str:
    """The live display in one line."""
    trials = document["trials"]
    parts = [f"{ended(trials)} of {total(trials)} trials ({_outcomes(trials).plain})", best_line(document), _rate(pace)]
    if behind > MANY_EVENTS:
        parts.append(f"{behind} events on their way to MLflow")
    return f"[{clock(pace.elapsed)}] " + "; ".join(parts)


def _rate(pace: Pace) -> str:
    if pace.first is None:
        return "starting Ray"
    return f"{'-' if pace.per_minute is None else f'{pace.per_minute:.1f}'} trials/min, {clock(pace.left)} left"


def _outcomes(trials: Document) -> Text:
    shown = [(word, trials[word]) for word in (*ENDED, "interrupted", "running", "waiting") if trials[word]]
    return Text(", ").join(Text(f"{count} {word}", style=STYLES.get(word, "")) for word, count in shown)


def best_line(document: Document) -> str:
    """`best 0.0711 val/error: gamma-roles-0003 (optimizer.gamma=last)`."""
    best = document["best"]
    if best is None:
        return "best -"
    arm = "" if best["arm"] == "all" else f" ({best['arm']})"
    return f"best {number(best['value'])} {best['metric']}: {best['trial_id']}{arm}"


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
    head = Text.assemble((document["name"], "bold"), f" ({document['study_id']}): {document['state']}, ", _outcomes(document["trials"]))
    return Group(head, arms_table(document), Text(best_line(document)), Text(f"{clock(seconds)} of training in all trials together"))


def studies_table(documents: Iterable[Document]) -> Table:
    """One row for each study of a home."""
    table = _table("study", "state", "trials", "best", "metric", "trial", right=("trials", "best"))
    for document in documents:
        best, trials = document["best"] or {"value": None, "metric": "-", "trial_id": "-"}, document["trials"]
        row = (document["name"], document["state"], f"{ended(trials)} of {total(trials)}", number(best["value"]), best["metric"], best["trial_id"])
        table.add_row(*row)
    return table


def plan_view(document: Document, optimizer: OptimizerSpec) -> RenderableType:
    """What `study plan` shows: the size of the study, the decay of every parameter in the base trial, warnings."""
    arms, forecast = document["arms"], document["forecast"]
    share = "" if len(arms) == 1 else f" over {len(arms)} arms, {document['trials'] // len(arms)} each: {'; '.join(arms)}"
    steps = f"{forecast['steps_per_trial']:,} steps per trial, {forecast['steps']:,} in all where none is stopped"
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
    return Group(Text(f"{document['trials']} trials{share}"), Text(steps), table, *counts, *warnings)


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
    rows = {"best": document["trial_id"], "value": value} | ({"MLflow run": document["run_id"]} if document["run_id"] else {})
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


def summary_line(summary: Document) -> str:
    """A valid spec in one line."""
    arms = f"{len(summary['arms'])} arms" if len(summary["arms"]) > 1 else "1 arm"
    epochs = "a varied number of" if summary["epochs"] is None else summary["epochs"]
    axes = ", ".join(summary["axes"])
    return f"{summary['name']}: {summary['trials']} trials over {arms}, sampler {summary['sampler']}, {epochs} epochs, {len(summary['axes'])} axes: {axes}"


def engine_line(spec: StudySpec) -> str:
    """How big a study is, which engine trains it, and why."""
    resources, address = spec.resources, os.environ.get("RAY_ADDRESS")
    why = "as resources.engine says" if resources.engine == "solo" else "resources.engine is auto, and no other engine is there"
    share = f"{number(resources.gpus_per_trial)} GPU" if resources.gpus_per_trial else f"{resources.cpus_per_trial} CPU core"
    where = f"the cluster {address}" if address else "this machine"
    arms = f" over {len(spec.arms)} arms" if len(spec.arms) > 1 else ""
    return f"{spec.name}: {spec.search.trials} trials{arms}\nengine: solo (one process per trial, {share} each, on {where}; {why})"


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
    given = "".join(f", {word}={str(value)!r}" for word, value in where.items() if value is not None)
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
