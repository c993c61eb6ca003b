"""CPU seconds of a program and all processes that it started: unlike the clock, they hardly depend on what else a machine does."""

import os
import time
from pathlib import Path
from typing import Any

import ray


def watched() -> list[float]:
    """Will hold the CPU seconds of all processes below this one, once Ray is shut down; zombies, whose times are kept, included."""
    found: list[float] = []
    original = ray.shutdown

    def shutdown(*arguments: Any, **options: Any) -> None:
        if ray.is_initialized():
            found.append(_below(os.getpid()))
        original(*arguments, **options)

    ray.shutdown = shutdown
    return found


def total(found: list[float]) -> float:
    """CPU seconds of this process so far and of those that were watched."""
    return time.process_time() + sum(found)


def _below(top: int) -> float:
    """CPU seconds of the processes below one, each with those children that it has waited for."""
    times: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        times[int(path.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    inside = {top}
    while grown := {pid for pid, (parent, _) in times.items() if parent in inside} - inside:
        inside |= grown
    return sum(times[pid][1] for pid in inside - {top})
