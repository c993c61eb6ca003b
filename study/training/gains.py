"""Gains: how large the gains of every norm are, how far from 1, and how many of their channels are dead."""

from collections.abc import Iterable, Sequence

import numpy as np
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
    found = [role for role in roles if role.role is Role.GAIN]
    if not found:
        return {}
    (samples,) = stacked_samples([role.place for role in found], [whole(model.get_parameter(role.name)).unsqueeze(0) for role in found])
    return {role.name: sample for role, sample in zip(found, samples, strict=True)}


@torch.no_grad()
def stacked_samples(places: Sequence[str], gains: Sequence[Tensor]) -> list[list[GainSample]]:
    """The samples of each of several trials: of the gains [trials, ...] of one norm or more, each at its place.

    All gains together, in one transfer from their device: a network has many, and each is small.
    """
    flat = [gain.flatten(1) for gain in gains]
    channels = [gain.shape[1] for gain in flat]
    wide, starts = torch.cat(flat, dim=1).cpu().double().numpy(), np.cumsum([0, *channels[:-1]])
    squares, distances = (np.add.reduceat(np.square(values), starts, axis=1) for values in (wide, wide - 1))
    dead = np.add.reduceat(np.abs(wide) <= DEAD, starts, axis=1, dtype=np.int64)
    rms, distance = (np.sqrt(sums / channels).tolist() for sums in (squares, distances))
    return [[GainSample(*numbers) for numbers in zip(places, *row, channels, strict=True)] for row in zip(rms, distance, dead.tolist(), strict=True)]


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
