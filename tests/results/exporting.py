"""What the tests of exports share: best configs of every policy, rule and schedule, and models trained under them here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from study.results.best import BestConfig, ObjectiveResult
from study.results.export import Target, export
from study.results.export_plan import Export
from study.training.decay import build_optimizer
from study.training.models import build_model
from study.training.schedules import build_scheduler
from study.trial import TrialSpec
from study.tuning.preflight import model_plan

STEPS = 6
"""Optimizer steps after which weights are compared; warmup and the first milestone lie in them where a schedule has them."""

POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "all, shifts too": {"gamma": "all", "shift": "decayed"},
    "all to 1": {"gamma": "all@1"},
    "inner and last, each its own way": {"gamma": "inner+last@1", "gamma_decay": 0.02, "shift": "decayed", "shift_decay": 0.003},
    "back to the start": {"gamma": "last", "target": "init", "shift": "decayed"},
}

RULES: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd", "momentum": 0.8},
    "nesterov": {"rule": "sgd", "nesterov": True},
    "decoupled sgd": {"rule": "sgd", "decay": "decoupled"},
    "decoupled nesterov": {"rule": "sgd", "decay": "decoupled", "nesterov": True},
    "adam": {"rule": "adam", "lr": 0.01, "eps": 1e-6},
    "adamw": {"rule": "adamw", "lr": 0.01, "beta1": 0.8, "beta2": 0.95},
    "lion": {"rule": "lion", "lr": 0.01},
}

OWN_RULES: dict[str, dict[str, Any]] = {
    **RULES,
    "decoupled adam": {"rule": "adam", "decay": "decoupled"},
    "coupled lion": {"rule": "lion", "decay": "coupled"},
}
"""Those that code can bring along where a script has none."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"shape": "constant"},
    "cosine": {"shape": "cosine", "end": 0.1},
    "linear": {"shape": "linear", "end": 0.01},
    "step": {"shape": "step", "milestones": [0.1, 0.75], "factor": 0.2},
    "cosine after a warmup": {"shape": "cosine", "warmup": 0.1},
    "step after a warmup": {"shape": "step", "warmup": 0.34},
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Several threads on shared cores are a hundred times slower on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best(optimizer: dict[str, Any], schedule: dict[str, Any] | None = None, **more: Any) -> BestConfig:
    trial = {
        "data": {"name": "digits", "batch_size": 128},
        "model": {"width": 4, "blocks": [1, 1]},
        "optimizer": {"lr": 0.1, "weight_decay": 0.01, **optimizer},
        "schedule": {"epochs": 3, **(schedule or {})},
        **more,
    }
    return BestConfig(
        study_id="gains-0123",
        name="gains",
        trial_id="gains-0007",
        run_id="",
        arm="all",
        objective=ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.0625),
        spec_hash="0" * 64,
        git_commit="",
        versions={},
        date="2026-11-21T05:00:00+00:00",
        trial=TrialSpec.model_validate(trial),
    )


def exported(config: BestConfig, to: Target) -> Export:
    return export(config, to, model_plan(config.trial))


def executed(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "exported", "exec"), names)
    return names


def network(config: BestConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model, (1, 8, 8), 10).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=generator), torch.randint(10, (8,), generator=generator)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> dict[str, torch.Tensor]:
    """The parameters after some steps."""
    with one_thread():
        for images, labels in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_here(config: BestConfig, total_steps: int | None = None) -> dict[str, torch.Tensor]:
    model = network(config)
    optimizer = build_optimizer(model, config.optimizer)
    return trained(model, optimizer, build_scheduler(optimizer, config.schedule, total_steps) if total_steps else None)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")


def total_steps(config: BestConfig) -> int:
    return model_plan(config.trial).steps_per_epoch * config.schedule.epochs
