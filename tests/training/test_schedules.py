"""The learning rate over the steps, at the steps that tell one schedule from another."""

import math

import pytest
import torch

from study.training.schedules import build_scheduler, lr_factor
from study.trial import ScheduleSpec

SHAPES = ("constant", "cosine", "linear", "step")

VALUES = [
    ("constant", {}, {0: 1.0, 50: 1.0, 99: 1.0}),
    ("cosine", {}, {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2, 100: 0.0}),
    ("cosine", {"end": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2}),
    ("cosine", {"warmup": 0.2}, {0: 1 / 20, 9: 0.5, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0}),
    ("linear", {}, {0: 1.0, 25: 0.75, 99: 0.01, 100: 0.0}),
    ("linear", {"end": 0.5, "warmup": 0.5}, {0: 0.02, 49: 1.0, 50: 1.0, 75: 0.75, 100: 0.5}),
    ("step", {}, {0: 1.0, 49: 1.0, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
    ("step", {"milestones": (0.3, 0.7), "factor": 0.5, "warmup": 0.1}, {9: 1.0, 29: 1.0, 30: 0.5, 69: 0.5, 70: 0.25}),
    ("step", {"milestones": (0.1,), "warmup": 0.2}, {15: 16 / 20, 20: 0.1}),
    ("step", {"milestones": ()}, {99: 1.0}),
]


@pytest.mark.parametrize(("shape", "fields", "factors"), VALUES)
def test_the_factor_at_telling_steps(shape, fields, factors):
    spec = ScheduleSpec(shape=shape, **fields)
    assert {step: lr_factor(spec, step, 100) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_every_step_of_a_trial_moves_and_none_exceeds_the_peak(shape, total_steps, warmup):
    spec = ScheduleSpec(shape=shape, warmup=warmup)
    assert all(0 < lr_factor(spec, step, total_steps) <= 1 for step in range(total_steps))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_value_holds_after_the_end(shape):
    spec = ScheduleSpec(shape=shape, end=0.25)
    assert lr_factor(spec, 1000, 100) == lr_factor(spec, 101, 100) == lr_factor(spec, 100, 100)


def test_warmup_rises_in_equal_steps():
    factors = [lr_factor(ScheduleSpec(warmup=0.05), step, 100) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_scheduler_multiplies_each_groups_own_peak():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.4}, {"params": [weights[1]], "lr": 0.1}])
    spec = ScheduleSpec(shape="linear", warmup=0.2)
    scheduler = build_scheduler(optimizer, spec, total_steps=10)
    for step in range(12):
        factor = lr_factor(spec, step, 10)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4 * factor, 0.1 * factor])
        optimizer.step()
        scheduler.step()


def test_a_scheduler_goes_on_where_its_state_was_saved():
    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        return optimizer, build_scheduler(optimizer, ScheduleSpec(), total_steps=10)

    optimizer, scheduler = fresh()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = fresh()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for each, its in ((optimizer, scheduler), (resumed_optimizer, resumed)):
        each.step()
        its.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [lr_factor(ScheduleSpec(), 5, 10)]
