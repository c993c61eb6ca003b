"""The study home: one folder for each study, and what lies in it.

studies/
├── mlflow.db, mlflow_artifacts/  the MLflow store, unless a tracking URI names another
└── gamma-roles/
    ├── study.json              identity and state
    ├── spec.yaml               the spec with every default filled in
    ├── journal.log             Optuna's journal: what was proposed, and how it ended
    ├── outbox.sqlite           the ledger: what was measured, and what MLflow has heard of it
    ├── trials/                 snapshots of running trials, traces and weights of ended ones
    ├── trials.parquet          the table of trials
    ├── claims.json             the verdicts of its claims
    └── best.yaml               the best config
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from study.document import write_whole
from study.errors import HomeError, NameTaken, NotFound, NotRunning, SpecError
from study.problems import in_words
from study.processes import Process
from study.space import Frozen
from study.spec import StudySpec, load_spec

POLL = 0.2
"""Seconds between looks at a study that is to end."""

NAMED = 5
"""How many differences from the study that has a name are listed."""

State = Literal["running", "finished", "interrupted", "failed"]


def home_path(home: str | Path | None = None) -> Path:
    """The study home: the argument, else `$STUDY_HOME`, else `./studies`."""
    return Path(home or os.environ.get("STUDY_HOME") or "studies")


def tracking_uri_for(home: Path, tracking_uri: str | None = None) -> str:
    """The MLflow store: the argument, else `$MLFLOW_TRACKING_URI`, else SQLite in the home."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


class Card(Frozen):
    """What a study is, and how its last start ended."""

    study_id: str
    name: str
    spec_hash: str
    state: State
    created: str
    run_id: str = ""
    """The MLflow run of the study."""
    tracking_uri: str = ""
    """The MLflow store, without credentials."""
    host: str = ""
    """The machine on which a process runs it; empty while none does."""
    pid: int = 0
    """That process."""
    born: str = ""
    """When that process began, which tells it from a later one of the same number."""
    started: str = ""
    """When the latest start began; empty before the first."""
    ended: str = ""
    """When the latest start ended; empty while it goes on."""

    def wall(self) -> float | None:
        """Seconds since the latest start, or that it took; None before the first."""
        if not self.started:
            return None
        end = datetime.fromisoformat(self.ended) if self.ended else datetime.now(UTC)
        return max(0.0, (end - datetime.fromisoformat(self.started)).total_seconds())


class StudyFolder:
    """One study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = ("spec.yaml", "journal.log", "best.yaml", "trials.parquet", "claims.json")
        self.spec, self.journal, self.best, self.table, self.claims = (path / name for name in names)

    @classmethod
    def find(cls, home: Path, name: str) -> "StudyFolder":
        """The folder of a study that exists.

        Raises:
            NotFound: if the home has no study of that name.
        """
        known = [folder.path.name for folder in cls.all(home)]
        if name not in known:
            raise NotFound(f"no study of this name (got {name!r})", where=str(home), remedy=f"studies here: {', '.join(known) or 'none'}")
        return cls(home / name)

    @classmethod
    def all(cls, home: Path) -> list["StudyFolder"]:
        """Every study of a home, by name."""
        return [cls(card.parent) for card in sorted(home.glob("*/study.json"))]

    @classmethod
    def prepare(cls, home: Path, spec: StudySpec) -> "StudyFolder":
        """The folder of a spec, made on its first start; a study that never got as far as its first trial gives its name to another.

        Raises:
            HomeError: if the home cannot be written, or the card of an earlier start is damaged.
            NameTaken: if the name belongs to a study that varies or trains something else.
        """
        folder = cls(home / spec.name)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            if not folder._card.exists():
                identity = f"{spec.name}-{secrets.token_hex(4)}"
                created = datetime.now(UTC).isoformat(timespec="seconds")
                folder._write(Card(study_id=identity, name=spec.name, spec_hash=spec.spec_hash(), state="interrupted", created=created))
            (folder.path / "trials").mkdir(exist_ok=True)
        except OSError as error:
            raise HomeError(
                f"the study home cannot be written ({error.strerror})", where=str(home), remedy="choose another with --home or $STUDY_HOME"
            ) from None
        if folder.card().spec_hash != spec.spec_hash():
            if folder._has_begun() or folder.is_running():
                raise folder._taken(spec)
            folder.update(spec_hash=spec.spec_hash())
            folder.remember(spec)
        if not folder.spec.exists():
            folder.remember(spec)
        return folder

    def _has_begun(self) -> bool:
        """Whether a start got as far as MLflow; one that fails before, as by data that do not fit, leaves nothing to be kept."""
        card = self.card()
        return bool(card.run_id or card.started or self.journal.exists()) or card.state != "interrupted"

    def _taken(self, spec: StudySpec) -> NameTaken:
        """The error that says what is different in the study that has the name of the spec."""
        try:
            paths = self.load_spec().differences(spec)
        except (NotFound, SpecError):
            paths = []
        differs = f", which differs in {', '.join(paths[:NAMED])}{' and more' * (len(paths) > NAMED)}" if paths else ""
        return NameTaken(
            f"this name belongs to a study of another trial, space, sampler, seed, objective or stopping (got {self.path.name!r}{differs})",
            where=str(self.path),
            remedy=f"give the changed study another name, or remove the old one: study delete {self.path.name}",
        )

    def remember(self, spec: StudySpec) -> None:
        """Keeps the spec of the latest start."""
        write_whole(self.spec, spec.to_yaml())

    @property
    def _card(self) -> Path:
        return self.path / "study.json"

    def card(self) -> Card:
        """Identity and state; a study that nobody runs any more counts as interrupted.

        Raises:
            HomeError: if the card is damaged.
        """
        card = self._written()
        return card.model_copy(update={"state": "interrupted"}) if card.state == "running" and not self.is_running() else card

    def update(self, **changes: str | int) -> None:
        """Writes changed fields of the card, whole or not at all; with a new state, when its start began or ended."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        times = {"started": now, "ended": ""} if changes.get("state") == "running" else {"ended": now} if "state" in changes else {}
        self._write(Card.model_validate({**self._written().model_dump(), **times, **changes}))

    def _written(self) -> Card:
        """The card as it was written last."""
        try:
            return Card.model_validate_json(self._card.read_bytes())
        except OSError as error:
            message = f"cannot be read ({error.strerror})"
        except ValidationError as error:
            [first, *_] = error.errors()
            message = ": ".join(("is damaged", *map(str, first["loc"]), in_words(first)[0]))
        remedy = "put a copy of it back, or move the study's folder away and run the study anew"
        raise HomeError(message, where=str(self._card), remedy=remedy)

    def _write(self, card: Card) -> None:
        write_whole(self._card, card.model_dump_json(indent=2) + "\n")

    def load_spec(self) -> StudySpec:
        """The spec of the latest start."""
        return load_spec(self.spec)

    def is_running(self) -> bool:
        """Whether a process runs this study now."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._lock, timeout=0):
                return False
        except Timeout:
            return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Holds the study: a second process is refused, and the lock goes with this one, however it ends.

        Raises:
            HomeError: if another process runs the study.
        """
        from filelock import FileLock, Timeout

        try:
            # Whoever only looks whether the study runs holds the lock for an instant.
            lock = FileLock(self._lock, timeout=1).acquire()
        except Timeout:
            raise HomeError("another process runs this study", where=str(self.path), remedy="wait for it, or stop it with `study stop`") from None
        with lock:
            self.update(**asdict(Process.this()))
            try:
                yield
            finally:
                with suppress(HomeError):  # a full disk; the lock says that nobody runs it
                    self.update(host="", pid=0, born="")

    def stop(self) -> None:
        """Asks the process that runs this study to stop, as Ctrl-C does, and waits until its trials have reported and it has ended.

        Raises:
            NotRunning: if no process runs it, or one on another machine does.
        """
        card = self.card()
        process = Process(card.host, card.pid, card.born)
        where = str(self.path)
        if not self.is_running():
            remedy = "there is nothing to stop" if card.state in ("finished", "failed") else "`study run` goes on with it"
            raise NotRunning(f"no process runs this study (it is {card.state})", where=where, remedy=remedy)
        if card.host and not process.is_here():
            remedy = "stop it there, or with --address if it was submitted to a cluster"
            raise NotRunning(f"this study runs on another machine (got {card.host!r})", where=where, remedy=remedy)
        try:
            asked = process.interrupt()
        except PermissionError:
            raise NotRunning("this study is run by another user", where=where, remedy=f"have them stop process {card.pid}") from None
        if not asked:
            raise NotRunning("this study is just starting or ending", where=where, remedy="try again in a moment")
        while self.is_running():
            time.sleep(POLL)

    @property
    def _lock(self) -> str:
        return str(self.path / "lock")
