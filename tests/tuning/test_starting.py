"""Ray starts beside what a study does first, as one that takes part in nothing else of this process: a Ray that is not there."""

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import ray

from study.errors import ClusterLost
from study.tuning.starting import WORKERS, on_ray


class NoRay:
    """Stands for Ray: `init` does what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.does: Callable[[], None] = lambda: None
        self.started: list[dict[str, Any]] = []
        self.ended = 0
        monkeypatch.setattr(ray, "init", self._init)
        monkeypatch.setattr(ray, "shutdown", self._shutdown)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def _init(self, **arguments: Any) -> None:
        self.started.append(arguments)
        self.does()

    def _shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> NoRay:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    return NoRay(monkeypatch)


def test_it_starts_while_the_block_goes_on_and_ends_with_it(no_ray: NoRay) -> None:
    goes_on = threading.Event()
    no_ray.does = lambda: assert_set(goes_on)
    with on_ray() as wait:
        goes_on.set()
        wait()
        assert (len(no_ray.started), no_ray.ended) == (1, 0)
    assert no_ray.ended == 1


def test_who_interrupts_its_start_hears_why_ending_takes_so_long(no_ray: NoRay, caplog: pytest.LogCaptureFixture) -> None:
    goes_on = threading.Event()
    no_ray.does = lambda: assert_set(goes_on)
    later = threading.Timer(0.2, goes_on.set)
    later.start()
    with pytest.raises(KeyboardInterrupt), on_ray():
        raise KeyboardInterrupt
    later.join()
    assert "once Ray has started" in caplog.text
    assert no_ray.ended == 1


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_one_inside_another_uses_it(no_ray: NoRay) -> None:
    with on_ray() as wait:
        with on_ray() as same:
            same()
        assert no_ray.ended == 0
        wait()
    assert (len(no_ray.started), no_ray.ended) == (1, 1)


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_ray_that_does_not_start_is_an_error_where_it_is_needed(kind: type[BaseException], no_ray: NoRay) -> None:
    def fails() -> None:
        raise kind("the raylet\n died")

    no_ray.does = fails
    with on_ray() as wait:
        for _ in range(2):
            with pytest.raises(ClusterLost, match=r"the raylet died") as found:
                wait()
            assert "tries again" in found.value.problems[0].remedy
    assert no_ray.ended == 1


def test_an_error_before_it_is_needed_ends_it(no_ray: NoRay) -> None:
    with pytest.raises(ValueError, match="of the model"), on_ray():
        raise ValueError("of the model")
    assert no_ray.ended == 1


def test_our_handler_of_the_signal_that_ends_a_study_stays(no_ray: NoRay) -> None:
    """Ray puts its own there where it starts in the main thread (2.60); through a real Ray: tests/test_cluster.py."""
    before = signal.getsignal(signal.SIGTERM)

    def ray_2_60() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    no_ray.does = ray_2_60
    with on_ray() as wait:
        wait()
        assert signal.getsignal(signal.SIGTERM) is before


def test_no_garbage_is_collected_while_ray_ends(no_ray: NoRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of Ray's that is freed meanwhile, in whatever thread, ends this process (2.60)."""
    seen: list[tuple[bool, bool]] = []

    class Cycle:
        """Garbage that only collecting finds."""

        def __init__(self) -> None:
            self.me = self

    left = weakref.ref(Cycle())
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append((gc.isenabled(), left() is None)))
    with on_ray() as wait:
        wait()
    assert seen == [(False, True)]
    assert gc.isenabled()


def test_workers_of_its_own_inherit_their_environment_and_those_of_a_cluster_are_given_it(no_ray: NoRay, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MALLOC_TRIM_THRESHOLD_"
    seen: list[str | None] = []
    no_ray.does = lambda: seen.append(os.environ.get(name))
    with on_ray() as wait:
        wait()
        assert name not in os.environ
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with on_ray() as wait:
        wait()
    assert seen == [WORKERS[name], None]
    own, cluster = no_ray.started
    assert "runtime_env" not in own
    assert cluster["address"] == "ray://head:10001"
    assert WORKERS.items() <= cluster["runtime_env"]["env_vars"].items()
