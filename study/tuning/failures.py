"""Failures: what kind of error a trial met, and when a study is stopped because all of its trials meet the same one.

    raised by the trial's code ──── user-code ──────> failed, with the traceback
    memory ran out in it ────────── out-of-memory ──> once more, by itself ──────────> failed
    its process or node was lost ── worker-lost ────> again from its snapshot, as long as it gets further ──> failed
    its node was preempted ─────────────────────────> again, always

A diverged trial has not failed: its numbers are an answer, and are not asked for again.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from study.errors import ClusterLost, HomeError, StudyError
from study.measurement import Ending, Outcome, Reason
from study.tracking.remedies import remedy_for

WITHOUT_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")
"""What torch says, in a RuntimeError, when memory runs out."""


def failed(error: BaseException) -> Ending:
    """The ending of a trial whose code raised."""
    return Ending(Outcome.FAILED, kind(error), "".join(traceback.format_exception(error)))


def kind(error: BaseException) -> Reason:
    """What an error is, by itself or by what caused it."""
    return "out-of-memory" if any(map(_is_lack_of_memory, _chain(error))) else "user-code"


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own class, without loading torch
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WITHOUT_MEMORY)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def named(where: str) -> Iterator[None]:
    """Gives what ends a whole study its name: a disk that takes nothing any more, or a cluster that went away.

    Tune wraps what its searcher and callbacks raise, and keeps the original as the context alone (ray 2.60).

    Raises:
        HomeError: if the study's files cannot be written.
        ClusterLost: if Ray does not answer.
    """
    try:
        yield
    except Exception as error:
        for cause in _context(error):
            match cause:
                case StudyError():
                    raise cause from None
                case OSError() if remedy := remedy_for(cause):
                    raise HomeError(f"the study's files cannot be written ({cause.strerror})", where=where, remedy=remedy) from error
                case ray.exceptions.RayError() | ConnectionError():
                    said = " ".join(str(cause).split())[:200]
                    raise ClusterLost(f"the Ray cluster went away ({said})", where=where, remedy="the same command continues the study") from error
        raise


def _context(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class FirstFailures:
    """Watches whether the first trials that end in a start of a study all fail the same way: then the others would, too."""

    def __init__(self, most: int) -> None:
        """Begins to watch.

        Args:
            most: So many failures that are alike are enough; 0 never are.
        """
        self._most = most
        self._said: list[str] = []
        self._over = most == 0

    def see(self, ending: Ending) -> None:
        """A trial has ended."""
        if self._over or self.alike or ending.outcome is Outcome.INTERRUPTED:
            return
        said = says(ending)
        if ending.outcome is not Outcome.FAILED or (self._said and said != self._said[0]):
            self._over, self._said = True, []
        else:
            self._said.append(said)

    @property
    def alike(self) -> str:
        """What the first trials all failed with; empty as long as they did not."""
        return self._said[0] if self._said and len(self._said) >= self._most else ""


def says(ending: Ending) -> str:
    """A failure in one line: its kind, and the last line of its traceback."""
    lines = ending.error.strip().splitlines()
    return f"{ending.reason}: {lines[-1].strip()}" if lines else str(ending.reason)
