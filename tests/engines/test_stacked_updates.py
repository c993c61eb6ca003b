"""One step of many slots against torch.optim and PlannedOptimizer, slot by slot, on random tensors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.engines.updates import MOMENTS, Decay, Step, Vectors, beside, clipped, corrections, dots, step
from study.training.updates import PlannedOptimizer

SLOTS, STEPS = 4, 20
SHAPES = ((3, 2, 3, 3), (4, 3), (5,), ())
TOLERANCE = 1e-13

LR = (0.1, 0.03, 0.003, 1e-4)
RATE = (1e-2, 0.0, 0.3, 1e-3)
MOMENTUM = (0.9, 0.5, 0.0, 0.99)
BETA1, BETA2, EPS = (0.9, 0.8, 0.0, 0.95), (0.999, 0.9, 0.99, 0.95), (1e-8, 1e-6, 1e-3, 1e-8)
AGES = (0, 7, 3, 100)
"""Steps that each slot has behind it already when all are first stepped together."""

Make = Callable[[list[nn.Parameter], int, float], Optimizer]


def drawn(seed: int, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alone(make: Make, slot: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """One slot's weights after so many steps of its own optimizer, and before."""
    weights = [nn.Parameter(value) for value in drawn(slot)]
    begin = [weight.detach().clone() for weight in weights]
    optimizer = make(weights, slot, LR[slot])
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(slot, number) / group.get("slower", 1)
        for weight, gradient in zip(weights, drawn(1000 * (slot + 1) + number), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights], begin


def lr_at(slot: int, number: int) -> float:
    """Every slot's own schedule."""
    return LR[slot] * (1 + math.cos(number / 7)) / 2


def vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def together(how: Step, steps: int, anchors: tuple[float | str, ...] = (0.0,) * SLOTS) -> list[Tensor]:
    """All slots' weights after so many common steps."""
    weights = [torch.stack(values) for values in zip(*(drawn(slot) for slot in range(SLOTS)), strict=True)]
    kinds = MOMENTS["adamw" if how.aux else how.rule]
    moments = {kind: [torch.zeros_like(weight) for weight in weights] for kind in kinds}
    decays = {index: decay(weight.clone(), anchors) for index, weight in enumerate(weights)}
    for number in range(steps):
        gradients = [torch.stack(values) for values in zip(*(drawn(1000 * (slot + 1) + number) for slot in range(SLOTS)), strict=True)]
        step(how, weights, gradients, moments, decays, vectors([number] * SLOTS))
    return weights


def decay(initial: Tensor, anchors: tuple[float | str, ...]) -> Decay:
    numbers = beside(vector(0.0 if anchor == "init" else float(anchor) for anchor in anchors), initial)
    anchor = numbers + initial * beside(vector(float(anchor == "init") for anchor in anchors), initial)
    return Decay(beside(vector(RATE), initial), anchor if any(anchors) else None)


def vectors(numbers: list[int]) -> Vectors:
    """What each slot's next step depends on, after so many steps."""
    named = {"momentum": MOMENTUM, "beta1": BETA1, "beta2": BETA2, "eps": EPS}
    values = {name: vector(column) for name, column in named.items()}
    ages = [number + 1 for number in numbers]
    return Vectors(
        {
            **values,
            "lr": vector(lr_at(slot, number) for slot, number in enumerate(numbers)),
            "aux lr": vector(lr_at(slot, number) / 3 for slot, number in enumerate(numbers)),
            "1 - momentum": vector(1 - momentum for momentum in MOMENTUM),
            "1 - beta1": vector(1 - beta for beta in BETA1),
            "1 - beta2": vector(1 - beta for beta in BETA2),
            "correction1": vector(corrections(BETA1, ages)),
            "correction2": vector(corrections(BETA2, ages)),
            "step": vector(ages),
        }
    )


def betas(slot: int) -> dict[str, Any]:
    return {"betas": (BETA1[slot], BETA2[slot]), "eps": EPS[slot], "weight_decay": RATE[slot]}


TORCH: dict[str, tuple[Step, Make]] = {
    "sgd": (Step("sgd", "coupled"), lambda weights, slot, lr: SGD(weights, lr, momentum=MOMENTUM[slot], weight_decay=RATE[slot])),
    "adam": (Step("adam", "coupled"), lambda weights, slot, lr: Adam(weights, lr, **betas(slot))),
    "adam, decoupled": (Step("adam", "decoupled"), lambda weights, slot, lr: AdamW(weights, lr, **betas(slot))),
    "adamw": (Step("adamw", "decoupled"), lambda weights, slot, lr: AdamW(weights, lr, **betas(slot))),
    "adamw, coupled": (Step("adamw", "coupled"), lambda weights, slot, lr: Adam(weights, lr, **betas(slot))),
}


@pytest.mark.parametrize("case", TORCH)
def test_torchs_own_rules(case: str) -> None:
    how, make = TORCH[case]
    found = together(how, STEPS)
    for slot in range(SLOTS):
        assert_slot(found, slot, alone(make, slot, STEPS)[0])


def test_nesterov() -> None:
    """Torch's needs momentum: the slot without is plain."""
    found = together(Step("sgd", "coupled", nesterov=True), STEPS)
    for slot in range(SLOTS):

        def make(weights: list[nn.Parameter], slot: int, lr: float) -> Optimizer:
            return SGD(weights, lr, momentum=MOMENTUM[slot], weight_decay=RATE[slot], nesterov=MOMENTUM[slot] > 0)

        assert_slot(found, slot, alone(make, slot, STEPS)[0])


ANCHORS: tuple[tuple[float | str, ...], ...] = ((0.0,) * 4, (1.0, 0.0, "init", 1.0), ("init", 1.0, 0.0, "init"))


@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("form", ["coupled", "decoupled"])
@pytest.mark.parametrize(("rule", "nesterov"), [("sgd", False), ("sgd", True), ("adam", False), ("adamw", False), ("lion", False)])
def test_planned_rules(rule: str, nesterov: bool, form: str, anchors: tuple[float | str, ...]) -> None:
    def make(weights: list[nn.Parameter], slot: int, lr: float) -> Optimizer:
        options = {"momentum": MOMENTUM[slot], "nesterov": nesterov and MOMENTUM[slot] > 0, **betas(slot)}
        return PlannedOptimizer([{"params": weights, "rule": rule, "form": form, "lr": lr, "anchor": anchors[slot], "constraint": None, **options}])

    found = together(Step(rule, form, nesterov), STEPS, anchors)
    for slot in range(SLOTS):
        assert_slot(found, slot, alone(make, slot, STEPS)[0])


@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_and_what_it_leaves_to_adamw(nesterov: bool, anchors: tuple[float | str, ...]) -> None:
    def make(weights: list[nn.Parameter], slot: int, lr: float) -> Optimizer:
        shared = {"form": "decoupled", "lr": lr, "anchor": anchors[slot], "constraint": None, "momentum": MOMENTUM[slot], "nesterov": nesterov}
        hidden, rest = ({"rule": rule, **shared, **betas(slot)} for rule in ("muon", "adamw"))
        return PlannedOptimizer([{"params": weights[:1], **hidden}, {"params": weights[1:], **rest, "slower": 3}])

    found = together(Step("muon", "decoupled", nesterov, aux=frozenset({1, 2, 3})), STEPS, anchors)
    for slot in range(SLOTS):
        assert_slot(found, slot, alone(make, slot, STEPS)[0])


def assert_slot(found: list[Tensor], slot: int, expected: list[Tensor]) -> None:
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[slot], its, rtol=TOLERANCE, atol=TOLERANCE)


def test_slots_of_different_ages_are_corrected_each_for_its_own() -> None:
    """Adam's moments at their true size for each age: the first step of all slots together is the next one of each."""
    weights = [torch.stack(values) for values in zip(*(drawn(slot) for slot in range(SLOTS)), strict=True)]
    moments = {kind: [torch.zeros_like(weight) for weight in weights] for kind in ("m", "v")}
    expected = []
    for slot, age in enumerate(AGES):
        own = [nn.Parameter(value) for value in drawn(slot)]
        optimizer = Adam(own, LR[slot], betas=(BETA1[slot], BETA2[slot]), eps=EPS[slot])
        for number in range(age + 1):
            if number == age:
                for index, weight in enumerate(own):
                    weights[index][slot] = weight.detach()
                    for kind, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                        moments[kind][index][slot] = optimizer.state[weight][name] if age else 0.0
            optimizer.param_groups[0]["lr"] = lr_at(slot, number)
            for weight, gradient in zip(own, drawn(number), strict=True):
                weight.grad = gradient
            optimizer.step()
        expected.append([weight.detach() for weight in own])
    gradients = [torch.stack(values) for values in zip(*(drawn(age) for age in AGES), strict=True)]
    step(Step("adam", "coupled"), weights, gradients, moments, {}, vectors(list(AGES)))
    for slot in range(SLOTS):
        assert_slot(weights, slot, expected[slot])


def test_decay_that_varies_over_time_is_multiplied_by_each_slots_factor() -> None:
    weights = [torch.ones(SLOTS, 2, dtype=torch.float64)]
    given = {"lr": torch.ones(SLOTS).double(), "momentum": torch.zeros(SLOTS).double(), "factor": vector((0.0, 1.0, 0.5, 2.0))}
    moments = {"m": [torch.zeros_like(weights[0])]}
    step(Step("sgd", "decoupled"), weights, [torch.zeros_like(weights[0])], moments, {0: Decay(torch.full((SLOTS, 1), 0.1).double())}, Vectors(given))
    torch.testing.assert_close(weights[0][:, 0], vector((1.0, 0.9, 0.95, 0.8)))


def test_watched_steps_are_measured() -> None:
    weights, gradients = ([torch.stack([value, 2 * value]) for value in drawn(seed)] for seed in (0, 1))
    before = [weight.clone() for weight in weights]
    given = Vectors({"lr": vector((0.1, 0.2)), "momentum": vector((0.0, 0.0))})
    seen = step(Step("sgd", "coupled"), weights, gradients, {"m": [torch.zeros_like(weight) for weight in weights]}, {}, given, watched=(0, 2))
    assert seen.keys() == {0, 2}
    for index, found in seen.items():
        moved = (weights[index] - before[index]).flatten(1)
        w, g = before[index].flatten(1), gradients[index].flatten(1)
        expected = torch.stack(((w * w).sum(1), (w * moved).sum(1), (moved * moved).sum(1), (g * g).sum(1)), dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dots_of_float32_are_accumulated_in_float64() -> None:
    ones = torch.ones(2, 3000)
    assert torch.equal(dots(ones, 1e-4 * ones, ones)[:, 3], vector((3000.0, 3000.0)))
    assert dots(ones, ones, ones).dtype is torch.float64


@pytest.mark.parametrize("limits", [(1.0, 0.1, 100.0, math.inf), (math.inf,) * 4])
def test_clipping_is_torchs_slot_by_slot(limits: tuple[float, ...]) -> None:
    gradients = [torch.stack(values) for values in zip(*(drawn(slot) for slot in range(SLOTS)), strict=True)]
    found = clipped(gradients, vector(limits))
    for slot, limit in enumerate(limits):
        weights = [nn.Parameter(torch.zeros_like(gradient[slot])) for gradient in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient[slot].clone()
        nn.utils.clip_grad_norm_(weights, limit)
        for weight, mine in zip(weights, found, strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(mine[slot], weight.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_clipping_one_slot_of_nan_leaves_the_others_their_bits() -> None:
    gradients = [torch.stack(values) for values in zip(*(drawn(slot) for slot in range(SLOTS)), strict=True)]
    poisoned = [gradient.clone() for gradient in gradients]
    for gradient in poisoned:
        gradient[1] = float("nan")
    limits = vector((1.0, 1.0, math.inf, 0.5))
    for clean, other in zip(clipped(gradients, limits), clipped(poisoned, limits), strict=True):
        for slot in (0, 2, 3):
            assert torch.equal(clean[slot], other[slot])
