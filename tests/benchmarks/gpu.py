"""Fused trials on a GPU against what one trial, or several processes, get out of it. Never run on a GPU so far: a table to be made.

python -m tests.benchmarks.gpu [--only ResNet-20] [--seconds 5] [--out table.csv] [--device cuda]

solo        the solo engine, eager
graph       a bare loop of one trial through torch.compile with CUDA graphs, channels-last: the best that one trial does by itself
N procs     so many processes with a solo engine each on the same GPU, at the best N
fused       the fused engine
roofline    floating-point operations that fused training does each second over what the GPU can do

Images per second of training, evaluation included, in bfloat16; pixels are random, as time does not depend on them. What cannot be
measured, as where memory runs out, is a dash, and why is said below its row. Rows are written to the file as they come.
"""

import argparse
import csv
import math
import multiprocessing as mp
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
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
COLUMNS = ("solo", "graph", "best N", "N procs", "slots", "fused", "fused / solo", "fused / graph", "fused / N procs", "roofline")
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


def main(device: str, cases: list[Case], seconds: float, out: Path | None) -> int:
    """Prints the table, or in one sentence why there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here that torch can use: nothing was measured.")
        return 0
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    system = f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.platform()}"
    print(f"{system}; images per second, of {seconds:g} seconds each")
    print(f"{'network':<24}" + "".join(f"{name:>{_width(name)}}" for name in COLUMNS))
    peak = next((flops for part, flops in PEAK.items() if part in gpu), math.nan)
    for case in cases:
        numbers, problems = _row(case, device, seconds, peak)
        print(f"{case.name:<24}" + "".join(f"{_shown(name, numbers[name]):>{_width(name)}}" for name in COLUMNS), *problems, sep="\n    ", flush=True)
        if out:
            _append(out, {"system": system, "network": case.name, **numbers})
    return 0


def _row(case: Case, device: str, seconds: float, peak: float) -> tuple[dict[str, float], list[str]]:
    """The numbers of a case by column, and why any is missing."""
    problems: list[str] = []

    def tried(name: str, measure: Callable[[], float]) -> float:
        try:
            return measure()
        except Exception as error:  # of any library, on hardware that nobody has tried
            problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0][:200])
            return math.nan
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()

    solo = tried("solo", lambda: _rate(_solo(case, device), case, seconds))
    graph = tried("graph", lambda: _rate(_graph(case, device), case, seconds))
    shared = {count: tried(f"{count} processes", lambda count=count: _shared(case, device, count, seconds)) for count in PROCESSES}
    best = max(shared, key=lambda count: -math.inf if math.isnan(shared[count]) else shared[count])
    fused = tried("fused", lambda: _rate(_fused(case, device), case, seconds, case.slots))
    ratios = {f"fused / {name}": fused / other for name, other in (("solo", solo), ("graph", graph), ("N procs", shared[best]))}
    absolute = {"solo": solo, "graph": graph, "best N": best, "N procs": shared[best], "slots": case.slots, "fused": fused}
    return {**absolute, **ratios, "roofline": fused * _operations(case) / peak}, problems


def _width(column: str) -> int:
    return max(9, len(column)) + 2


def _shown(column: str, number: float) -> str:
    if math.isnan(number):
        return "-"
    return f"{number:.2f}" if "/" in column else f"{number:.1%}" if column == "roofline" else f"{number:.0f}"


def _append(out: Path, row: dict[str, Any]) -> None:
    is_new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


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


def _rate(epoch: Callable[[], object], case: Case, seconds: float, trials: int = 1) -> float:
    """Images per second, after two epochs that warm up."""
    epoch(), epoch()
    start, epochs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        epoch()  # returns numbers, and so has waited for the GPU
        epochs += 1
    images = len(load_data(case.trial().data).train_labels) // case.batch * case.batch
    return trials * epochs * images / (time.perf_counter() - start)


def _shared(case: Case, device: str, count: int, seconds: float) -> float:
    """Images per second of so many processes together."""
    context = mp.get_context("spawn")
    ours, theirs = zip(*(context.Pipe() for _ in range(count)), strict=True)
    barrier = context.Barrier(count)
    processes = [context.Process(target=_share, args=(channel, barrier, case, device, seconds), daemon=True) for channel in theirs]
    try:
        for process, channel in zip(processes, theirs, strict=True):
            process.start()
            channel.close()  # so that one that dies is an end of file, and not awaited for ever
        return sum(float(channel.recv()) for channel in ours)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _share(channel: Connection, barrier: Any, case: Case, device: str, seconds: float) -> None:
    epoch = _solo(case, device)
    epoch()
    barrier.wait()
    channel.send(_rate(epoch, case, seconds))


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
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number")
    parser.add_argument("--out", type=Path, help="CSV file to add the rows to")
    asked = parser.parse_args()
    sys.exit(main(asked.device, [case for case in CASES if asked.only in case.name], asked.seconds, asked.out))
