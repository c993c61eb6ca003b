"""A core without trials is given one of another core of its machine: what the pool decides, of engines that only answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from study.tuning import placement
from study.tuning.placement import Place, Pool


def at(number: int, node: str = "here", gpu: str = "") -> Place:
    return Place(node, gpu, number)


class Engine:
    """Gives what it has to spare, or raises."""

    def __init__(self, *spare: str | Exception) -> None:
        self.spare, self.asked = list(spare), 0
        self.give = SimpleNamespace(remote=self._give)

    def _give(self) -> str | Exception:
        self.asked += 1
        return self.spare.pop(0) if self.spare else ""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(placement.ray, "get", get)
    return Pool(Engine, {"device": "cuda"})  # whose engines are started when they are asked for


def test_the_fullest_core_of_the_machine_is_asked_first(pool: Pool) -> None:
    pool._proxies = {"a": at(0), "b": at(1), "c": at(1), "d": at(1), "e": at(3, "there")}
    pool._engines = {at(0): Engine("a"), at(1): Engine("d"), at(2): Engine(), at(3, "there"): Engine("e")}
    pool.relieve(at(2))
    assert pool._proxies == {"a": at(0), "b": at(1), "c": at(1), "d": at(2), "e": at(3, "there")}
    assert [engine.asked for engine in pool._engines.values()] == [0, 1, 0, 0]


def test_one_that_is_gone_or_has_nothing_to_spare_is_passed_over(pool: Pool) -> None:
    pool._proxies = {"a": at(0), "b": at(0), "c": at(0), "d": at(1), "e": at(1), "f": at(2)}
    pool._engines = {at(0): Engine(ray.exceptions.RayActorError()), at(1): Engine(), at(2): Engine("f"), at(3): Engine()}
    pool.relieve(at(3))
    assert pool._proxies["f"] == at(3)


def test_engines_that_share_a_gpu_leave_their_trials_where_they_are(pool: Pool) -> None:
    pool._proxies = {"a": at(0, gpu="0"), "b": at(0, gpu="0")}
    pool._engines = {at(0, gpu="0"): Engine("a"), at(1, gpu="0"): Engine()}
    pool.relieve(at(1, gpu="0"))
    assert pool._proxies["a"] == at(0, gpu="0")
