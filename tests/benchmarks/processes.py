"""Processes: how old this one is, and CPU seconds of all that it started, which hardly depend on what else a machine does."""

import os
import time
from pathlib import Path

PAUSE = 0.5
"""Seconds for which a look at the processes is good enough, as it takes some milliseconds."""

PARENT, USED, START = 1, slice(11, 13), 19
"""Places in /proc/PID/stat, counted from the field after the name: the parent, CPU times, and when it was started; in clock ticks since boot."""


def age() -> float:
    """Seconds since this process was started, before Python was."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_fields(Path("/proc/self/stat"))[START]) / os.sysconf("SC_CLK_TCK")


class Processes:
    """All processes below this one. Ray's leave no times behind when they end, so that each has to be looked at before."""

    def __init__(self) -> None:
        self._used: dict[tuple[int, str], float] = {}
        self._looked = -PAUSE

    def look(self, again: bool = False) -> None:
        """Notes what each has used so far.

        Args:
            again: Also where the last look was only a moment ago.
        """
        if not again and time.monotonic() - self._looked < PAUSE:
            return
        self._looked = time.monotonic()
        seen: dict[int, list[str]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                seen[int(path.parent.name)] = _fields(path)
            except OSError:  # it has ended
                continue
        inside = {os.getpid()}
        while grown := {pid for pid, fields in seen.items() if int(fields[PARENT]) in inside} - inside:
            inside |= grown
        for pid in inside - {os.getpid()}:
            self._used[pid, seen[pid][START]] = sum(map(int, seen[pid][USED])) / os.sysconf("SC_CLK_TCK")

    def cpu(self) -> float:
        """CPU seconds of this process so far, and of the others until they were last looked at."""
        return time.process_time() + sum(self._used.values())


def _fields(path: Path) -> list[str]:
    return path.read_text().rpartition(")")[2].split()
