"""Schedules: the learning rate over its peak, as a pure function of the step.

    1 ┤    ╭────╮               warmup   1/w, 2/w, ..., 1 over the first w steps
      │   ╱      ╲              shape    constant, cosine or linear from 1 to `end`, or drops by `factor`
      │  ╱        ╲
  end ┤ ╱          ╰────────    after the last step: its last value
      └─┬───────────┬──────> step
        0         total

A step is an optimizer step, counted from 0: the factor of step t is what the optimizer uses in its (t + 1)-th update.
"""

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from study.trial import ScheduleSpec


def lr_factor(spec: "ScheduleSpec", step: int, total_steps: int) -> float:
    """The learning rate at one step over its peak, in [0, 1].

    Cosine and line reach `end` when all steps are done, so the last step still moves where `end` is 0. Milestones are shares of all
    steps, warmup included.

    >>> from study.trial import ScheduleSpec
    >>> [lr_factor(ScheduleSpec(shape="linear", warmup=0.2), step, total_steps=10) for step in (0, 1, 6, 10)]
    [0.5, 1.0, 0.5, 0.0]

    Args:
        step: Optimizer steps already done.
        total_steps: Optimizer steps of the whole trial.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, eq. 5 without restarts, arXiv:1608.03983.
    """
    warmup_steps = round(spec.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    step = min(step, total_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match spec.shape:
        case "constant":
            return 1.0
        case "cosine":
            return spec.end + (1 - spec.end) * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return spec.end + (1 - spec.end) * (1 - progress)
        case "step":
            return spec.factor ** sum(step >= round(share * total_steps) for share in spec.milestones)


def build_scheduler(optimizer: Optimizer, schedule: "ScheduleSpec", total_steps: int) -> LambdaLR:
    """A torch scheduler of any optimizer, to be stepped once after every optimizer step.

    The optimizer's present learning rates are the peaks.

    Example:
        optimizer = study.build_optimizer(model, best.optimizer)
        scheduler = study.build_scheduler(optimizer, best.schedule, total_steps=epochs * len(loader))
        for images, labels in batches:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
    """
    return LambdaLR(optimizer, lambda step: lr_factor(schedule, step, total_steps))
