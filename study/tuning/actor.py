"""Engine actors: fused engines in processes of their own, where Ray placed the trials, owned by the study and gone with it.

    proxy ──engine(node)──> Pool ──makes, pings, replaces──> EngineActor       one per core, or on each GPU
    proxy ──next(trial, epoch)──────────────────────────────>│ waits for the others ─ tick ─ Progress
    proxy <──────────────────────────────────────────────────┘

A tick trains one epoch of every trial that asks for it. An actor waits a little for trials that it told of their last epoch, and for those
that will take the slots that fell free, so that decisions fall for all slots together and no slot is empty; whoever comes later skips one tick.

Snapshots of the trials are written before ticks. When an actor dies its trials ask the pool for another, which goes on from there.
"""

import asyncio
import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from study.measurement import Measurement, Outcome, Progress
from study.trial import TrialSpec
from study.tuning.exploiting import going_on, save
from study.tuning.failures import failed, kind
from study.tuning.placement import Place
from study.tuning.trial_files import keep_weights, snapshot_path

if TYPE_CHECKING:
    from study.engines.fused import FusedEngine

log = logging.getLogger(__name__)

PATIENCE = 0.5
"""How long a tick waits for trials that have not asked yet, as a share of the last tick."""

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 2.0
"""Seconds between which that wait is kept."""

SHORTEST_IDLE, LONG_IDLE, LONGEST_IDLE = 0.25, 2.0, 8.0
"""Seconds for which nobody asks an engine until it asks for a trial of another core: where it has none, where it has some, and at most."""

SNAPSHOT_SHARE = 0.05
"""Share of the time that writing snapshots may take: with ticks shorter than that allows, some are left out."""


@dataclass(slots=True)
class _Asked:
    """A trial that waits for its next epoch."""

    trial: str
    epoch: int
    """The last epoch that the study knows of."""
    test: bool
    """Whether it is measured on the test images, too, once it ends."""
    answer: asyncio.Future[Progress]
    exploit: dict[str, Any] | None = None
    """What it takes over from another trial before it goes on."""


@dataclass(slots=True)
class _Pace:
    """How long ticks and snapshots take."""

    tick: float = 0.0
    snapshot: float = 0.0
    saved: float = field(default_factory=time.monotonic)

    def wait(self) -> float:
        """Seconds to wait for trials that have not asked."""
        return min(max(PATIENCE * self.tick, SHORTEST_WAIT), LONGEST_WAIT)

    def is_time_to_save(self) -> bool:
        """Whether snapshots would take no more than their share of the time."""
        return time.monotonic() - self.saved >= self.snapshot / SNAPSHOT_SHARE


class EngineActor:
    """One fused engine, driven by the trials that ask it for epochs."""

    def __init__(self, folder: str, slots: int, device: str, arithmetic: str, keep: str, pool: Any = None, place: Place | None = None) -> None:
        """Starts an engine.

        Args:
            folder: The study's.
            keep: Which weights are kept: `best`, `all` or `none`.
            pool: Who made it, and knows the engines of other cores.
            place: Where it is.
        """
        self._folder, self._keep, self._pool, self._place = Path(folder), keep, pool, place
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._slots = slots
        self._asked: dict[str, _Asked] = {}
        self._leaving: set[str] = set()
        self._proxies: dict[str, str] = {}
        self._last: dict[str, Progress] = {}
        # Trials that heard of their last epoch and will ask for the next one, or be stopped; and slots that fell free since the last tick.
        self._told, self._freed = set[str](), 0
        self._given_away: set[str] = set()
        self._together = sys.maxsize
        self._news = asyncio.Event()
        self._pace = _Pace()
        self._ticker: asyncio.Task[None] | None = None
        # Loading torch takes seconds: the actor answers meanwhile.
        self._started = self._thread.submit(_engine, slots, device, arithmetic)
        self._ticks: list[int] = []

    async def ping(self) -> bool:
        """Whether it is alive."""
        return True

    async def next(
        self, trial_id: str, trial: str, epoch: int, test: bool = False, proxy: str = "", anew: bool = False, exploit: dict[str, Any] | None = None
    ) -> Progress | None:
        """The trial's first epoch after *epoch*; one that is not here yet is admitted, from its latest snapshot if it has one.

        None where the pool has another engine for it.

        Args:
            proxy: Who asks.
            anew: Whether one that is here was left behind when the trial was paused, and is admitted again.
            exploit: What it takes over from another trial first.
        """
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._run())
        last = self._last.get(trial_id)
        if trial_id in self._given_away and not anew and last is not None and last.measurement.epoch == epoch:
            self._gone(trial_id)
            await asyncio.get_running_loop().run_in_executor(self._thread, self._send_away, trial_id)
            return None
        self._given_away.discard(trial_id)
        answer: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()
        self._told.discard(trial_id)
        if trial_id not in self._proxies:
            self._freed = max(0, self._freed - 1)
        self._asked[trial_id], self._proxies[trial_id] = _Asked(trial, epoch, test, answer, exploit), proxy
        if anew:
            self._leaving.add(trial_id)
        self._news.set()
        return await answer

    async def give(self) -> str:
        """Parts with a trial where there are several, once it asks for its next epoch; returns its proxy, or nothing."""
        here = [trial_id for trial_id in self._proxies if trial_id not in self._given_away]
        if len(here) < 2 or not self._ticks or self._ticks[-1] < 2:
            return ""
        self._given_away.add(here[-1])
        return self._proxies[here[-1]]

    def _send_away(self, trial_id: str) -> None:
        """Leaves a trial's snapshot for another engine; its proxy has heard of its last epoch."""
        self._engine.snapshot(trial_id).save(snapshot_path(self._folder, trial_id))
        self._forget(trial_id)

    async def save(self, trial_id: str) -> int:
        """Writes a trial's state for itself and for others; returns its epoch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: save(self._folder, trial_id, self._engine.snapshot(trial_id)))

    async def release(self, trial_id: str, proxy: str = "") -> None:
        """Forgets a trial that was stopped; its slot is free from the next tick on. Another proxy that has it meanwhile keeps it."""
        if self._proxies.get(trial_id, proxy) != proxy:
            return
        self._gone(trial_id)
        self._asked.pop(trial_id, None)
        self._leaving.add(trial_id)
        self._news.set()

    def _gone(self, trial_id: str) -> None:
        self._told.discard(trial_id)
        self._given_away.discard(trial_id)
        if self._proxies.pop(trial_id, None) is not None:
            self._freed += 1

    @property
    def _engine(self) -> "FusedEngine":
        return self._started.result()

    async def occupancy(self) -> list[int]:
        """Trials that every tick trained so far."""
        return self._ticks

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._gathered()
            asked, leaving = dict(self._asked), set(self._leaving)
            self._leaving -= leaving
            try:
                found = await loop.run_in_executor(self._thread, self._tick, asked, leaving)
            except Exception as error:  # the engine's start or the disk: nobody may wait for an answer that never comes
                found = {trial_id: _failed(trial_id, error) for trial_id in asked}
                self._leaving.update(asked)
            for trial_id, progress in found.items():
                waiting = self._asked.get(trial_id)
                if waiting is not None and not waiting.answer.done() and _is_news(progress, waiting):
                    del self._asked[trial_id]
                    waiting.answer.set_result(progress)
                    if progress.ending is None:
                        self._told.add(trial_id)
                    else:
                        self._gone(trial_id)

    async def _gathered(self) -> None:
        """Waits until all have asked who are about to, or for as long as it pays."""
        idle = SHORTEST_IDLE
        while not self._asked:
            if not await self._next_news(idle):
                # One whose trial was stopped may not have said so; one that the study is slow to answer has not.
                if not self._proxies or idle >= LONG_IDLE:
                    await self._relieve()
                idle = min(2 * idle, LONGEST_IDLE)
        deadline = time.monotonic() + self._pace.wait()
        while (self._told or self._freed) and len(self._asked) < self._slots:
            left = deadline - time.monotonic()
            if left <= 0 or not await self._next_news(left):
                break
        self._told.clear()
        self._freed = 0

    async def _relieve(self) -> None:
        """Asks for a trial of another core."""
        if self._pool is not None:
            try:
                await self._pool.relieve.remote(self._place)
            except ray.exceptions.RayActorError as error:  # one that is started again makes new engines
                log.warning("the pool of engines is away: %s", error)

    async def _next_news(self, timeout: float) -> bool:
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _tick(self, asked: dict[str, _Asked], leaving: set[str]) -> dict[str, Progress]:
        """Trains one epoch of the trials that ask; what is news to them, by trial."""
        for trial_id in leaving:
            self._forget(trial_id)
        self._save(asked)
        start = time.monotonic()
        found = self._admitted(asked)
        # Asked for again by a new proxy, whose predecessor died before it could tell.
        found |= {trial_id: last for trial_id, last in self._last.items() if trial_id in asked and _is_news(last, asked[trial_id])}
        present = [trial_id for trial_id in asked if trial_id in self._engine and trial_id not in found][: self._together]
        for progress in self._advanced(present, asked):
            settled = self._settled(progress)
            if _is_news(settled, asked[settled.trial_id]):
                found[settled.trial_id] = settled
        self._ticks.append(len(present))
        self._pace.tick = time.monotonic() - start
        return found

    def _admitted(self, asked: dict[str, _Asked]) -> dict[str, Progress]:
        """Takes in those who are new, as long as slots are free: the others wait for the next tick. Those that cannot be are returned."""
        found = {}
        for trial_id, one in asked.items():
            if trial_id not in self._engine and len(self._engine) < self._engine.capacity:
                try:
                    self._admit(trial_id, one)
                except Exception as error:  # whatever the user's code raises fails this trial alone
                    found[trial_id] = _failed(trial_id, error)
        return found

    def _advanced(self, present: list[str], asked: dict[str, _Asked]) -> list[Progress]:
        """One epoch of trials together; where that raises, of each by itself, so that only those fail whose own code it was.

        Where it was memory that ran out, half as many are trained together from now on.
        """
        try:
            return self._engine.advance(present)
        except Exception as error:
            if kind(error) == "out-of-memory":
                self._together = max(1, len(present) // 2)
            return [self._alone(trial_id, asked[trial_id]) for trial_id in present]

    def _alone(self, trial_id: str, asked: _Asked) -> Progress:
        """A trial's next epoch, again from its latest snapshot or its beginning: the joint step left nothing to go on with."""
        self._forget(trial_id)
        try:
            self._admit(trial_id, asked)
            while True:
                (progress,) = self._engine.advance([trial_id])
                if _is_news(progress, asked):
                    return progress
        except Exception as error:
            return _failed(trial_id, error)

    def _admit(self, trial_id: str, asked: _Asked) -> None:
        launched = TrialSpec.model_validate(json.loads(asked.trial))
        trial, snapshot = going_on(self._folder, trial_id, launched, asked.epoch, asked.exploit)
        self._engine.admit(trial_id, trial, snapshot, test=asked.test)

    def _settled(self, progress: Progress) -> Progress:
        """Keeps the weights of a trial that completed, and frees the slot of one that ended."""
        trial_id = progress.trial_id
        if progress.ending is None:
            self._last[trial_id] = progress
            return progress
        try:
            if progress.ending.outcome is Outcome.COMPLETED:
                keep_weights(self._folder, trial_id, self._keep, self._engine.weights)
        except Exception as error:  # a full disk
            progress = _failed(trial_id, error)
        self._forget(trial_id)
        return progress

    def _forget(self, trial_id: str) -> None:
        self._last.pop(trial_id, None)
        if trial_id in self._engine:
            self._engine.release(trial_id)

    def _save(self, asked: dict[str, _Asked]) -> None:
        """Writes a snapshot of every trial that goes on, unless that would take more than its share of the time.

        Who asks for the next epoch has told of the last one: no trial is ever started again beyond what the study knows.
        """
        if not self._pace.is_time_to_save():
            return
        start = time.monotonic()
        going_on = [trial_id for trial_id, one in asked.items() if (last := self._last.get(trial_id)) and last.measurement.epoch == one.epoch]
        if not going_on:
            return
        for trial_id in going_on:
            self._engine.snapshot(trial_id).save(snapshot_path(self._folder, trial_id))
        self._pace.saved = time.monotonic()
        self._pace.snapshot = self._pace.saved - start


def _is_news(progress: Progress, asked: _Asked) -> bool:
    return progress.ending is not None or progress.measurement.epoch > asked.epoch


def _engine(slots: int, device: str, arithmetic: str) -> "FusedEngine":
    from study.engines.fused import FusedEngine

    return FusedEngine(slots, device, arithmetic)


def _failed(trial_id: str, error: Exception) -> Progress:
    return Progress(trial_id, Measurement(0, 0, {}), failed(error))
