"""Display: the progress of a study while it runs, in a terminal or as lines.

status document ──┬─ progress_view    the live display of `study run`, twice a second
                  └─ progress_line    the same as one line, where there is no terminal
"""

import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from study.budget import budget_line
from study.errors import StudyError
from study.home import StudyFolder
from study.tracking.outbox import Outbox
from study.tuning.status import status
from study.views import Document, arms_table, best_line, clock, ended, outcomes, replicates_line, total

REFRESH = 0.5
"""Seconds between two looks at a study in a terminal."""

BETWEEN_LINES = 5.0
"""Seconds between two lines where there is no terminal, and only when something changed."""

MANY_EVENTS = 200
"""More events than this on their way to MLflow are worth a word."""


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
            news = document["trials"], document["best"], document["replicates"]
            if news != told:
                told = news
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
    lines: list[RenderableType] = [head, outcomes(trials) + Text(replicates_line(document)), Text(best_line(document)), arms_table(document)]
    if spent := budget_line(document["budget"]):
        lines.append(Text(spent))
    if behind > MANY_EVENTS:
        lines.append(Text(f"{behind} events are on their way to MLflow", style="yellow"))
    return Group(*lines)


def progress_line(document: Document, pace: Pace, behind: int = 0) -> str:
    """The live display in one line."""
    trials = document["trials"]
    parts = [f"{ended(trials)} of {total(trials)} trials ({outcomes(trials).plain}){replicates_line(document)}", best_line(document), _rate(pace)]
    if spent := budget_line(document["budget"]):
        parts.append(spent)
    if behind > MANY_EVENTS:
        parts.append(f"{behind} events on their way to MLflow")
    return f"[{clock(pace.elapsed)}] " + "; ".join(parts)


def _rate(pace: Pace) -> str:
    if pace.first is None:
        return "starting Ray"
    return f"{'-' if pace.per_minute is None else f'{pace.per_minute:.1f}'} trials/min, {clock(pace.left)} left"
