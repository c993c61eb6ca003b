"""Engines follow GPUs: on a cluster of several machines, with GPUs that only Ray believes in.

No engine trains here: what is looked at is where the pool puts them for the proxies that Ray placed, and which GPU they see.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.spec import check
from study.tuning.choice import Choice
from study.tuning.hosting import _trained_by, settings_of
from study.tuning.placement import Place, Pool
from study.tuning.trainables import FusedTrainable

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

GPUS = 4
SLOTS = 2
LITTLE = {"num_cpus": 1, "object_store_memory": 80_000_000}
"""Of what a machine has."""


class Found(NamedTuple):
    """An actor, the machine that it is on, and the GPU that it sees."""

    actor: str
    node: str
    gpu: str


def here() -> Found:
    """This actor."""
    context = ray.get_runtime_context()
    return Found(str(context.get_actor_id()), context.get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))


class Engine:
    """Says where it is."""

    def __init__(self, device: str, pool: Any, place: Place) -> None:
        assert (device, place.node) == ("cuda", here().node)

    def ping(self) -> Found:
        """Whether it is alive."""
        return here()


class Proxy:
    """Asks the pool for its engine, as a trial's proxy does."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def found(self) -> tuple[Found, Found]:
        """Itself and its engine, which it has reached."""
        context = ray.get_runtime_context()
        [gpu] = context.get_accelerator_ids()["GPU"]
        engine = ray.get(self.pool.engine.remote(str(context.get_actor_id()), context.get_node_id(), gpu))
        return here(), ray.get(engine.ping.remote(), timeout=300)


@contextmanager
def a_cluster(*machines: dict[str, Any]) -> Iterator[Cluster]:
    """A head without a GPU, and these machines."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        for machine in machines:
            cluster.add_node(**LITTLE, **machine)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def a_pool(engines_per_gpu: int = 1) -> Any:
    """A pool on this machine, the head, as a study's own."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Pool).options(num_cpus=0, scheduling_strategy=here).remote(Engine, {"device": "cuda"}, engines_per_gpu)


def proxies_of(pool: Any, number: int, share: float) -> list[Any]:
    """So many, each with this share of a GPU."""
    proxy: Any = ray.remote(Proxy).options(num_cpus=0, num_gpus=share, max_restarts=-1, max_task_retries=-1)
    return [proxy.remote(pool) for _ in range(number)]


def engines(proxies: list[Any]) -> dict[tuple[str, str], list[str]]:
    """The engine of each proxy, by machine and GPU, which are the same for both."""
    found: dict[tuple[str, str], list[str]] = {}
    for proxy, engine in ray.get([proxy.found.remote() for proxy in proxies], timeout=400):
        assert (proxy.node, proxy.gpu) == (engine.node, engine.gpu)
        found.setdefault((engine.node, engine.gpu), []).append(engine.actor)
    return found


def test_engines_follow_gpus_that_are_there_that_join_and_that_leave() -> None:
    with a_cluster(*[{"num_gpus": 1}] * GPUS) as cluster:
        pool = a_pool()
        proxies = proxies_of(pool, GPUS * SLOTS, 1 / SLOTS)
        first = engines(proxies)
        assert [(len(shared), len(set(shared))) for shared in first.values()] == [(SLOTS, 1)] * GPUS  # four GPUs, four engines

        waiting = proxies_of(pool, SLOTS, 1 / SLOTS)
        joined = cluster.add_node(num_gpus=1, **LITTLE)
        second = engines([*proxies, *waiting])
        assert {place: second[place] for place in first} == first
        [(new, _)] = second.keys() - first.keys()
        assert new == joined.node_id
        assert len(set(second[new, "0"])) == 1

        for proxy in waiting:
            ray.kill(proxy)
        gone = next(node for node in cluster.worker_nodes if (node.node_id, "0") in first)
        cluster.remove_node(gone)  # its proxies are placed anew, where room is: on the node that joined
        third = engines(proxies)
        assert third.keys() == second.keys() - {(gone.node_id, "0")}
        assert {place: third[place] for place in first if place in third} == {place: first[place] for place in first if place in third}
        assert all(len(set(shared)) == 1 for shared in third.values())


SLICES = ["MIG-41b35e1f-8e8a-5c0b-9f6e-0f5a1d1f2c3b", "MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/1/0"]
"""As `nvidia-smi -L` names them, with newer and with older drivers."""


def test_slices_of_a_gpu_are_gpus_and_engines_may_share_one() -> None:
    with a_cluster({"num_gpus": len(SLICES), "env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(SLICES)}}):
        found = engines(proxies_of(a_pool(engines_per_gpu=2), 8, 0.25))
        assert sorted(gpu for _, gpu in found) == SLICES
        for shared in found.values():
            assert sorted(shared.count(engine) for engine in set(shared)) == [2, 2]  # two engines on each slice, of two proxies each


def test_a_study_that_asks_for_half_a_gpu_for_an_engine_has_two_on_each() -> None:
    resources = {"engine": "fused", "gpus_per_trial": 1, "gpus_per_engine": 0.5, "slots": 4}
    studied = check({"name": "halves", "space": {"seed": {"choices": [0, 1]}}, "search": {"trials": 2}, "resources": resources})
    choice = Choice("fused", 4, "converted", 2.0, "", studied.resources.engines_per_gpu)
    with a_cluster({"num_gpus": 1}) as cluster:
        settings = settings_of(studied, Path("halves"))
        [node] = [machine.node_id for machine in cluster.worker_nodes]
        with _trained_by(choice, studied, settings, wanted=100) as (trainable, share, processes):
            assert (trainable, share, processes) == (FusedTrainable, {"cpu": 0.0, "gpu": 0.125}, 8)
            pool = ray.get_actor(settings["pool"])
            given = ray.get([pool.engine.remote(f"proxy {number}", node, "0") for number in range(8)])
            assert sorted(given.count(engine) for engine in set(given)) == [4, 4]
            assert ray.get([engine.ping.remote() for engine in set(given)]) == [True, True]
