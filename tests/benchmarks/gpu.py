"""Fused trials on a GPU against what one trial, or several processes, get out of it. Never run on a GPU so far: a table to be made.

python -m tests.benchmarks.gpu [--device cuda]

solo        the solo engine, eager
graph       a bare loop of one trial through torch.compile with CUDA graphs, channels-last: the best that one trial does by itself
N procs     so many processes with a solo engine each on the same GPU, at the best N
fused       the fused engine
roofline    floating-point operations that fused training does each second over what the GPU can do

Images per second of training, evaluation included, in bfloat16; pixels are random, as time does not depend on them.
"""

import argparse
import multiprocessing as mp
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.training.data import load_data
from study.training.models import build_model
from study.trial import TrialSpec
from tests.benchmarks.solo import bare_loop

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second that a GPU's data sheet promises, by a part of its name."""

PROCESSES = (2, 4, 8)
SECONDS = 5.0
CIFAR = {"name": "import:tests.benchmarks.gpu:pixels", "args": {"count": 8192}}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    model: dict[str, Any]
    batch: int
    slots: int
    data: dict[str, Any] = field(default_factory=lambda: CIFAR)

    def trial(self, seed: int = 0) -> TrialSpec:
        """One of the trials."""
        data = {**self.data, "batch_size": self.batch}
        schedule = {"epochs": 1_000_000, "shape": "constant"}
        return TrialSpec.model_validate({"model": self.model, "data": data, "schedule": schedule, "precision": "bf16", "seed": seed})


NETWORKS = {
    "ResNet-20": ({"name": "resnet", "width": 16, "blocks": [3, 3, 3]}, 32),
    "ResNet-9": ({"name": "resnet", "width": 64, "blocks": [1, 1, 1]}, 8),
    "ResNet-18": ({"name": "resnet", "width": 64, "blocks": [2, 2, 2, 2]}, 8),
}
DIGITS = {"mlp on digits": {"name": "mlp", "width": 128}, "resnet on digits": {"name": "resnet", "width": 16, "blocks": [1, 1, 1]}}
CASES = [Case(f"{name}, batch {batch}", model, batch, slots) for name, (model, slots) in NETWORKS.items() for batch in (128, 512)]
CASES += [Case(f"{name}, batch 64", model, 64, 256, {"name": "digits"}) for name, model in DIGITS.items()]


def pixels(count: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images of CIFAR-10's shape: to train on, and a few to validate on."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count + 256, 3, side, side, generator=draw)
    labels = torch.arange(count + 256) % 10
    return images[:count], labels[:count], images[count:], labels[count:]


def main(device: str, cases: list[Case]) -> int:
    """Prints the table, or in one sentence why there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here that torch can use: nothing was measured.")
        return 0
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}, {platform.platform()}; images per second")
    print(f"{'network':<24}{'solo':>11}{'graph':>11}{'best N':>8}{'N procs':>11}{'slots':>7}{'fused':>11}{'/ solo':>8}{'/ graph':>9}{'roofline':>10}")
    for case in cases:
        solo, graph = _rate(_solo(case, device), case), _rate(_graph(case, device), case)
        shared, count = max((_shared(case, device, count), count) for count in PROCESSES)
        fused = _rate(_fused(case, device), case, case.slots)
        peak = next((flops for part, flops in PEAK.items() if part in name), None)
        share = f"{fused * _operations(case) / peak:.1%}" if peak else "?"
        numbers = (
            f"{solo:>11.0f}{graph:>11.0f}{count:>8}{shared:>11.0f}{case.slots:>7}{fused:>11.0f}{fused / solo:>8.2f}{fused / graph:>9.2f}{share:>10}"
        )
        print(f"{case.name:<24}{numbers}", flush=True)
    return 0


def _solo(case: Case, device: str) -> Callable[[], object]:
    engine = SoloEngine(device)
    engine.admit("solo", case.trial())
    return engine.advance


def _fused(case: Case, device: str) -> Callable[[], object]:
    engine = FusedEngine(case.slots, device)
    for slot in range(case.slots):
        engine.admit(str(slot), case.trial(slot))
    return engine.advance


def _graph(case: Case, device: str) -> Callable[[], object]:
    return bare_loop(case.trial(), channels_last=True, compiled=True, device=device)


def _rate(epoch: Callable[[], object], case: Case, trials: int = 1) -> float:
    """Images per second, after two epochs that warm up."""
    epoch(), epoch()
    start, epochs = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        epoch()  # returns numbers, and so has waited for the GPU
        epochs += 1
    images = len(load_data(case.trial().data).train_labels) // case.batch * case.batch
    return trials * epochs * images / (time.perf_counter() - start)


def _shared(case: Case, device: str, count: int) -> float:
    """Images per second of so many processes together."""
    context = mp.get_context("spawn")
    ours, theirs = zip(*(context.Pipe() for _ in range(count)), strict=True)
    barrier = context.Barrier(count)
    processes = [context.Process(target=_share, args=(channel, barrier, case, device), daemon=True) for channel in theirs]
    for process in processes:
        process.start()
    rates = [float(channel.recv()) for channel in ours]
    for process in processes:
        process.join()
    return sum(rates)


def _share(channel: Connection, barrier: Any, case: Case, device: str) -> None:
    epoch = _solo(case, device)
    epoch()
    barrier.wait()
    channel.send(_rate(epoch, case))


def _operations(case: Case) -> float:
    """Floating-point operations of training on one image, forward and backward."""
    data = load_data(case.trial().data)
    model = build_model(case.trial().model, data.shape, data.num_classes)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(data.train_images[:8]), data.train_labels[:8]).backward()
    return counter.get_total_flops() / 8


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fused trials on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that the program works")
    sys.exit(main(parser.parse_args().device, CASES))
