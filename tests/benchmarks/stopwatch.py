"""Stopwatch: what both sides of the whole-study benchmark measure of their process, by wrapping the doors to Ray and Tune alike.

    start ─ imports, choice ─ Ray up ─── pool, engines ─ tune.run ─ first result ─ last trial's end ─ end ─ ray.shutdown ─ report ─ printed
    all      ├──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┤
    counted  ├───────────────┤        ├────────────────────────────────────────────────────────────────────┤            ├───────────────┤
    fit                               ├────────────────────────────────────────────────────────────────────┤
    warm                                                          ├────────────────────┤

Of Ray's start, only the time is left out in which the main thread has nothing to do but wait for it. Nothing is left to be done beside its
shutdown, which is not counted: who writes to MLflow in another thread is waited for before it.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from tests.benchmarks.processes import Processes, age


class Stopwatch:
    """Times one study of this process."""

    def __init__(self) -> None:
        """Wraps Ray's doors, for good: whoever goes through them is timed."""
        self.first, self.last, self.epochs = 0.0, 0.0, 0
        self.processes = Processes()
        self._in_ray, self._fit, self._is_up = 0.0, 0.0, 0.0
        self._waited_for: list[Callable[[], object]] = []
        self._shutdown, self._run = ray.shutdown, tune.run
        ray.init, ray.shutdown, tune.run = self.waits(ray.init), self._timed_shutdown, self._timed_run

    def wait_for(self, work: Callable[[], object]) -> None:
        """Has a function that waits for the last of the trials' work called before Ray is shut down; `warm` ends with it."""
        self._waited_for.append(work)

    def times(self) -> dict[str, float]:
        """Everything that was measured, in seconds, and the epochs of trials."""
        whole = age()
        parts = {"all": whole, "counted": whole - self._in_ray, "fit": self._fit, "warm": self.last - self.first}
        return {**parts, "cpu": self.processes.cpu(), "epochs": self.epochs}

    def waits(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function in which one waits for Ray to start; its time is not counted, where it is the main thread that calls it."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                if threading.current_thread() is threading.main_thread():
                    self._is_up = time.monotonic()
                    self._in_ray += self._is_up - start

        return timed

    def _timed_shutdown(self, *arguments: Any, **options: Any) -> None:
        if ray.is_initialized():
            for work in self._waited_for:
                work()
                self.last = time.monotonic()
            self.processes.look(again=True)
        start = time.monotonic()
        self._shutdown(*arguments, **options)
        self._in_ray += time.monotonic() - start

    def _timed_run(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self._run(*arguments, **{**options, "callbacks": [_Before(self), *options.get("callbacks", ()), _After(self)]})
        finally:
            self._fit = time.monotonic() - self._is_up
            self.processes.look(again=True)  # engines end before Ray does


class _Before(tune.Callback):
    """Hears of every result before all other callbacks."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """One epoch of a trial."""
        self._watch.first = self._watch.first or time.monotonic()
        self._watch.epochs += 1


class _After(tune.Callback):
    """Hears of every end after all other callbacks."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, by itself or by a decision."""
        self._watch.last = time.monotonic()
        self._watch.processes.look()
