"""EffectiveLR in a bare PyTorch loop against the same loop without it: time, memory, and how its cost grows with the layers."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import SGD

from study.training.effective_lr import EffectiveLR
from study.trial import TrialSpec
from tests.benchmarks.solo import TRIALS, bare_loop, ratios

MODELS = ("resnet, batch 64", "transformer, batch 64")
WIDTH, DEPTH = 4096, 4
"""Of the network whose memory is measured: 67 million weights."""

FEW, MANY = 8, 64
"""Layers between which the growth of a sample's cost is measured."""

SAMPLES = 200


def measure() -> Iterator[tuple[str, list[float], str]]:
    """CPU time with over without the tracer, pair by pair; then peak memory in copies of the weights; then cost per layer."""
    torch.set_num_threads(1)
    for name in MODELS:
        trial = TrialSpec.model_validate({**TRIALS[name], "schedule": {"epochs": 10_000, "shape": "constant"}})
        for every, target in ((20, "<= 1.02"), (1, "<= 1.20")):
            yield f"loop traced every {every} steps / without: {name}", ratios(bare_loop(trial, every), bare_loop(trial)), target
    yield "peak memory that tracing adds, in copies of the weights", [_extra_copies()], "<= 1.00"
    yield f"cost of a sample per layer, {MANY} layers / {FEW}", [_cost(MANY) / MANY / (_cost(FEW) / FEW) for _ in range(3)], "<= 1.10"


def _extra_copies() -> float:
    plain, traced = (
        int(subprocess.run([sys.executable, "-m", "tests.benchmarks.trace", flag], check=True, capture_output=True).stdout) for flag in ("", "traced")
    )
    return (traced - plain) * 1024 / (4 * DEPTH * WIDTH * WIDTH)


def _peak(traced: bool) -> int:
    """Peak memory of a few steps of a wide network, in KiB."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if traced:
        EffectiveLR(model, optimizer, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cost(layers: int) -> float:
    """CPU time of a sample of a network of so many small layers."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(layers)))
    optimizer = SGD(model.parameters(), lr=1e-3)
    model(torch.ones(1, 32)).sum().backward()
    plain = _steps(optimizer)
    EffectiveLR(model, optimizer, every=1)
    return _steps(optimizer) - plain


def _steps(optimizer: SGD) -> float:
    optimizer.step()
    start = time.process_time()
    for _ in range(SAMPLES):
        optimizer.step()
    return time.process_time() - start


if __name__ == "__main__":
    print(_peak(sys.argv[1] == "traced"))
