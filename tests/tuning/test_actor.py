"""Trials in engine actors: the same study as solo, whoever is late, leaves, raises or dies."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import ray
import torch

from study.engines.engine import Snapshot
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.errors import Interrupted
from study.home import StudyFolder
from study.measurement import Ending, Measurement, Outcome, Progress
from study.spec import StudySpec
from study.tracking.outbox import Outbox
from study.training.data import load_data
from study.trial import DataSpec, TrialSpec
from study.tuning import actor, placement
from study.tuning.actor import EngineActor
from study.tuning.choice import Choice
from study.tuning.driver import StudyResult, run
from study.tuning.hosting import _trained_by, settings_of
from study.tuning.placement import Place
from study.tuning.trainables import FusedTrainable
from study.tuning.trial_files import snapshot_path
from tests.benchmarks.our_tune import counted_ticks
from tests.tuning.test_driver import all_agree, mlflow_runs, prepared, spec

EPOCHS = 6
TRIAL: dict[str, Any] = {
    "precision": "float64",
    "data": {"batch_size": 64, "train_size": 320},
    "model": {"name": "mlp", "width": 16},
    "schedule": {"epochs": EPOCHS, "shape": "cosine"},
    "trace": {"every": 2},
}
FUSED = {"resources": {"engine": "fused", "slots": 2}}
"""On two cores: four proxies of two engines."""

SOLO = {"resources": {"engine": "solo"}}


class Scripted:
    """An engine that only counts epochs."""

    def __init__(self, slots: int = 2, epochs: int = 1000) -> None:
        self.capacity, self.epochs = slots, epochs
        self.at: dict[str, int] = {}
        """Trials to the epochs that they have trained."""
        self.ticks: list[list[str]] = []
        self.raises: dict[str, int] = {}
        """Trials to the epochs in which their own code raises."""
        self.most = sys.maxsize
        """Trials that memory is enough for."""
        self.may_go_on, self.is_busy = threading.Event(), threading.Event()
        self.may_go_on.set()

    def __len__(self) -> int:
        return len(self.at)

    def __contains__(self, trial_id: str) -> bool:
        return trial_id in self.at

    def admit(self, trial_id: str, trial: TrialSpec, snapshot: Snapshot | None = None, *, test: bool = False) -> None:
        """At its beginning or where the snapshot stands."""
        assert trial_id not in self.at and len(self.at) < self.capacity
        self.at[trial_id] = snapshot.epoch if snapshot else 0

    def release(self, trial_id: str) -> None:
        """Its slot is free."""
        del self.at[trial_id]

    def snapshot(self, trial_id: str) -> Snapshot:
        """Its epoch alone."""
        return Snapshot({}, 0, self.at[trial_id], {})

    def weights(self, trial_id: str) -> dict[str, torch.Tensor]:
        """One number."""
        return {"epoch": torch.tensor(self.at[trial_id])}

    def advance(self, only: Collection[str]) -> list[Progress]:
        """One epoch of the trials, once that is allowed."""
        self.is_busy.set()
        assert self.may_go_on.wait(60)
        self.is_busy.clear()
        self.ticks.append(list(only))
        if len(only) > self.most:
            raise MemoryError(f"{len(only)} are too many")
        for trial_id in only:
            self.at[trial_id] += 1
            if self.raises.get(trial_id) == self.at[trial_id]:
                raise ArithmeticError(f"{trial_id} is too much")
        return [Progress(one, Measurement(10 * self.at[one], self.at[one], {}), self._ending(one)) for one in only]

    def _ending(self, trial_id: str) -> Ending | None:
        return Ending(Outcome.COMPLETED) if self.at[trial_id] == self.epochs else None


class Proxies:
    """What the proxies of an actor's trials do, in one process with it."""

    def __init__(self, actor: EngineActor) -> None:
        self.actor = actor
        self.known: dict[str, int] = {}

    def ask(self, trial_id: str, epoch: int | None = None) -> "asyncio.Task[Progress]":
        """Asks for the trial's next epoch, or for the first one after *epoch*."""
        since = self.known.get(trial_id, 0) if epoch is None else epoch
        return asyncio.create_task(self._answered(trial_id, since))

    async def _answered(self, trial_id: str, since: int) -> Progress:
        async with asyncio.timeout(60):
            progress = await self.actor.next(trial_id, TrialSpec().model_dump_json(), since, proxy=f"proxy of {trial_id}")
        assert progress is not None, "it was given away"
        self.known[trial_id] = progress.measurement.epoch
        return progress

    async def train(self, *trial_ids: str) -> list[int]:
        """The next epochs of trials that ask together."""
        return [progress.measurement.epoch for progress in await asyncio.gather(*map(self.ask, trial_ids))]


async def busy(engine: Scripted) -> None:
    """Until a tick is under way."""
    assert await asyncio.to_thread(engine.is_busy.wait, 60)


async def asked_in_a_tick(engine: Scripted, proxies: Proxies) -> "tuple[asyncio.Task[Progress], asyncio.Task[Progress]]":
    """What `a` asked for, whose tick was under way when `b` asked."""
    engine.may_go_on.clear()
    first = proxies.ask("a")
    await busy(engine)
    late = proxies.ask("b")
    await asyncio.sleep(0)
    engine.may_go_on.set()
    return first, late


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The engine of this process's actors, which wait for late trials no longer than an instant."""
    engine = Scripted()
    monkeypatch.setattr(actor, "_engine", lambda *settings: engine)
    monkeypatch.setattr(actor, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(actor, "LONGEST_WAIT", 0.001)
    return engine


@pytest.fixture
def proxies(engine: Scripted, tmp_path: Path) -> Proxies:
    return Proxies(EngineActor(str(tmp_path), engine.capacity, "cpu", "converted", "best"))


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in an event loop of its own, as Ray runs an async actor."""

    @wraps(test)
    def sync(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return sync


@in_a_loop
async def test_trials_that_ask_together_are_trained_in_one_tick(engine: Scripted, proxies: Proxies) -> None:
    assert [await proxies.train("a", "b") for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    assert engine.ticks == [["a", "b"]] * 3
    assert await proxies.actor.occupancy() == [2, 2, 2]


@in_a_loop
async def test_a_tick_waits_for_trials_that_are_about_to_ask(engine: Scripted, proxies: Proxies, monkeypatch: pytest.MonkeyPatch) -> None:
    await proxies.train("a", "b")
    monkeypatch.setattr(actor, "SHORTEST_WAIT", 60.0)
    first = proxies.ask("a")
    await asyncio.sleep(0)
    assert (await proxies.train("b"), await first) == ([2], Progress("a", Measurement(20, 2, {})))
    assert engine.ticks == [["a", "b"]] * 2


@in_a_loop
async def test_trials_that_began_apart_are_trained_together_from_then_on(engine: Scripted, proxies: Proxies, monkeypatch: pytest.MonkeyPatch) -> None:
    await proxies.train("a")
    monkeypatch.setattr(actor, "SHORTEST_WAIT", 60.0)
    first, late = await asked_in_a_tick(engine, proxies)
    await first
    assert await proxies.train("a") == [3]
    assert (await late).measurement.epoch == 1
    assert await proxies.train("a", "b") == [4, 2]
    assert engine.ticks == [["a"], ["a"], ["b", "a"], ["a", "b"]]


@in_a_loop
async def test_a_trial_that_was_stopped_is_not_waited_for(engine: Scripted, proxies: Proxies, monkeypatch: pytest.MonkeyPatch) -> None:
    await proxies.train("a", "b")
    monkeypatch.setattr(actor, "SHORTEST_WAIT", 60.0)
    waiting = proxies.ask("a")
    await asyncio.sleep(0)
    await proxies.actor.release("b", "proxy of b")
    assert await proxies.train("c") == [1]  # whose place is free
    assert (await waiting).measurement.epoch == 2
    assert engine.ticks == [["a", "b"], ["a", "c"]]


@in_a_loop
async def test_a_trial_is_given_to_an_engine_that_idles_and_goes_on_there(engine: Scripted, proxies: Proxies, tmp_path: Path) -> None:
    await proxies.train("a", "b")
    assert await proxies.actor.give() == "proxy of b"
    assert await proxies.actor.give() == ""  # the last one is kept
    assert await proxies.actor.next("b", TrialSpec().model_dump_json(), 1, proxy="proxy of b") is None
    assert set(engine.at) == {"a"}
    assert Snapshot.load(snapshot_path(tmp_path, "b")).epoch == 1
    assert await proxies.train("a") == [2]
    assert await proxies.train("b") == [2]  # as on any engine that finds its snapshot


@in_a_loop
async def test_nothing_is_given_by_an_engine_that_trains_one_trial(engine: Scripted, proxies: Proxies) -> None:
    assert await proxies.actor.give() == ""
    await proxies.train("a", "b")
    await proxies.train("a")  # nobody asks for the other one any more
    assert await proxies.actor.give() == ""


@in_a_loop
async def test_a_trial_stays_if_its_proxy_has_not_heard_of_its_last_epoch(engine: Scripted, proxies: Proxies, tmp_path: Path) -> None:
    """Its snapshot would be beyond what the study knows."""
    await proxies.train("a", "b")
    await proxies.actor.give()
    assert (await proxies.ask("b", 0)).measurement.epoch == 1
    assert not snapshot_path(tmp_path, "b").exists()
    assert set(engine.at) == {"a", "b"}


@in_a_loop
async def test_a_trial_that_was_stopped_is_not_given_away(engine: Scripted, proxies: Proxies) -> None:
    await proxies.train("a", "b")
    await proxies.actor.give()
    await proxies.actor.release("b", "proxy of b")
    assert await proxies.train("a", "c") == [2, 1]
    assert set(engine.at) == {"a", "c"}


@in_a_loop
async def test_an_engine_that_idles_asks_for_a_trial_ever_less_often(engine: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "SHORTEST_IDLE", 0.01)
    monkeypatch.setattr(actor, "LONGEST_IDLE", 0.02)
    asked: list[Place] = []
    thrice = asyncio.Event()

    async def relieve(place: Place) -> None:
        asked.append(place)
        if len(asked) == 3:
            thrice.set()

    here = Place("node", "", 1)
    pool = SimpleNamespace(relieve=SimpleNamespace(remote=relieve))
    proxies = Proxies(EngineActor(str(tmp_path), 2, "cpu", "converted", "best", pool, here))
    assert not asked
    await proxies.train("a")
    await asyncio.sleep(0.1)
    assert not asked  # it will go on, as far as is known
    await proxies.actor.release("a", "proxy of a")
    await asyncio.wait_for(thrice.wait(), 60)
    assert asked == [here] * 3
    assert await proxies.train("b") == [1]


@in_a_loop
async def test_a_trial_that_asks_too_late_skips_one_tick(engine: Scripted, proxies: Proxies) -> None:
    await proxies.train("a", "b")
    first, late = await asked_in_a_tick(engine, proxies)
    assert (await first).measurement.epoch == 2
    assert (await late).measurement.epoch == 2
    assert engine.ticks[:3] == [["a", "b"], ["a"], ["b"]]


@in_a_loop
async def test_the_slot_of_a_trial_that_was_stopped_is_taken_by_another(engine: Scripted, proxies: Proxies) -> None:
    await proxies.train("a", "b")
    await proxies.actor.release("a", "proxy of a")
    assert await proxies.train("b", "c") == [2, 1]
    assert set(engine.at) == {"b", "c"}


@in_a_loop
async def test_more_trials_than_slots_wait_for_their_turn(engine: Scripted, proxies: Proxies) -> None:
    engine.epochs = 2
    waiting = proxies.ask("a"), proxies.ask("b"), proxies.ask("c")
    assert [(await one).measurement.epoch for one in waiting[:2]] == [1, 1]
    done = await asyncio.gather(proxies.ask("a"), proxies.ask("b"))
    assert not waiting[2].done()
    assert [progress.ending for progress in done] == [Ending(Outcome.COMPLETED)] * 2
    assert (await waiting[2]).measurement.epoch == 1
    assert all(len(tick) <= engine.capacity for tick in engine.ticks)


@in_a_loop
async def test_an_epoch_that_is_known_is_trained_but_not_told_again(engine: Scripted, proxies: Proxies, tmp_path: Path) -> None:
    Snapshot({}, 10, 1, {}).save(snapshot_path(tmp_path, "a"))
    assert (await proxies.ask("a", 3)).measurement.epoch == 4
    assert engine.ticks == [["a"]] * 3


@in_a_loop
async def test_what_was_told_to_a_proxy_that_died_is_told_to_the_next_one(engine: Scripted, proxies: Proxies) -> None:
    await proxies.train("a")
    await proxies.train("a")
    engine.may_go_on.clear()
    lost = proxies.ask("a")
    await busy(engine)
    lost.cancel()
    again = proxies.ask("a", 0)
    await asyncio.sleep(0)
    engine.may_go_on.set()
    assert (await again).measurement.epoch == 3
    assert (await proxies.ask("a", 0)).measurement.epoch == 3
    assert (await proxies.ask("a", 3)).measurement.epoch == 4
    assert engine.at == {"a": 4}


@in_a_loop
async def test_a_trial_whose_code_raises_fails_alone(engine: Scripted, proxies: Proxies) -> None:
    """The others go on from their last snapshots, or their beginnings, and nothing is told twice."""
    await proxies.train("a", "b")
    engine.raises["b"] = 2
    await asyncio.gather(first := proxies.ask("a"), failed := proxies.ask("b"))
    assert first.result().measurement.epoch == 2
    ending = failed.result().ending
    assert ending is not None and ending.outcome is Outcome.FAILED
    assert "ArithmeticError: b is too much" in ending.error and "in advance" in ending.error
    assert set(engine.at) == {"a"}
    assert await proxies.train("a", "c") == [3, 1]


@in_a_loop
async def test_an_engine_without_memory_trains_half_as_many_at_once_from_then_on(engine: Scripted, proxies: Proxies) -> None:
    engine.most = 1
    assert [await proxies.train("a", "b") for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    assert engine.ticks[0] == ["a", "b"]
    assert [len(tick) for tick in engine.ticks[1:]] == [1] * (len(engine.ticks) - 1)


@in_a_loop
async def test_a_trial_that_is_too_large_alone_has_failed_without_memory(engine: Scripted, proxies: Proxies) -> None:
    engine.most = 0
    for progress in await asyncio.gather(proxies.ask("a"), proxies.ask("b")):
        assert progress.ending is not None and progress.ending.reason == "out-of-memory"


@in_a_loop
async def test_an_engine_that_cannot_start_fails_its_trials(proxies: Proxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*settings: object) -> None:
        raise OSError("no torch here")

    monkeypatch.setattr(actor, "_engine", broken)
    proxies.actor = EngineActor(str(tmp_path), 2, "cpu", "converted", "best")
    for progress in await asyncio.gather(proxies.ask("a"), proxies.ask("b")):
        assert progress.ending is not None and "no torch here" in progress.ending.error


@in_a_loop
async def test_snapshots_are_never_ahead_of_what_the_study_knows(proxies: Proxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "SNAPSHOT_SHARE", float("inf"))
    await proxies.train("a", "b")
    assert not list(tmp_path.rglob("snapshot.pt"))
    await proxies.train("a")
    assert Snapshot.load(snapshot_path(tmp_path, "a")).epoch == 1
    assert not snapshot_path(tmp_path, "b").exists()


@in_a_loop
async def test_snapshots_take_no_more_than_their_share(proxies: Proxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "SNAPSHOT_SHARE", 1e-9)
    for _ in range(5):
        await proxies.train("a")
    assert Snapshot.load(snapshot_path(tmp_path, "a")).epoch == 1


@in_a_loop
async def test_weights_that_cannot_be_written_fail_the_trial_and_free_its_slot(engine: Scripted, proxies: Proxies, tmp_path: Path) -> None:
    engine.epochs = 1
    (tmp_path / "trials").write_text("not a folder")
    (ending,) = [(await one).ending for one in [proxies.ask("a")]]
    assert ending is not None and "NotADirectoryError" in ending.error
    assert not engine.at


def test_skipped_ticks_change_no_value() -> None:
    """Of a real engine, in which one trial alone is trained while the other one's row waits."""
    trials = {name: TrialSpec.model_validate({**TRIAL, "seed": seed}) for seed, name in enumerate("ab")}
    real = FusedEngine(2)
    for name, one in trials.items():
        real.admit(name, one)
    found = {name: [] for name in trials}
    for only in ("ab", "a", "b", "a", "b", "ab"):
        for progress in real.advance(only):
            found[progress.trial_id].append(progress.measurement.values["val/loss"])
    for name, one in trials.items():
        alone = SoloEngine()
        alone.admit(name, one)
        assert found[name] == pytest.approx([alone.advance()[0].measurement.values["val/loss"] for _ in range(4)], rel=1e-9)


@pytest.fixture(scope="module")
def users_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the actors of this module's Ray find modules; that Ray runs all studies here, as starting one takes seconds."""
    folder = tmp_path_factory.mktemp("users_code")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield folder
        ray.shutdown()


@pytest.fixture
def home(tmp_path: Path, mlflow_database: Path, users_code: Path) -> Path:
    return prepared(tmp_path / "home", mlflow_database)


def same(metric: str = "", **sections: Any) -> StudySpec:
    """The study that others disturb: eight trials, none of them stopped."""
    trial = {**TRIAL, "metrics": [metric]} if metric else TRIAL
    return spec("same", trial=trial, trials=8, **{**FUSED, "stopping": {"scheduler": "none"}, **sections})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path, users_code: Path) -> tuple[Path, pd.DataFrame]:
    """It, on the fused engine."""
    home = prepared(tmp_path_factory.mktemp("undisturbed") / "home", mlflow_database)
    return home, by_id(run(same(), home=home))


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(("engines", "share"), [(0, 1 / 3), (1, 2 / 3)])
def test_a_short_study_has_fewer_engines_than_cores(engines: int, share: float, tmp_path: Path) -> None:
    """All proxies that its engines have slots for fit on this Ray's two cores, and no more."""
    studied = same()
    settings = settings_of(studied, tmp_path)
    with _trained_by(Choice("fused", 3, "converted", 2.0, "", engines=engines), studied, settings, wanted=100) as (trainable, shares, processes):
        assert (trainable, processes) == (FusedTrainable, 3 * (engines or 2))
        assert shares == {"cpu": pytest.approx(share, abs=1e-4)}
        asked, node = ray.get_actor(settings["pool"]), ray.get_runtime_context().get_node_id()
        given = ray.get([asked.engine.remote(f"proxy {number}", node, "") for number in range(processes)])
        assert sorted(given.count(engine) for engine in set(given)) == [3] * (engines or 2)


def by_id(result: StudyResult) -> pd.DataFrame:
    return result.trials.set_index("trial_id").sort_index()


def assert_as_undisturbed(home: Path, result: StudyResult, undisturbed: tuple[Path, pd.DataFrame]) -> None:
    """The same trials with the same values, every epoch told once, no trial failed in the eyes of Tune, and nobody left behind."""
    _, expected = undisturbed
    found = by_id(result)
    assert list(found.index) == list(expected.index)
    assert list(found["outcome"]) == list(expected["outcome"]) == ["completed"] * 8
    for column in ("value", "val/loss", "train/loss", "optimizer.lr", "final/effective_lr/median"):
        assert list(found[column]) == pytest.approx(list(expected[column]), rel=1e-9), column
    outbox = Outbox(home / "same")
    for trial_id in found.index:
        assert [seen.epoch for seen in outbox.history(trial_id)] == list(range(1, EPOCHS + 1))
    assert_clean(home / "same")


def assert_clean(folder: Path) -> None:
    assert not list((folder / "ray").rglob("error.*"))
    assert not list(folder.glob("trials/*/snapshot*"))
    deadline = time.monotonic() + 20
    while left := actors():
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def actors() -> list[str]:
    """Command lines of the engines and pools that this module's Ray runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text()
            if line.startswith(("ray::EngineActor", "ray::Pool")) and _parent(_parent(int(process.name))) == os.getpid():
                found.append(line)
        except OSError:  # it has ended meanwhile
            continue
    return found


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_fused_study_is_told_and_remembered_as_a_solo_one_is(undisturbed: tuple[Path, pd.DataFrame], home: Path) -> None:
    fused_home, _ = undisturbed
    all_agree(fused_home, same())
    result = run(same(**SOLO), home=home)
    assert_as_undisturbed(home, result, undisturbed)
    for folder, engine, source in ((home, "solo", "weights"), (fused_home, "fused", "update")):
        assert_clean(folder / "same")
        parent, children, client = mlflow_runs(folder, "same")
        assert {one.data.tags["study.engine"] for one in (parent, *children)} == {engine}
        trace = pd.read_parquet(client.download_artifacts(children[0].info.run_id, "trace.parquet", str(folder)))
        assert set(trace["source"]) == {source}
        assert "model.safetensors" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_fused_study_stops_bad_trials_and_fills_their_slots(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that are far shorter than the start of a process, too: engines train as many at once as they have slots.

    Not while processes start, and not the last ones, of which early stopping may leave one by itself for long.
    """
    monkeypatch.setattr(placement, "pool", placement.pool)
    ticks = counted_ticks()
    trial = {**TRIAL, "data": {"batch_size": 16}}
    studied = spec("halved", trial=trial, trials=16, stopping={"scheduler": "asha", "grace": 1, "reduction": 2}, **FUSED)
    result = run(studied, home=home)
    assert len(ticks) == 2
    assert all(max(engine) == 2 for engine in ticks), str(ticks)
    # Each trial has an epoch while others wait, but for the first of each of the four processes.
    assert 2 * sum(engine.count(2) for engine in ticks) >= 16 - 4, str(ticks)
    all_agree(home, studied)
    outcomes = list(result.trials["outcome"])
    assert set(outcomes) == {"completed", "stopped"}
    assert set(result.trials["reason"][result.trials["outcome"] == "stopped"]) == {"scheduler"}
    assert_clean(home / "halved")


DEADLY = """
import os, signal
from pathlib import Path
from study.tuning import actor, placement

HERE = Path(__file__).parent

def metric(logits, labels):
    if (HERE / "deadly").exists():
        with (HERE / "epochs").open("a") as epochs:
            epochs.write("one more\\n")
        if (HERE / "epochs").read_text().count("\\n") >= 17:
            try:
                (HERE / "deadly").rename(HERE / "died")
            except FileNotFoundError:  # the other engine was first
                return 0.0
            (HERE / "died").write_text(Path("/proc/self/cmdline").read_text())
            os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
"""
"""Kills the process of an engine once, in the middle of a study."""


def test_an_engine_that_dies_is_replaced_and_nobody_notices(users_code: Path, home: Path, undisturbed: tuple[Path, pd.DataFrame]) -> None:
    (users_code / "deadly_metric.py").write_text(DEADLY)
    (users_code / "deadly").touch()
    studied = same("import:deadly_metric:metric")
    result = run(studied, home=home)
    assert (users_code / "died").read_text().startswith("ray::EngineActor")
    all_agree(home, studied)
    assert_as_undisturbed(home, result, undisturbed)


COUNTING = """
from pathlib import Path
from study.tuning import actor, placement

actor.SNAPSHOT_SHARE = float("inf")

def metric(logits, labels):
    with (Path(__file__).parent / "counted").open("a") as epochs:
        epochs.write("one more\\n")
    return 0.0
"""
"""Counts all epochs, and has snapshots taken before each tick."""


@contextmanager
def interrupted_after(epochs: int, folder: StudyFolder, interrupt: threading.Event) -> Iterator[None]:
    """Ctrl-C once the study knows of so many epochs."""
    ended = threading.Event()

    def watch() -> None:
        outbox = Outbox(folder.path)
        while not ended.wait(0.01) and sum(entry.epoch for entry in outbox.entries()) < epochs:
            pass
        interrupt.set()
        outbox.close()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.long
def test_an_interrupted_study_goes_on_from_snapshots(users_code: Path, home: Path, undisturbed: tuple[Path, pd.DataFrame]) -> None:
    (users_code / "counting_metric.py").write_text(COUNTING)
    studied = same("import:counting_metric:metric")
    # So that, however many proxies have started by then, trials of six epochs are in the middle of theirs.
    with pytest.raises(Interrupted):
        run(studied, home=home, watch=lambda folder, interrupt: interrupted_after(20, folder, interrupt))
    _, children, _ = mlflow_runs(home, "same")
    assert "interrupted" in {child.data.tags["study.outcome"] for child in children}
    result = run(studied, home=home)
    all_agree(home, studied)
    assert_as_undisturbed(home, result, undisturbed)
    # Four running trials are each thrown back by the epoch under way, and by the one whose end they had not asked beyond.
    assert 8 * EPOCHS <= (users_code / "counted").read_text().count("\n") <= 8 * EPOCHS + 4 * 2


@pytest.mark.long
def test_an_error_in_the_users_code_fails_one_trial_of_those_in_a_step(users_code: Path, home: Path, tmp_path: Path) -> None:
    """The metric knows the unwanted trial by the sum of its validation labels."""
    data = DataSpec.model_validate({**TRIAL["data"], "seed": 2})
    unwanted = int(load_data(data).validation_labels.sum())
    (users_code / "picky.py").write_text(
        f"def metric(logits, labels):\n    if int(labels.sum()) == {unwanted}:\n        raise ArithmeticError('not this one')\n    return 0.0\n"
    )
    space = {"data.seed": {"choices": [0, 1, 2, 3]}}
    studied = spec("picky", trial={**TRIAL, "metrics": ["import:picky:metric"]}, space=space, trials=4, sampler="grid", **FUSED)
    result = run(studied, home=home)
    all_agree(home, studied)
    assert dict(zip(result.trials["data.seed"], result.trials["outcome"], strict=True)) == {
        seed: "failed" if seed == 2 else "completed" for seed in range(4)
    }
    _, children, client = mlflow_runs(home, "picky")
    (failed,) = (child for child in children if child.data.tags["study.outcome"] == "failed")
    text = Path(client.download_artifacts(failed.info.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "not this one" in text and "picky.py" in text
    assert_clean(home / "picky")
