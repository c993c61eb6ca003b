"""Attempts: each time a study was submitted to a cluster, as its Ray jobs tell.

job gains-1: STOPPED     job gains-2: RUNNING ──> gains, attempt 2, running          a job without our metadata is nobody's
"""

from dataclasses import dataclass
from typing import Any

RUNNING = ("PENDING", "RUNNING")
STATES = {"PENDING": "running", "RUNNING": "running", "STOPPED": "interrupted", "FAILED": "failed", "SUCCEEDED": "finished"}
"""Ray's word for the state of a job, and ours for that of its study where nothing more is known."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One submission of a study."""

    id: str
    """The job's submission id: the study's name and the attempt's number."""
    name: str
    number: int
    home: str
    """The study home on the cluster; empty for the `$STUDY_HOME` that the cluster has."""
    spec_hash: str
    status: str
    """Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str = ""
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.status in RUNNING

    @property
    def code(self) -> int:
        """The exit code to end with once it has ended: its own, as far as Ray knows it."""
        return 130 if self.status == "STOPPED" else 1 if self.exit_code is None else self.exit_code

    @property
    def again(self) -> str:
        """What to do once it has ended."""
        return "it has finished" if self.status == "SUCCEEDED" else "submit it again to go on"

    def document(self) -> dict[str, Any]:
        """What JSON documents say of it."""
        return {"id": self.id, "attempt": self.number, "status": self.status, "exit_code": self.exit_code}


def attempt_of(job: Any) -> Attempt | None:
    """A job as an attempt; None where it is no study's."""
    known = job.metadata or {}
    if not {"study", "attempt", "home", "spec_hash"} <= known.keys() or not known["attempt"].isdecimal():
        return None
    status = str(getattr(job.status, "value", job.status))
    identity = (job.submission_id or "", known["study"], int(known["attempt"]), known["home"], known["spec_hash"])
    return Attempt(*identity, status, job.message or "", job.driver_exit_code)


def status_of(attempt: Attempt, found: dict[str, Any] | None) -> dict[str, Any]:
    """A status, with its attempt; where the home has none yet, what the attempt alone says."""
    nothing = dict.fromkeys(("completed", "stopped", "diverged", "failed", "interrupted", "running", "waiting"), 0)
    unknown = {"study_id": "", "spec_hash": "", "name": attempt.name, "trials": nothing, "arms": {}, "best": None, "budget": {"trial_seconds": 0.0}}
    return {**(found or {**unknown, "state": STATES[attempt.status]}), "job": attempt.document()}
