"""Optuna's journal, MLflow and `study list` agree on every trial, whatever becomes of it.

A scene without Ray: fake Tune trials, called in Tune's order, over the real searcher, trainable, callback, ledger, recorder and journal.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from study.home import StudyFolder
from study.measurement import Ending, Measurement, Outcome, Progress
from study.space import Assignment
from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from study.tracking.recorder import Recorder
from study.tuning.callbacks import LedgerCallback, history_of
from study.tuning.failures import FirstFailures
from study.tuning.search import DIVERGED, Search
from study.tuning.searcher import JournalSearcher
from study.tuning.status import status
from study.tuning.trainables import StudyTrainable

EPOCHS = 3

COMPLETED, STOPPED, PATIENCE = Ending(Outcome.COMPLETED), Ending(Outcome.STOPPED, "scheduler"), Ending(Outcome.STOPPED, "patience")


def bridge_spec(trials: int, **sections: Any) -> StudySpec:
    """Choices of four types, of which Python takes two for equal, and an axis that exists for one rule only."""
    space = {
        "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True},
        "model.args.x": {"choices": [1, True, "1", None]},
        "optimizer.rule": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.5, "high": 0.95, "when": {"optimizer.rule": "sgd"}},
    }
    trial = {"model": {"name": "import:nobody:builds_it", "args": {"x": 0}}, "schedule": {"epochs": EPOCHS}}
    search = {"sampler": "random", "trials": trials}
    return check({"name": "bridge", "trial": trial, "space": space, "search": search, **sections})


class Trainable(StudyTrainable):
    """Reports what it is told to."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.setup(config)

    def told(self, progress: Progress) -> dict[str, Any]:
        return self._report(progress)


class Host:
    """As much of Ray Tune as our side sees: one trial at a time, its events in Tune's order (ray 2.60)."""

    def __init__(self, spec: StudySpec, folder: StudyFolder, wishes: list[Assignment]) -> None:
        self.outbox, self.search = Outbox(folder.path), Search(spec, folder.journal)
        for point in wishes:
            self.search.enqueue(point)
        left = [(proposal, history_of(self.outbox, proposal.trial_id, spec.objective)) for proposal in self.search.running()]
        settings = {"folder": str(folder.path), "objective": spec.objective.model_dump_json(), "patience": spec.stopping.patience, "grace": 1}
        self.searcher = JournalSearcher(self.search, settings, left)
        self.callback = LedgerCallback(self.outbox, folder.path, spec.objective, FirstFailures(0))
        self.count = 0

    def begin(self) -> None:
        self.count += 1
        self.tune_id = f"tune-{self.count}"
        config = self.searcher.suggest(self.tune_id)
        assert isinstance(config, dict)
        self.trainable, self.epoch = Trainable(config), config["epoch"]
        self.trial: Any = SimpleNamespace(trial_id=self.tune_id, config=config, last_result=None, num_failures=0, max_failures=3)
        self.callback.on_trial_start(0, [], self.trial)

    def epoch_of(self, values: dict[str, float], ending: Ending | None = None, stop: bool = False) -> bool:
        """One result; returns whether it was the last."""
        self.epoch += 1
        measurement = Measurement(10 * self.epoch, self.epoch, values, seconds=0.5)
        result = self.trainable.told(Progress(self.trial.config["trial_id"], measurement, ending))
        done = stop or bool(result.get("done"))
        if not done:
            self.searcher.on_trial_result(self.tune_id, dict(result))
        self.callback.on_trial_result(0, [], self.trial, result)
        self.trial.last_result = {**result, "done": done}
        if done:
            self.callback.on_trial_complete(0, [], self.trial)
            self.searcher.on_trial_complete(self.tune_id, result=self.trial.last_result)
        return done

    def lose(self) -> None:
        """The process of the trial is lost for good."""
        self.callback.on_trial_error(0, [], self.trial)
        self.searcher.on_trial_complete(self.tune_id, error=True)


def good(value: float) -> dict[str, float]:
    return {"val/error": value, "train/loss": 2 * value}


@dataclass(frozen=True)
class Case:
    """What happens to a trial, and what must be remembered of it."""

    name: str
    values: tuple[float | None, ...]
    """The objective at each epoch; None where the measurement lacks it."""
    ending: Ending | None = COMPLETED
    """What the engine says with the last one."""
    stop: bool = False
    """Whether Tune's scheduler stops it there."""
    lost: bool = False
    kills: tuple[int, ...] = ()
    """Epochs after which the driver dies and a new start takes over."""
    outcome: str = "completed"
    reason: str = ""
    state: TrialState = TrialState.COMPLETE
    status: str = "FINISHED"


PRUNED: dict[str, Any] = {"state": TrialState.PRUNED, "status": "KILLED", "outcome": "stopped"}
INFEASIBLE: dict[str, Any] = {"state": TrialState.PRUNED, "status": "FAILED", "outcome": "diverged"}
FAILED: dict[str, Any] = {"state": TrialState.FAIL, "status": "FAILED", "outcome": "failed"}

CASES = (
    Case("enqueued twice", (0.4, 0.3, 0.2)),
    Case("completed", (0.5, 0.4, 0.3)),
    Case("NaN", (0.5, None), Ending(Outcome.DIVERGED, "nan"), reason="nan", **INFEASIBLE),
    Case("NaN among the values", (0.5, math.nan), Ending(Outcome.DIVERGED, "nan"), reason="nan", **INFEASIBLE),
    Case("inf", (0.5, math.inf), Ending(Outcome.DIVERGED, "inf"), reason="inf", **INFEASIBLE),
    Case("exploded at once", (None,), Ending(Outcome.DIVERGED, "exploded"), reason="exploded", **INFEASIBLE),
    Case("missing metric", (0.5, None), None, reason="user-code", **FAILED),
    Case("missing metric at the end", (0.5, 0.4, None), reason="user-code", **FAILED),
    Case("stopped early", (0.5, 0.4), None, stop=True, reason="scheduler", **PRUNED),
    Case("stopped at its first result", (0.01,), None, stop=True, reason="scheduler", **PRUNED),
    Case("out of patience", (0.2, 0.3, 0.3), None, reason="patience", **PRUNED),
    Case("restored twice", (0.5, 0.4, 0.35), kills=(1, 2)),
    Case("restored, then stopped", (0.5, 0.45), None, stop=True, kills=(1,), reason="scheduler", **PRUNED),
    Case("an error in the user's code", (0.5, None), Ending(Outcome.FAILED, "user-code", "Traceback: boom"), reason="user-code", **FAILED),
    Case("a lost process", (0.5,), None, lost=True, reason="worker-lost", **FAILED),
    *(Case(f"completed {number}", (0.6, 0.5, 0.4 + number / 100)) for number in range(9)),
)


@dataclass(frozen=True)
class Remembered:
    """What each of the three says of each trial, by its number; `list` as a whole."""

    journal: list[FrozenTrial]
    runs: dict[str, Run]
    document: dict[str, Any]
    ids: list[str]
    spec: StudySpec
    client: MlflowClient


def journal_of(folder: StudyFolder) -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    return optuna.load_study(study_name="bridge/all", storage=storage).get_trials()


def played(folder: StudyFolder, spec: StudySpec, cases: tuple[Case, ...], wishes: list[Assignment]) -> list[str]:
    """Plays the cases one after the other, and returns the trials' ids."""
    host, ids = Host(spec, folder, wishes), []
    for case in cases:
        host.begin()
        ids.append(host.trial.config["trial_id"])
        for epoch, value in enumerate(case.values, start=1):
            last = epoch == len(case.values)
            values = {"train/loss": 1.0} if value is None else good(value)
            ended = host.epoch_of(values, case.ending if last else None, case.stop and last)
            assert ended is (last and not case.lost), case.name
            if epoch in case.kills:
                host = Host(spec, folder, wishes)
                host.begin()
                assert host.trial.config["trial_id"] == ids[-1]
        if case.lost:
            host.lose()
    return ids


@contextmanager
def recorded(folder: StudyFolder, spec: StudySpec, uri: str) -> Iterator[None]:
    """Brings what the block plays, and what was played before, to MLflow."""
    recorder = Recorder(folder.path, uri, spec, folder.card().study_id, engine="solo")
    recorder.open()
    recorder.start()
    yield
    recorder.close()


def runs_of(client: MlflowClient) -> dict[str, Run]:
    """The trials' runs by the trials' ids."""
    experiment = client.get_experiment_by_name("bridge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    found = {run.data.tags["study.trial_id"]: run for run in children}
    assert len(found) == len(children)
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Remembered:
    home = tmp_path_factory.mktemp("home")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    (home / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    spec = bridge_spec(len(CASES), stopping={"patience": 2})
    folder = StudyFolder.prepare(home, spec)
    with recorded(folder, spec, uri):
        ids = played(folder, spec, CASES, [{"optimizer.lr": 0.123}])
    client = MlflowClient(uri)
    runs = runs_of(client)
    assert len(runs) == len(CASES)
    return Remembered(journal_of(folder), runs, status(folder), ids, spec, client)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_they_agree_on_each_trial(scene: Remembered, number: int) -> None:
    case, frozen, run = CASES[number], scene.journal[number], scene.runs[scene.ids[number]]
    assert (frozen.state, run.info.status) == (case.state, case.status)
    assert (frozen.user_attrs["ending"]["outcome"], run.data.tags["study.outcome"]) == (case.outcome, case.outcome)
    assert frozen.user_attrs["ending"]["reason"] == case.reason
    assert run.data.tags.get("study.stop_reason", "") == (case.reason if case.outcome == "stopped" else "")
    assert run.data.tags.get("study.divergence", "") == (case.reason if case.outcome == "diverged" else "")
    assert run.data.tags.get("study.failure", "") == (case.reason if case.outcome == "failed" else "")
    assert frozen.constraints == ({DIVERGED: 1.0} if case.outcome == "diverged" else {})
    seen = {epoch: value for epoch, value in enumerate(case.values, start=1) if value is not None and math.isfinite(value)}
    assert frozen.intermediate_values == seen
    points = scene.client.get_metric_history(run.info.run_id, "val/error")
    assert [(point.step, point.value) for point in points] == [(10 * epoch, value) for epoch, value in seen.items()]
    if case.outcome == "completed":
        assert frozen.value == float(run.data.tags["study.value"]) == case.values[-1]


def test_they_agree_on_what_was_drawn(scene: Remembered) -> None:
    """Types of choices, too, and that an axis whose condition does not hold has no value: there the trial's own holds."""
    kinds = set()
    for trial_id, frozen in zip(scene.ids, scene.journal, strict=True):
        params = scene.runs[trial_id].data.params
        x = frozen.params["model.args.x"]
        kinds.add(repr(x))
        assert params["model.args.x"] == {"1": "1", "True": "true", "'1'": '"1"', "None": "null"}[repr(x)]
        assert float(params["optimizer.lr"]) == frozen.params["optimizer.lr"]
        assert ("optimizer.momentum" in frozen.params) == (frozen.params["optimizer.rule"] == "sgd")
        assert float(params["optimizer.momentum"]) == frozen.params.get("optimizer.momentum", 0.9)
    assert kinds == {"1", "True", "'1'", "None"}
    assert [frozen.params["optimizer.lr"] == 0.123 for frozen in scene.journal] == [True] + [False] * (len(CASES) - 1)


def test_they_agree_on_the_counts_and_the_best(scene: Remembered) -> None:
    outcomes = [case.outcome for case in CASES]
    counts = {outcome: outcomes.count(outcome) for outcome in ("completed", "stopped", "diverged", "failed")}
    assert scene.document["trials"] == {**counts, "interrupted": 0, "running": 0, "waiting": 0}
    assert [frozen.state for frozen in scene.journal].count(TrialState.COMPLETE) == counts["completed"]
    assert [run.data.tags["study.outcome"] for run in scene.runs.values()].count("completed") == counts["completed"]
    best = min(
        (frozen.value, number) for number, frozen in enumerate(scene.journal) if frozen.state is TrialState.COMPLETE and frozen.value is not None
    )
    assert (scene.document["best"]["value"], scene.document["best"]["trial_id"]) == (best[0], scene.ids[best[1]]) == (0.2, "bridge-0000")


def test_the_journal_of_a_live_study_is_read_by_optuna_itself(tmp_path: Path) -> None:
    """What optuna-dashboard does: open the journal that another process writes to, and look again."""
    spec = bridge_spec(4)
    folder = StudyFolder.prepare(tmp_path, spec)
    host = Host(spec, folder, [])
    host.begin()
    host.epoch_of(good(0.5))
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    (summary,) = optuna.get_all_study_summaries(storage)
    assert (summary.study_name, summary.n_trials) == ("bridge/all", 1)
    seen = optuna.load_study(study_name=summary.study_name, storage=storage)
    (live,) = seen.get_trials()
    assert (live.state, live.intermediate_values) == (TrialState.RUNNING, {1: 0.5})
    host.epoch_of(good(0.4))
    host.epoch_of(good(0.3), COMPLETED)
    host.begin()
    assert [trial.state for trial in seen.get_trials()] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert seen.best_value == 0.3 and seen.best_params["optimizer.lr"] == seen.get_trials()[0].params["optimizer.lr"]


@pytest.mark.parametrize("tried", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_a_thousand_queued_trials_are_each_tried_once(tmp_path: Path, tried: int, mlflow_database: Path) -> None:
    """Across a restart in the middle; journal, MLflow and `study status` agree."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    spec = bridge_spec(tried)
    folder = StudyFolder.prepare(tmp_path, spec)
    wishes: list[Assignment] = [{"optimizer.lr": 1e-3 * 1.005**number, "model.args.x": True} for number in range(1000)]
    short = tuple(Case(str(number), (number / 1000,)) for number in range(tried))
    ids = []
    for half in (short[: tried // 2], short[tried // 2 :]):
        with recorded(folder, spec, uri):
            ids += played(folder, spec, half, wishes)
    frozen, runs = journal_of(folder), runs_of(MlflowClient(uri))
    assert set(runs) == set(ids) and len(ids) == tried
    told = [(float(runs[trial_id].data.params["optimizer.lr"]), float(runs[trial_id].data.tags["study.value"])) for trial_id in ids]
    assert told == [(trial.params["optimizer.lr"], trial.value) for trial in frozen]
    assert {(run.info.status, run.data.tags["study.outcome"]) for run in runs.values()} == {("FINISHED", "completed")}
    assert [trial.params["optimizer.lr"] for trial in frozen] == [point["optimizer.lr"] for point in wishes[:tried]]
    assert {(type(trial.params["model.args.x"]), trial.state) for trial in frozen} == {(bool, TrialState.COMPLETE)}
    document = status(folder)
    assert (document["trials"]["completed"], document["trials"]["waiting"], document["best"]["trial_id"]) == (tried, 0, "bridge-0000")
