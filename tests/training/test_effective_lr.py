"""Traces are right: against theory on random walks, against a recomputation, and without touching the training."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.training.effective_lr import EffectiveLR, angle
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


def test_small_angles_are_seen_where_a_float32_cosine_reads_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10_000, generator=generator)
    turn = torch.randn(10_000, generator=generator)
    turn -= start * (turn @ start) / (start @ start)
    for true in (1e-6, 1e-5, 1e-4, 1e-2, 1.0):
        end = start.double() + turn.double() / turn.double().norm() * start.double().norm() * math.tan(true)
        assert angle(start.double(), end) == pytest.approx(true, rel=1e-5)


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


def test_tracing_changes_no_bit_of_the_training() -> None:
    plain, traced = net(), net()
    train(plain, SGD(plain.parameters(), lr=0.1, momentum=0.9), 25)
    optimizer = SGD(traced.parameters(), lr=0.1, momentum=0.9)
    tracer = EffectiveLR(traced, optimizer, every=3)
    train(traced, optimizer, 25)
    assert tracer.step == 25
    for left, right in zip(plain.parameters(), traced.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("power", "build"), [(2, lambda p: SGD(p, lr=0.1, weight_decay=0.05)), (1, lambda p: AdamW(p, lr=0.01, weight_decay=0.05))])
def test_a_sample_is_what_the_saved_weights_say(power: int, build: object) -> None:
    model = net()
    optimizer: Optimizer = build(model.parameters())  # type: ignore[operator]
    tracer = EffectiveLR(model, optimizer, every=4)
    train(model, optimizer, 3)
    assert tracer.sample() is None
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    sample = tracer.sample()
    assert sample is not None
    assert list(sample) == ["0", "3"]
    for layer, row in sample.items():
        old, new = before[f"{layer}.weight"].double().flatten(), model.state_dict()[f"{layer}.weight"].double().flatten()
        cosine = (old @ new) / (old.norm() * new.norm())
        assert row.step == 4
        assert row.weight_norm == pytest.approx(float(old.norm()), rel=1e-12)
        assert row.effective_lr == pytest.approx(row.lr / float(old.norm()) ** power, rel=1e-12)
        assert row.rotation == pytest.approx(math.acos(min(1.0, float(cosine))), rel=1e-5)
    assert sample["0"].scale_invariant and sample["0"].rotation_expected is not None
    assert not sample["3"].scale_invariant and sample["3"].rotation_expected is None


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
