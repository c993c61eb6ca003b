"""Nodes: whether every machine of a cluster sees the same study home.

head ──writes a file──> home        node, node, ... ──each reads it──> the same word, or the node is blind
"""

import logging
import secrets
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ASKED_FOR = 60.0
"""Seconds for all nodes together to answer."""


def nodes_that_see(home: Path) -> dict[str, bool]:
    """Writes a file into the home and has every node of the cluster read it: whether each found it, by its name.

    Raises:
        OSError: if the file cannot be written.
    """
    word = secrets.token_hex(8)
    probe = home / f".seen-by-all-{word}"
    home.mkdir(parents=True, exist_ok=True)
    probe.write_text(word, "utf-8")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    try:
        nodes = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        asked = {node: _reader(node).remote(str(probe)) for node in nodes}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ASKED_FOR)
        return {name: asked[node] in ready and ray.get(asked[node]) == word for node, name in nodes.items()}
    finally:
        probe.unlink()


def _reader(node: str) -> Any:
    return ray.remote(_read).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""
