"""Forecast: how long a study will take here, from a pilot of a few steps.

trials x epochs ── x share that early stopping leaves ── x seconds of a piloted epoch ── / gain of the engine, / processes ──> wall time
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from study.spec import StudySpec
from study.stoppingspec import StoppingSpec
from study.tuning.points import planned

if TYPE_CHECKING:
    from study.tuning.choice import Choice


def forecast(spec: StudySpec, seconds_per_epoch: float | None, choice: "Choice", cores: int) -> dict[str, Any]:
    """What is added to the forecast of `study plan`.

    Args:
        seconds_per_epoch: CPU seconds of an epoch of a typical trial on a solo engine; None where it was not measured.
        choice: The engine that will train the trials.
        cores: Of this machine.
    """
    lengths = _lengths(spec)
    epochs = sum(planned(spec).values()) * sum(lengths) / len(lengths)
    share = stopping_share(spec.stopping, max(lengths))
    found: dict[str, Any] = {"trial_epochs": round(epochs), "stopping_share": round(share, 3), "expected_trial_epochs": round(epochs * share)}
    if seconds_per_epoch is None:
        return {**found, "seconds_per_epoch": None, "wall_seconds": None}
    wall = _wall(epochs * share * seconds_per_epoch, choice, cores, spec.resources.cpus_per_trial)
    limited = wall if spec.budget.wall is None else min(wall, spec.budget.wall)
    return {**found, "seconds_per_epoch": seconds_per_epoch, "wall_seconds": round(limited, 1)}


def _wall(work: float, choice: "Choice", cores: int, cpus_per_trial: int) -> float:
    """Seconds that so many CPU seconds of a solo engine's work take, the start of processes included."""
    from study.tuning.choosing import START_SECONDS, Team

    if choice.engine == "fused":
        return Team(choice.engines or cores, choice.slots, cores).seconds(work, choice.gain or 1.0)
    return 2 * START_SECONDS + work / max(1, cores // cpus_per_trial)


def stopping_share(stopping: StoppingSpec, epochs: int) -> float:
    """The share of all epochs that is expected to be trained, where one in `reduction` trials goes on at each rung.

    What median and patience stop depends on the results: for these it is the upper bound, 1.
    """
    if stopping.scheduler == "asha":
        return _halved(stopping.grace, stopping.reduction, epochs)
    if stopping.scheduler == "hyperband":
        from study.tuning.stopping import brackets

        return sum(share * _halved(grace, stopping.reduction, epochs) for grace, share in brackets(stopping, epochs))
    return 1.0


def _halved(grace: int, reduction: int, epochs: int) -> float:
    trained, going, epoch, rung = 0.0, 1.0, 0, grace
    while rung < epochs:
        trained += going * (rung - epoch)
        going, epoch, rung = going / reduction, rung, rung * reduction
    return (trained + going * (epochs - epoch)) / epochs


def _lengths(spec: StudySpec) -> list[int]:
    """Epochs of the trials: of one length, or evenly from those of the axis."""
    axis = spec.space.get("schedule.epochs")
    if axis is None:
        return [spec.trial.schedule.epochs]
    return [int(value) for value in axis.endpoints() if isinstance(value, int | float)]


def sentence(document: Mapping[str, Any]) -> str:
    """A forecast for people: trial-epochs with what stopping leaves of them, and the time on this machine."""
    left = "" if document["stopping_share"] == 1 else f", of which early stopping leaves about {document['expected_trial_epochs']:,}"
    epochs = f"{document['trial_epochs']:,} trial-epochs{left}"
    if document["wall_seconds"] is None:
        return epochs
    return f"{epochs}; about {_about(document['wall_seconds'])} of training on this machine, by a pilot of {document['seconds_per_epoch']:.2g} s per epoch"


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
