"""Engines follow GPUs: on a cluster of several machines, with GPUs that only Ray believes in.

No engine trains here: what is looked at is where the pool puts them for the proxies that Ray placed.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from study.tuning.actor import Pool

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

GPUS = 4
SHARE = 0.5
"""Of a GPU, that a proxy reserves: two for each engine."""


class Proxy:
    """Asks the pool for its engine, as a trial's proxy does, and keeps it."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.engine: Any = None

    def found(self, lost: bool = False) -> tuple[str, str]:
        """Its node, and the node of its engine; it has reached it."""
        context = ray.get_runtime_context()
        [gpu] = context.get_accelerator_ids()["GPU"]
        self.engine = ray.get(self.pool.engine.remote(str(context.get_actor_id()), context.get_node_id(), gpu, lost))
        assert ray.get(self.engine.ping.remote(), timeout=300)
        return context.get_node_id(), self.engine._actor_id.hex()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without a GPU, and four machines with one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        for _ in range(GPUS):
            cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def engines(proxies: list[Any]) -> dict[str, set[str]]:
    """The engines by node, from proxies that have reached theirs."""
    found: dict[str, set[str]] = {}
    for node, engine in ray.get([proxy.found.remote() for proxy in proxies], timeout=400):
        found.setdefault(node, set()).add(engine)
    return found


def test_engines_follow_gpus_that_are_there_that_join_and_that_leave(cluster: Cluster) -> None:
    pool: Any = ray.remote(Pool).options(num_cpus=0).remote({"folder": "", "slots": 2, "device": "cuda", "arithmetic": "auto", "keep": "none"})
    proxy = ray.remote(Proxy).options(num_cpus=0, num_gpus=SHARE, max_restarts=-1, max_task_retries=-1)
    proxies = [proxy.remote(pool) for _ in range(int(GPUS / SHARE))]
    first = engines(proxies)
    assert [len(names) for names in first.values()] == [1] * GPUS  # four GPUs, four engines, shared by the proxies of each

    waiting = [proxy.remote(pool) for _ in range(2)]
    joined = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
    second = engines([*proxies, *waiting])
    assert {node: second[node] for node in first} == first
    assert len(second) == GPUS + 1
    [new] = second.keys() - first.keys()
    assert len(second[new]) == 1

    ray.kill(waiting.pop())
    ray.kill(waiting.pop())
    time.sleep(1)
    gone = next(node for node in cluster.worker_nodes if node.node_id in first)
    cluster.remove_node(gone)  # its two proxies are placed anew, where room is: on the node that joined
    third = engines(proxies)
    assert gone.node_id not in third
    assert len(third) == GPUS and joined.node_id in third
    assert all(len(names) == 1 for names in third.values())
    ray.kill(pool)
