"""StoppingSpec: the words that say which trials end early, or go on with another's state; and what population based training asks of a study.

space      lr and decay alone are tuned: who takes over a state must be equal to who it is from, but for these
stopping   within the arm, with time for at least one exploit
search     two trials in each arm
replicate  none: what won was trained under a schedule of mutations, and not under the values of its launch
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from study.errors import Problem
from study.optimizer import PRODUCT
from study.space import Axis, Count, Frozen, Real, arms


class StoppingSpec(Frozen):
    """Which trials are stopped before their last epoch, or go on with the state of a better one."""

    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """`asha`: successive halving on rungs grace x reduction^k. `hyperband`: brackets of it, the first of which begins at grace, each next
    one `reduction` times as late, with trials shared out so that all cost about the same; asynchronous, so no trial is paused.
    `median`: below the median of the others' running means. `pbt`: population based training, which stops no trial: the worst of an arm
    take over the state of the best, and go on under mutated learning rate and decay, the only axes that may be tuned."""
    grace: Count = 4
    """Epochs that every trial gets; no trial takes over another's state before (pbt)."""
    reduction: Annotated[Count, Field(ge=2)] = 3
    """One in so many trials goes on at each rung (asha, hyperband)."""
    perturbation: Count = 4
    """Epochs from one comparison of a trial with its arm to the next (pbt)."""
    quantile: Annotated[Real, Field(gt=0, le=0.5)] = 0.25
    """The share of an arm that takes over a state, and the share that is taken over (pbt)."""
    resample: Annotated[Real, Field(ge=0, le=1)] = 0.25
    """The probability that a mutated value is drawn anew from its axis, rather than multiplied by 0.8 or 1.2, or moved to a neighbour of a
    list (pbt)."""
    within_arm: bool = True
    """Compare a trial with trials of its own arm only, so that no arm is stopped because another learns faster."""
    compare: Literal["epoch", "schedule"] = "epoch"
    """When trials of different length are compared, where `schedule.epochs` is an axis: at equal epochs, or after equal shares of their
    schedules; rungs and grace then count epochs of the longest trial."""
    patience: Count | None = None
    """A trial whose objective has not improved for so many epochs, the first `grace` of them aside, is stopped, whatever the others do."""

    def hashed(self) -> dict[str, Any]:
        """What the spec hash covers; fields that studies began without are left out where they change nothing."""
        since = ("compare", "patience", "perturbation", "quantile", "resample")
        added = {name for name in since if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=added)


def population_problems(space: Mapping[str, Axis], stopping: StoppingSpec, trials: int | None, epochs: int | None, top: int) -> Iterator[Problem]:
    """What keeps a study from population based training, where it asks for it.

    Args:
        space: The axes by path.
        stopping: Whether it asks for it, and how.
        trials: Over all arms; None where that is not known.
        epochs: Of every trial; None where that is not known, or differs.
        top: How many trials are to be replicated.
    """
    if stopping.scheduler != "pbt":
        return
    yield from _space_problems(space)
    yield from _stopping_problems(stopping, epochs)
    if trials is not None and trials < 2 * len(arms(space)):
        said = f"a population needs at least 2 trials (got {trials} in {len(arms(space))} arms)"
        yield Problem("population", said, "search/trials", f"use at least {2 * len(arms(space))}")
    if top:
        said = "a replicate is trained with the values of a launch, and under pbt these are not what was trained"
        yield Problem("population", f"{said} (got top {top})", "replicate/top", "use 0, or another scheduler")


def _space_problems(space: Mapping[str, Axis]) -> Iterator[Problem]:
    tuned = {path: axis for path, axis in space.items() if axis.role == "nuisance"}
    if not any(path in PRODUCT for path in tuned):
        said = f"pbt mutates {', '.join(PRODUCT)}, and none of them is tuned (got {', '.join(tuned) or 'no such axis'})"
        yield Problem("population", said, "stopping/scheduler", "add one of them to `space`, or use another scheduler")
    for path, axis in tuned.items():
        if path not in PRODUCT:
            said = "under pbt the trials of an arm differ in lr and decay alone, as one goes on with the state of another"
            yield Problem("population", f"{said} (got an axis {path})", f"space/{path}", "fix it in `trial`, or list choices of `role: scientific`")
        elif parents := [parent for parent in axis.when if parent in tuned]:
            said = f"a value that is mutated cannot be a condition (got {parents[0]})"
            yield Problem("population", said, f"space/{path}/when", "remove it, or make its parent `role: scientific`")


def _stopping_problems(stopping: StoppingSpec, epochs: int | None) -> Iterator[Problem]:
    if not stopping.within_arm:
        said = "under pbt a trial of one arm would go on with the state of another arm's (got within_arm false)"
        yield Problem("population", said, "stopping/within_arm", "remove it")
    if stopping.patience is not None:
        said = f"pbt stops no trial (got patience {stopping.patience})"
        yield Problem("population", said, "stopping/patience", "remove it, or use another scheduler")
    first = -(-max(stopping.perturbation, stopping.grace) // stopping.perturbation) * stopping.perturbation
    if epochs is not None and stopping.grace <= epochs <= first:
        said = f"no trial would ever take over a state: the first time is after epoch {first} of {epochs}"
        yield Problem("population", said, "stopping/perturbation", "lower it and grace, or raise trial.schedule.epochs")
