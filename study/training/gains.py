"""Gains: how large the gains of every norm are, how far from 1, and how many of their channels are dead."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from study.measurement import GainSample
from study.training.roles import ParameterRole, Role
from study.training.sharding import whole

DEAD = 1e-3
"""Size up to which a channel's gain counts as dead; most norms begin at 1."""


@torch.no_grad()
def gain_samples(model: nn.Module, roles: Iterable[ParameterRole]) -> dict[str, GainSample]:
    """Name of every norm gain of a model to its sample."""
    parameters = dict(model.named_parameters())
    return {role.name: stacked_samples(role.place, whole(parameters[role.name]).unsqueeze(0))[0] for role in roles if role.role is Role.GAIN}


@torch.no_grad()
def stacked_samples(place: str, gains: Tensor) -> list[GainSample]:
    """The sample of each of several trials' gains [trials, ...] of one norm."""
    wide = gains.flatten(1).double()
    numbers = torch.stack((wide.square().mean(1).sqrt(), (wide - 1).square().mean(1).sqrt(), (wide.abs() <= DEAD).sum(1)), dim=1).tolist()
    return [GainSample(place, rms, distance, int(dead), wide.shape[1]) for rms, distance, dead in numbers]


def by_place(samples: Iterable[GainSample]) -> dict[str, float]:
    """The metrics of gains: `gamma_rms/<place>`, `gamma_distance/<place>` (to 1), `gamma_dead/<place>` (share of channels)."""
    places: dict[str, list[GainSample]] = {}
    for sample in samples:
        places.setdefault(sample.place, []).append(sample)
    found = {}
    for place, group in places.items():
        channels = sum(sample.channels for sample in group)
        found[f"gamma_rms/{place}"] = (sum(sample.rms**2 * sample.channels for sample in group) / channels) ** 0.5
        found[f"gamma_distance/{place}"] = (sum(sample.distance**2 * sample.channels for sample in group) / channels) ** 0.5
        found[f"gamma_dead/{place}"] = sum(sample.dead for sample in group) / channels
    return found
