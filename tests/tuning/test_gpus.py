"""Which engine trains on GPUs is measured on one of the cluster's, and kept. The GPU is Ray's belief alone: the measurement runs on its core."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from study.engines.admission import Admission
from study.errors import InputError
from study.spec import StudySpec, check
from study.tuning import gpus, hosting
from study.tuning.choice import Choice
from study.tuning.choosing import choose
from study.tuning.hosting import share_of_a_proxy

LR: dict[str, Any] = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
KIND = f"{gpus.KIND}H200"


def spec(trials: int = 60, space: dict[str, Any] | None = None, model: str = "mlp", **resources: Any) -> StudySpec:
    trial = {"data": {"batch_size": 32, "train_size": 320}, "model": {"name": model}}
    wanted = {"gpus_per_trial": 1, **resources}
    return check({"name": "on-gpus", "trial": trial, "space": space or LR, "search": {"trials": trials}, "resources": wanted})


class Gpu:
    """Finds what it is told to find, and counts."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"arithmetic": "converted", "gain": 5.0, "why": "", "slots": 16, "kind": KIND}
        self.kinds, self.count, self.examined = {KIND}, 1, 0

    def __call__(self, *asked: object) -> dict[str, Any]:
        self.examined += 1
        return self.found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A cluster with one GPU."""
    gpu = Gpu()
    monkeypatch.setattr(gpus, "_on_a_gpu", gpu)
    monkeypatch.setattr(gpus, "_kinds", lambda: gpu.kinds)
    monkeypatch.setattr(gpus, "_gpus", lambda: gpu.count)
    return gpu


def up() -> None:
    """Ray is up."""


def test_trials_are_fused_where_that_wins_with_the_slots_that_were_found(gpu: Gpu, tmp_path: Path) -> None:
    chosen = choose(spec(), tmp_path, up)
    assert chosen == Choice("fused", 16, "converted", 5.0, "16 trials in one step train 5.0 times as fast as one trial alone on a GPU")
    gpu.count = 6
    assert choose(spec(), tmp_path, up).slots == 10, "there are trials for all GPUs"
    assert choose(spec(trials=1), tmp_path, up).slots == 2


def test_it_is_measured_once_for_each_kind_of_gpu(gpu: Gpu, tmp_path: Path) -> None:
    for kinds in ({KIND}, {KIND}, set[str]()):  # none: an autoscaler has not brought one yet
        gpu.kinds = kinds
        choose(spec(), tmp_path, up)
    assert gpu.examined == 1
    gpu.kinds = {f"{gpus.KIND}A100"}
    choose(spec(), tmp_path, up)
    choose(spec(slots=8), tmp_path, up)
    assert gpu.examined == 3


@pytest.mark.parametrize(("share", "gain", "engine"), [(1, 1.2, "fused"), (1, 1.05, "solo"), (0.25, 5.0, "fused"), (0.25, 4.0, "solo")])
def test_solo_trials_that_share_a_gpu_may_gain_by_that(share: float, gain: float, engine: str, gpu: Gpu, tmp_path: Path) -> None:
    gpu.found["gain"] = gain
    chosen = choose(spec(gpus_per_trial=share), tmp_path, up)
    assert (chosen.engine, chosen.gain) == (engine, gain)
    assert ("which the 4 that share one may reach" in chosen.why) == (engine == "solo" and share < 1)
    assert choose(spec(gpus_per_trial=share, engine="fused"), tmp_path, up).engine == "fused"


def test_a_plan_tells_what_the_home_knows(gpu: Gpu, tmp_path: Path) -> None:
    """Where it knows nothing, what will be measured."""
    for engine, slots, told in (("auto", "auto", ("auto", 0)), ("fused", "auto", ("fused", 0)), ("fused", 8, ("fused", 8))):
        planned = choose(spec(engine=engine, slots=slots), tmp_path)
        assert (planned.engine, planned.slots, planned.why) == (*told, "its gain is measured on a GPU when the study starts")
    assert gpu.examined == 0
    choose(spec(), tmp_path, up)
    assert choose(spec(), tmp_path).slots == 16


def test_a_model_that_fails_the_self_test_is_not_fused(gpu: Gpu, tmp_path: Path) -> None:
    gpu.found |= {"arithmetic": "", "gain": 0.0, "why": "its train/loss is odd"}
    assert choose(spec(), tmp_path, up).why == "its model cannot be fused: its train/loss is odd"
    with pytest.raises(InputError, match="its train/loss is odd"):
        choose(spec(engine="fused"), tmp_path, up)
    assert choose(spec(space={"model.width": {"choices": [8, 16]}}), tmp_path, up).why.startswith("trials that differ in model.width")


@pytest.mark.parametrize(("slots", "engines"), [(8, 1), (8, 2), (7, 3), (2, 50)])
def test_as_many_proxies_fit_on_a_gpu_as_its_engines_have_slots(slots: int, engines: int, gpu: Gpu, tmp_path: Path) -> None:
    chosen = choose(spec(engine="fused", slots=slots, gpus_per_engine=1 / engines), tmp_path, up)
    assert (chosen.slots, chosen.engines_per_gpu) == (slots, engines)
    share = share_of_a_proxy(chosen)
    assert 10_000 // round(10_000 * share) == slots * engines  # Ray counts in such parts


def test_rows_double_up_to_the_most() -> None:
    assert gpus._doubling(20) == [2, 4, 8, 16, 20]
    assert gpus._doubling(1) == [2]
    assert gpus._room({"memory": 100e9, "GPU": 4.0}) == 50


@pytest.fixture(scope="module")
def a_ray() -> Iterator[None]:
    """With a GPU that it believes in."""
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("a_ray")
def test_the_trial_is_examined_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "device_of", lambda resources: "cpu")
    chosen = choose(spec(engine="fused", slots=3), tmp_path, up)
    assert (chosen.engine, chosen.slots, chosen.arithmetic) == ("fused", 3, "converted")
    assert chosen.gain > 0
    assert choose(spec(engine="fused", slots=3), tmp_path) == chosen


@pytest.mark.usefixtures("a_ray")
def test_what_a_trial_raises_there_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "device_of", lambda resources: "cpu")
    with pytest.raises(InputError, match="Nothing"):
        choose(spec(model="import:tests.engines.strange:Nothing", engine="fused", slots=3), tmp_path, up)


def test_rows_are_taken_as_long_as_they_pay_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from study.engines import admission

    seconds = {2: 1.0, 4: 1.0, 8: 1.9, 16: 1.0}

    def fused(trial: object, rows: int, arithmetic: str, device: str) -> float:
        if rows > most:
            raise torch.OutOfMemoryError
        return seconds[rows]

    monkeypatch.setattr(admission, "self_test", lambda trial, arithmetic: "")
    monkeypatch.setattr(admission, "_solo_seconds", lambda short, device: 1.0)
    monkeypatch.setattr(admission, "_fused_seconds", fused)
    trial = spec().trial
    most = 100
    assert admission.examine(trial, [2, 4, 8, 16]) == Admission("converted", 4.0, "", 4), "8 rows train 5% more than 4"
    most = 2
    assert admission.examine(trial, [2, 4, 8, 16]) == Admission("converted", 2.0, "", 2)
    most = 1
    nothing = Admission("", 0.0, "2 trials together do not fit into memory")
    assert admission.examine(trial, [2, 4]) == nothing

    def too_large(short: object, device: str) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(admission, "_solo_seconds", too_large)
    assert admission.examine(trial, [2, 4]) == nothing
