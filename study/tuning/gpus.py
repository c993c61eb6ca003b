"""GPUs: which engine trains a study's trials on them. A task on one of the cluster's GPUs finds out, once for each fusion key.

choosing ──gpu_engine──> kept in the home?
                         task on a GPU ─ self-test ─ a solo engine ─ 2, 4, 8 rows, ... until memory or throughput end ──> Admission
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from study.engines.admission import Admission
from study.spec import ResourcesSpec, StudySpec
from study.trial import TrialSpec
from study.tuning import hosting
from study.tuning.choice import LEAST_GAIN, MEMORY_SHARE, PROXY_BYTES, Choice, Measurements, solo_engine, typical

log = logging.getLogger(__name__)

MOST_ROWS = 256
"""Rows of one engine on a GPU at most."""

ROOM = 0.9
"""Of an engine's share of a GPU's memory, what its tensors may take: libraries take some by themselves."""


def gpu_engine(spec: StudySpec, home: Path, asked_for: bool, wait: Callable[[], None] | None) -> Choice:
    """The engine of a study of trials that could be fused.

    Args:
        asked_for: Whether the spec asks for the fused engine.
        wait: Returns once Ray is up; None where there is none, and only what the home keeps can be told.

    Raises:
        InputError: if a trial cannot be trained.
    """
    found = _found(spec, home, wait)
    if found is None:
        why = "its gain is measured on a GPU when the study starts"
        asked = spec.resources.slots
        return Choice("fused" if asked_for else "auto", 0 if asked == "auto" else asked, "", 0.0, why, spec.resources.engines_per_gpu)
    if found.why:
        return solo_engine(f"its model cannot be fused: {found.why}")
    slots = _slots(spec, found, gpus=0 if wait is None else _gpus())
    share = sharing(spec.resources)
    if asked_for or found.gain >= LEAST_GAIN * share:
        why = f"{found.slots} trials in one step train {found.gain:.1f} times as fast as one trial alone on a GPU"
        return Choice("fused", slots, found.arithmetic, found.gain, why, spec.resources.engines_per_gpu)
    why = f"{found.slots} trials in one step would train {found.gain:.1f} times as fast as one trial alone on a GPU"
    why += f", which the {share} that share one may reach, too" if share > 1 else ", which does not make up for their start"
    return Choice("solo", 1, "", found.gain, why)


def sharing(resources: ResourcesSpec) -> int:
    """How many solo trials share one GPU."""
    return max(1, int(1 / resources.gpus_per_trial + 1e-9))


def _slots(spec: StudySpec, found: Admission, gpus: int) -> int:
    """As many as were found to be best, as long as there are trials for all engines."""
    if spec.resources.slots != "auto":
        return spec.resources.slots
    engines = max(1, gpus) * spec.resources.engines_per_gpu
    return max(2, min(found.slots, -(-spec.search.trials // engines)))


def _found(spec: StudySpec, home: Path, wait: Callable[[], None] | None) -> Admission | None:
    """What is known of the study's trials, or found now, where the cluster has no GPU yet or GPUs of one kind that is not the one it was found on."""
    trial = typical(spec)
    kept = Measurements(home, trial, "gpu", spec.resources.slots, spec.resources.engines_per_gpu)
    known = kept.read()
    if wait is not None:
        wait()
        if known is None or not _kinds() <= {known["kind"]}:
            log.warning("measuring on a GPU how many trials one step should train")
            known = _on_a_gpu(trial, spec.resources, hosting.device_of(spec.resources))
            kept.keep(known)
    return None if known is None else Admission(**{name: value for name, value in known.items() if name != "kind"})


def _gpus() -> int:
    """How many the cluster has by now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def _kinds() -> set[str]:
    """The kinds of GPUs that the cluster has by now, as Ray names them."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {name for name in resources if name.startswith(KIND)}


KIND = "accelerator_type:"
"""Before the name of a kind of GPU among Ray's resources."""


def _on_a_gpu(trial: TrialSpec, resources: ResourcesSpec, device: str) -> dict[str, Any]:
    """What `examine` finds on the first GPU that is free, and the kind of that."""
    import ray

    task: Any = ray.remote(num_cpus=0, num_gpus=1)(_examined)
    try:
        found: dict[str, Any] = ray.get(task.remote(trial.model_dump_json(), resources.slots, resources.engines_per_gpu, device))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def _examined(trial: str, slots: int | str, engines: int, device: str) -> dict[str, Any]:
    """In the task: what is found on this node's GPU.

    Args:
        engines: How many will share the GPU.
    """
    import torch

    from study.engines.admission import examine

    node = _this_node()
    rows = _doubling(min(MOST_ROWS, _room(node) // engines)) if isinstance(slots, str) else [slots]
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(ROOM / engines)
    found = examine(TrialSpec.model_validate_json(trial), rows, device)
    return {**asdict(found), "kind": next((name for name in node if name.startswith(KIND)), "")}


def _this_node() -> dict[str, float]:
    """The resources of the node that a task runs on."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(dict(node["Resources"]) for node in ray.nodes() if node["NodeID"] == here)  # type: ignore[no-untyped-call]


def _room(node: dict[str, float]) -> int:
    """How many processes of Ray Tune the memory of a node has room for, for each of its GPUs."""
    return int(node["memory"] * MEMORY_SHARE / PROXY_BYTES / max(1.0, node.get("GPU", 1.0)))


def _doubling(most: int) -> list[int]:
    """2, 4, 8 and so on; the last one is the most."""
    rows = [2]
    while rows[-1] < most:
        rows.append(min(2 * rows[-1], most))
    return rows
