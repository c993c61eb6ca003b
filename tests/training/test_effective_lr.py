"""Traces are right: against theory on random walks, against a recomputation, and without touching the training."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.training.effective_lr import CHUNK, EffectiveLR, dots, rotation
from study.training.roles import ParameterRole, Role
from study.training.updates import PlannedOptimizer

DIMENSION = 512


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


WALK = [ParameterRole("w", Role.WEIGHT, "w", "inner", scale_invariant=True)]


def walk(model: Vector, optimizer: Optimizer, steps: int, scale: float = 1.0) -> tuple[float, float | None]:
    """RMS rotation over the last third of a random walk on the sphere, and the expected one."""
    tracer = EffectiveLR(model, optimizer, every=1, roles=WALK)
    generator = torch.Generator().manual_seed(1)
    squares, expected = [], None
    for step in range(steps):
        w = model.w.detach()
        noise = torch.randn(DIMENSION, generator=generator, dtype=torch.float64) * scale
        model.w.grad = (noise - w * (noise @ w) / (w @ w)) / w.norm()
        optimizer.step()
        row = (tracer.sample() or {})["w"]
        if step >= 2 * steps // 3:
            squares.append(row.rotation**2)
            expected = row.rotation_expected
    return math.sqrt(sum(squares) / len(squares)), expected


def planned(parameters: list[nn.Parameter], rule: str, **options: object) -> PlannedOptimizer:
    group = {"params": parameters, "rule": rule, "form": "decoupled", "anchor": 0.0, "constraint": None, **options}
    return PlannedOptimizer([group])


RULES = {
    "sgd": (lambda p: SGD(p, lr=0.1, weight_decay=0.01), 0.01),
    "sgd with momentum": (lambda p: SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9), 0.01),
    "sgd with nesterov": (lambda p: SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True), 0.01),
    "decoupled sgd with momentum": (lambda p: planned(p, "sgd", lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=False), 0.01),
    "decoupled sgd with nesterov": (lambda p: planned(p, "sgd", lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True), 0.01),
    "lion": (lambda p: planned(p, "lion", lr=0.001, weight_decay=1.0, betas=(0.9, 0.99)), 0.04),
    "adamw": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), 0.02),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rotation_of_a_random_walk_is_the_expected_one(rule: str) -> None:
    build, tolerance = RULES[rule]
    model = Vector()
    measured, expected = walk(model, build([model.w]), 12_000)
    assert expected is not None
    assert measured / expected == pytest.approx(1, abs=tolerance)


def test_adam_with_l2_has_no_expected_rotation_and_turns_slower_under_larger_gradients() -> None:
    rotations = []
    for scale in (1.0, 4.0):
        model = Vector()
        measured, expected = walk(model, Adam([model.w], lr=0.01, weight_decay=0.1), 8_000, scale)
        assert expected is None
        rotations.append(measured)
    assert rotations[0] / rotations[1] == pytest.approx(4 ** (1 / 3), rel=0.03)


def angle(before: torch.Tensor, after: torch.Tensor) -> float:
    norm2, along, moved2, _ = dots(before, after, before).tolist()
    return rotation(norm2, along, moved2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_angles_are_seen_where_a_float32_cosine_reads_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10_000, generator=generator).double()
    turn = torch.randn(10_000, generator=generator).double()
    turn -= start * (turn @ start) / (start @ start)
    for true in (1e-6, 1e-5, 1e-4, 1e-2, 1.0):
        end = start + turn / turn.norm() * start.norm() * math.tan(true)
        assert angle(start.to(dtype), end.to(dtype)) == pytest.approx(true, rel=1e-6, abs=1e-7 if dtype == torch.float32 else 0)


def test_a_weight_that_only_shrinks_does_not_turn() -> None:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert angle(start, start * 0.999) < 1e-7


def test_weights_larger_than_one_chunk_are_summed_whole() -> None:
    start, end, slope = torch.randn(3, 2 * CHUNK + 5, generator=torch.Generator().manual_seed(0)).double()
    step = end - start
    expected = torch.stack((start @ start, start @ step, step @ step, slope @ slope))
    torch.testing.assert_close(dots(start, end, slope), expected, rtol=1e-12, atol=0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_layer_is_equilibrated_after_five_relaxation_times_of_an_unchanged_product() -> None:
    model = Vector()
    optimizer = SGD([model.w], lr=0.1, weight_decay=0.05, momentum=0.5)
    tracer = EffectiveLR(model, optimizer, every=1, roles=WALK)
    since = math.ceil(5 / (2 * 0.1 * 0.05 / 0.5))
    states = []
    for _ in range(since + 1):
        model.w.grad = torch.randn(DIMENSION, dtype=torch.float64)
        optimizer.step()
        states.append((tracer.sample() or {})["w"].equilibrated)
    assert states.index(True) == since - 1
    optimizer.param_groups[0]["lr"] = 0.2
    model.w.grad = torch.randn(DIMENSION, dtype=torch.float64)
    optimizer.step()
    assert not (tracer.sample() or {})["w"].equilibrated


def test_a_rule_that_is_not_known_reports_what_needs_no_rule() -> None:
    model = Vector()
    optimizer = torch.optim.RMSprop([model.w], lr=0.01)
    tracer = EffectiveLR(model, optimizer, every=1, roles=WALK)
    model.w.grad = torch.ones(DIMENSION, dtype=torch.float64)
    optimizer.step()
    row = (tracer.sample() or {})["w"]
    assert row.effective_lr is None and row.rotation_expected is None
    assert row.rotation > 0 and row.weight_norm > 0
