"""Processes: which one runs a study, so that another can ask it to stop and never hits a stranger.

this process ──identity──> host, pid, when it began ──in the study's card──> interrupt ──SIGINT──> it, if it is still the same
"""

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one machine."""

    host: str
    pid: int
    born: str
    """When it began, as the kernel counts; empty where that cannot be known."""

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), born(os.getpid()))

    def is_here(self) -> bool:
        """Whether it ran on this machine."""
        return self.host == socket.gethostname()

    def interrupt(self) -> bool:
        """Does what Ctrl-C does in its terminal; False if it is gone, or its number now belongs to another.

        Raises:
            PermissionError: if it is somebody else's.
        """
        if self.pid <= 0 or born(self.pid) != self.born:
            return False
        try:
            os.kill(self.pid, signal.SIGINT)
        except ProcessLookupError:
            return False
        return True


def born(pid: int) -> str:
    """When a process began, in clock ticks since the machine did; empty where there is no /proc, or no such process."""
    try:
        # The second field is the program's name in parentheses, and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
