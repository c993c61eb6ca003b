"""What a machine cannot give is said before a study starts."""

import os
from typing import Any

import pytest
import ray
import torch

from study.errors import InputError
from study.spec import ResourcesSpec
from study.tuning.preflight import check_room


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    "resources",
    [{}, {"cpus_per_trial": 4}, {"cpus_per_trial": 8, "engine": "fused"}, {"gpus_per_trial": 1}, {"gpus_per_trial": 0.25}],
)
def test_a_trial_that_fits_the_machine_may_start(resources: dict[str, Any]) -> None:
    check_room(ResourcesSpec(**resources))


@pytest.mark.parametrize(
    ("resources", "complaint"),
    [
        ({"cpus_per_trial": 5}, r"resources.cpus_per_trial: a trial asks for more cores than the 4 of this machine \(got 5\); use at most 4, or"),
        ({"gpus_per_trial": 2}, r"resources.gpus_per_trial: a trial asks for a GPU, of which PyTorch sees 1 on this machine \(got 2\); set it to 0"),
    ],
)
def test_a_trial_that_would_wait_for_ever_is_refused(resources: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=complaint):
        check_room(ResourcesSpec(**resources))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    check_room(ResourcesSpec(**resources))


def test_a_share_of_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="PyTorch sees 0"):
        check_room(ResourcesSpec(gpus_per_trial=0.25))
