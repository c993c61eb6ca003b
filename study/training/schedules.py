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
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from study.errors import InputError

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


SMALLEST_LR = 0.01
"""Share of the peak below which `inverse_lr` treats lr as if it were this large."""


def decay_factor(spec: "ScheduleSpec", step: int, total_steps: int) -> float:
    """The decay strength at one step over the stated one; its mean over the window's steps is 1, outside it is 0.

    >>> from study.trial import DecayScheduleSpec, ScheduleSpec
    >>> early = ScheduleSpec(decay=DecayScheduleSpec(window=(0.0, 0.4), shape="linear_down"))
    >>> [decay_factor(early, step, total_steps=10) for step in (0, 3, 4)]
    [1.75, 0.25, 0.0]

    Source: Golatkar et al., Time Matters in Regularizing Deep Networks, arXiv:1905.13277 (windows); Richemond and Guo,
    arXiv:1902.02881 (annealed decay; the shapes are ours).
    """
    first, end = _window(spec, total_steps)
    step = min(step, total_steps - 1)
    if not first <= step < end:
        return 0.0
    return _shape(spec, step, total_steps) / _mean_shape(spec, total_steps)


def _window(spec: "ScheduleSpec", total_steps: int) -> tuple[int, int]:
    start, end = spec.decay.window
    return round(start * total_steps), round(end * total_steps)


def _shape(spec: "ScheduleSpec", step: int, total_steps: int) -> float:
    first, end = _window(spec, total_steps)
    progress = (step - first + 0.5) / (end - first)
    match spec.decay.shape:
        case "constant":
            return 1.0
        case "linear_down":
            return 1 - progress
        case "linear_up":
            return progress
        case "with_lr":
            return lr_factor(spec, step, total_steps)
        case "inverse_lr":
            return 1 / max(lr_factor(spec, step, total_steps), SMALLEST_LR)


@lru_cache
def _mean_shape(spec: "ScheduleSpec", total_steps: int) -> float:
    steps = range(*_window(spec, total_steps))
    return sum(_shape(spec, step, total_steps) for step in steps) / len(steps) if spec.decay.shape != "constant" else 1.0


class DecayScheduler(LambdaLR):
    """LambdaLR that schedules each param group's `weight_decay`, too."""

    def __init__(self, optimizer: Optimizer, schedule: "ScheduleSpec", total_steps: int) -> None:
        self._schedule, self._total_steps = schedule, total_steps
        for group in optimizer.param_groups:
            group.setdefault("initial_weight_decay", group["weight_decay"])
        super().__init__(optimizer, lambda step: lr_factor(schedule, step, total_steps))

    def step(self, epoch: Any = None) -> None:
        """Moves lr and weight_decay on by one step."""
        super().step(epoch)
        self.set_decay()

    def set_decay(self) -> None:
        """Gives every group the decay strength of the present step."""
        factor = decay_factor(self._schedule, self.last_epoch, self._total_steps)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = group["initial_weight_decay"] * factor


def build_scheduler(optimizer: Optimizer, schedule: "ScheduleSpec", total_steps: int) -> LambdaLR:
    """A torch scheduler of any optimizer, to be stepped once after every optimizer step.

    The optimizer's present learning rates are the peaks, its decay strengths the means.

    Example:
        optimizer = study.build_optimizer(model, best.optimizer)
        scheduler = study.build_scheduler(optimizer, best.schedule, total_steps=epochs * len(loader))
        for images, labels in batches:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            scheduler.step()

    Raises:
        InputError: if there is no step to schedule.
    """
    if total_steps < 1:
        said = f"a schedule needs at least one step (got {total_steps!r})"
        raise InputError(said, where="build_scheduler.total_steps", remedy="count all optimizer steps: epochs * len(loader)")
    if schedule.decay.window == (0.0, 1.0) and schedule.decay.shape == "constant":
        return LambdaLR(optimizer, lambda step: lr_factor(schedule, step, total_steps))
    return DecayScheduler(optimizer, schedule, total_steps)


def restore_schedule(scheduler: LambdaLR, steps: int) -> None:
    """Puts a fresh scheduler, and its optimizer's groups, where they stand after so many steps."""
    scheduler.last_epoch = steps
    for group, peak, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * factor(steps)
    if isinstance(scheduler, DecayScheduler):
        scheduler.set_decay()
