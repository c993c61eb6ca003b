"""Placement: which engine a proxy gets, and where engines run: one per core of the driver's node and of those that trials reach, or on each GPU.

    proxy on (node, GPU) ──engine──> Pool ──makes, pings, replaces──> engine at Place(node, GPU, number)
    engine of a core that idles ──relieve──> Pool ──give──> one with several trials, which sends one of them there
    process of a trial ──has_begun──> RollCall: are all processes there that were expected at the study's start?

Engines follow the proxies, and Ray places those: where a node with a GPU joins, its first proxy has an engine made there; where one leaves,
its proxies are placed anew and ask again.
"""

import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Place(NamedTuple):
    """Where an engine runs."""

    node: str
    gpu: str
    """As Ray names it: a number, or whatever `CUDA_VISIBLE_DEVICES` held when Ray was started there, such as `MIG-41b3...`; empty for a core."""
    number: int
    """Of the core, or among the engines that share the GPU."""


LONGEST_PAUSE = 10.0
"""Seconds after which a process that has not come, or an engine that does not answer, is no longer waited for."""

LOST = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)
"""What Ray raises where an engine is gone or does not answer."""


class RollCall:
    """Knows which processes of a study's trials have come, of those that it starts with.

    Where a trial ends while another waits for its process to start, Tune (2.60) kills the process that starts and gives the other trial
    the one that fell free. Trials that are shorter than a start would never get more processes than the first two: so the first result of
    each process waits until all are there.
    """

    def __init__(self, expected: int) -> None:
        """Expects so many."""
        self._expected, self._here = expected, set[str]()
        self._came = time.monotonic()

    def has_begun(self, process: str) -> bool:
        """Whether as many are here as are expected, the one that asks among them, or none has come for a while."""
        if process not in self._here:
            self._here.add(process)
            self._came = time.monotonic()
        if time.monotonic() - self._came > LONGEST_PAUSE:
            self._expected = 0
        return len(self._here) >= self._expected


class Pool(RollCall):
    """Makes the engines of a study where they are asked for, and replaces those that died. An actor itself, next to the driver."""

    def __init__(self, engine: type, settings: Mapping[str, Any], engines_per_gpu: int = 1, expected: int = 0, engines: int = 0) -> None:
        """Makes an empty pool.

        Args:
            engine: The class of the engines, which become actors.
            settings: Arguments of every engine, `device` among them.
            engines_per_gpu: How many share one GPU.
            expected: Proxies that the study starts with.
            engines: How many each node's CPU has at most; 0 for one on each core.
        """
        super().__init__(expected)
        self._class, self._settings, self._engines_per_gpu, self._engines_per_cpu = engine, settings, engines_per_gpu, engines
        self._engines: dict[Place, Any] = {}
        self._proxies: dict[str, Place] = {}
        if settings["device"] == "cpu":
            # Before the proxies: Ray starts few processes at once, and without engines nobody trains.
            self._engines = {place: self._started(place) for place in self._places(ray.get_runtime_context().get_node_id(), "")}

    def engine(self, proxy: str, node: str, gpu: str, lost: bool = False) -> Any:
        """The engine of a proxy: of those on its GPU, or on its node's cores, the one with the fewest proxies.

        Args:
            proxy: Its name. It keeps its engine for as long as it stays where it is.
            node: Where Ray placed it.
            gpu: The id of the GPU that Ray gave it; empty where it has none.
            lost: Whether the proxy could not reach the engine that it was given before, so that it must be seen to live.
        """
        place = self._proxies.get(proxy)
        if place is None or (place.node, place.gpu) != (node, gpu):
            load = list(self._proxies.values())
            place = self._proxies[proxy] = min(self._places(node, gpu), key=load.count)
        handle = self._engines.get(place)
        if handle is None or (lost and not _is_alive(handle)):
            handle = self._engines[place] = self._started(place)
        return handle

    def relieve(self, idle: Place) -> None:
        """Gives an engine that idles one of the trials of another core of its node, the fullest first: no trial is left to start there.

        A GPU is shared by all its engines already.
        """
        load = list(self._proxies.values())
        others = [place for place in self._engines if place.node == idle.node and place != idle]
        for place in [] if idle.gpu else sorted(others, key=load.count, reverse=True):
            try:
                proxy = ray.get(self._engines[place].give.remote(), timeout=LONGEST_PAUSE)
            except LOST:  # who trains there will ask for another engine
                continue
            if proxy:
                self._proxies[proxy] = idle
                return

    def wait(self) -> None:
        """Returns once every engine's process is there."""
        ray.get([handle.ping.remote() for handle in self._engines.values()])

    def leave(self, proxy: str) -> None:
        """A proxy has ended."""
        self._proxies.pop(proxy, None)

    def occupancy(self) -> list[list[int]]:
        """Of every living engine: the trials that each tick trained so far."""
        return ray.get([handle.occupancy.remote() for handle in self._engines.values()])

    def _places(self, node: str, gpu: str) -> list[Place]:
        cores = min(_cores(node), self._engines_per_cpu or sys.maxsize)
        return [Place(node, gpu, number) for number in range(self._engines_per_gpu if gpu else cores)]

    def _started(self, place: Place) -> Any:
        # One that asks for no environment of its own takes a process that Ray started beforehand.
        environment = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": place.gpu}}} if place.gpu else {}
        placed: Any = ray.remote(self._class).options(
            num_cpus=0,
            max_concurrency=1000,
            **environment,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
        )
        return placed.remote(**self._settings, pool=ray.get_runtime_context().current_actor, place=place)


def _cores(node: str) -> int:
    """How many CPUs a node offers to Ray, at least one."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return max(1, next((int(found["Resources"].get("CPU", 0)) for found in nodes if found["NodeID"] == node), 0))


def _is_alive(handle: Any) -> bool:
    try:
        return bool(ray.get(handle.ping.remote(), timeout=60))
    except LOST:
        return False


@contextmanager
def pool(engine: type, settings: dict[str, Any], engines_per_gpu: int = 1, expected: int = 0, engines: int = 0) -> Iterator[str]:
    """The name of a pool of engines, which lives, with them, as long as the block and this process do.

    Args: as of `Pool`.
    """
    with _beside_the_driver(Pool, engine, settings, engines_per_gpu, expected, engines) as (name, handle):
        ray.get(handle.wait.remote())
        yield name


@contextmanager
def roll_call(expected: int) -> Iterator[str]:
    """The name of a RollCall of the processes of a study's trials, which lives as long as the block."""
    with _beside_the_driver(RollCall, expected) as (name, _):
        yield name


@contextmanager
def _beside_the_driver(kind: type, *arguments: object) -> Iterator[tuple[str, Any]]:
    """Name and handle of an actor on the driver's node, which is started again where it dies."""
    name = f"{kind.__name__.lower()}-{uuid.uuid4().hex}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # A pool that dies takes its engines along; one that is started again makes new ones, and the trials go on from their snapshots.
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    handle: Any = ray.remote(kind).options(name=name, scheduling_strategy=here, **lasting).remote(*arguments)
    try:
        yield name, handle
    finally:
        ray.kill(handle)
