"""The solo engine against a bare PyTorch loop of the same training: same model, data, order, statistics and evaluation."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from study.engines.solo import EVALUATION_IMAGES, STATISTICS_IMAGES, SoloEngine
from study.training.data import load_data
from study.training.effective_lr import EffectiveLR
from study.training.models import build_model
from study.trial import TrialSpec

TRIALS = {
    "resnet, batch 64": {"model": {"name": "resnet", "width": 16, "blocks": [1, 1, 1]}, "data": {"batch_size": 64}},
    "mlp, batch 64": {"model": {"name": "mlp", "width": 128}, "data": {"batch_size": 64}},
    "transformer, batch 64": {"model": {"name": "transformer", "width": 48}, "data": {"batch_size": 64}},
}
ROUNDS, QUICK_ROUNDS = 15, 5
Epoch = Callable[[], object]


def measure() -> Iterator[tuple[str, list[float], str]]:
    """For each model, CPU time of an epoch on the engine over one of the bare loop, pair by pair."""
    torch.set_num_threads(1)
    for name, sections in TRIALS.items():
        trial = TrialSpec.model_validate({**sections, "schedule": {"epochs": 10_000, "shape": "constant"}, "trace": {"every": 20}})
        engine = SoloEngine()
        engine.admit("bench", trial)
        yield f"solo engine, traced every 20 steps / bare loop: {name}", ratios(engine.advance, bare_loop(trial)), "<= 1.05"


def ratios(ours: Epoch, bare: Epoch) -> list[float]:
    """CPU time of one call of *ours* over one of *bare*, alternating, after a warm-up."""
    ours(), bare()
    return [_seconds(ours) / _seconds(bare) for _ in range(ROUNDS)]


def _seconds(epoch: Epoch) -> float:
    start = time.process_time()
    epoch()
    return time.process_time() - start


def bare_loop(trial: TrialSpec, every: int | None = None, *, channels_last: bool = False, compiled: bool = False, device: str = "cpu") -> Epoch:
    """One epoch as anybody would write it, without divergence checks or a plan.

    Decay does what the trial says where its gamma policy is `none` or `all`, and the rest of its optimizer is as by default.

    Args:
        every: Steps between samples of its traces, if it is traced.
        channels_last: Keep images and kernels channels-last, and update all parameters in one kernel.
        compiled: Run the model through torch.compile; on a GPU as CUDA graphs, and in bfloat16 where the trial says so.
    """
    data = load_data(trial.data).to(device, torch.float32)
    torch.manual_seed(0)
    model = build_model(trial.model, data.shape, data.num_classes).to(device)
    decayed, exempt = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        (decayed if parameter.ndim > 1 or (is_gain and trial.optimizer.gamma == "all") else exempt).append(parameter)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [{"params": decayed, "weight_decay": trial.optimizer.weight_decay}, {"params": exempt}]
    optimizer = torch.optim.SGD(groups, lr=trial.optimizer.lr, momentum=0.9, fused=channels_last or None)
    tracer = EffectiveLR(model, optimizer, every) if every else None
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    trained = torch.compile(model, mode="default" if device == "cpu" else "reduce-overhead") if compiled else model
    autocast = torch.autocast(device, torch.bfloat16) if trial.precision == "bf16" else nullcontext()

    def epoch() -> tuple[float, float, float]:
        model.train()
        losses = []
        for indices in torch.randperm(len(data.train_labels), device=device).split(trial.data.batch_size):
            if len(indices) == trial.data.batch_size:
                optimizer.zero_grad()
                with autocast:
                    loss = nn.functional.cross_entropy(trained(data.train_images[indices]), data.train_labels[indices])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if tracer:
                    tracer.sample()
        with torch.no_grad(), autocast:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            model(data.train_images[:STATISTICS_IMAGES])
            for norm in norms:
                norm.momentum = 0.1
            model.eval()
            logits = torch.cat([model(part) for part in data.validation_images.split(EVALUATION_IMAGES)])
            loss = nn.functional.cross_entropy(logits, data.validation_labels)
            return float(torch.stack(losses).mean()), float(loss), float((logits.argmax(1) != data.validation_labels).float().mean())

    return epoch
