"""Equilibrium: what theory says of the step that a weight behind a norm takes, from its param group alone.

    rule                 effective_lr    rotation at equilibrium, rad per step          rate of approach, per step
    sgd, momentum m      lr/|w|^2        sqrt(2 lr wd / (1+m)) n                        2 lr wd / (1-m)
    sgd, decoupled       lr/|w|^2        sqrt(2 lr wd (1-m) / (1+m)) n                  2 lr wd
    adamw                lr/|w|          sqrt(2 lr wd (1-b1) / (1+b1))                  2 lr wd
    lion                 lr/|w|          sqrt(pi lr wd ((1-b1)^2 + b1^2 (1-b2)/(1+b2))) 2 lr wd
    muon                 lr/|w|          not derived                                    2 lr wd
    adam with L2         lr/|w|          none: it depends on the gradient's size        none

n is 1, and sqrt((1+m)^3 (1-m) + m^4) for Nesterov momentum, whose step is that much longer at the same norm.

Source: van Laarhoven, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350 (effective lr); Wan et al.,
Spherical Motion Dynamics, theorems 1 to 3, arXiv:2006.08419 (sgd); Kosson et al., Rotational Equilibrium, arXiv:2305.17212 (adamw, lion).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EQUILIBRIUM = 5.0
"""Relaxation times after which a layer counts as equilibrated."""

SAME_PRODUCT = 0.01
"""Relative change of lr x weight_decay up to which it counts as unchanged."""


@dataclass(frozen=True, slots=True)
class Theory:
    """What theory says of one param group. Rates are per optimizer step, angles in radians."""

    effective_lr_power: int | None = None
    """2 where the effective lr is lr/|w|^2, 1 where it is lr/|w|, None where the rule is not known."""
    rotation_expected: float | None = None
    """Angle per step at equilibrium, of a scale-invariant weight."""
    rate: float | None = None
    """Inverse of the relaxation time; None where there is none, and without decay."""


def theory_of(group: Mapping[str, Any]) -> Theory:
    """The theory of a group that names its `rule` and the `form` of its decay beside lr, weight_decay and the rule's own options."""
    return Theory(2 if group["rule"] == "sgd" else 1, rotation_at_equilibrium(group), _rate(group))


def rotation_at_equilibrium(group: Mapping[str, Any]) -> float | None:
    """The angle by which a scale-invariant weight turns in each step at equilibrium, in radians; None where theory gives none."""
    product = 2 * float(group["lr"]) * float(group["weight_decay"])
    match group["rule"], group["form"]:
        case "sgd", form:
            momentum = group["momentum"]
            nesterov = (1 + momentum) ** 3 * (1 - momentum) + momentum**4 if group["nesterov"] else 1.0
            share = (1 - momentum if form == "decoupled" else 1.0) / (1 + momentum)
            square = product * share * nesterov
        case (("adam" | "adamw"), "decoupled"):
            first = group["betas"][0]
            square = product * (1 - first) / (1 + first)
        case "lion", "decoupled":
            first, second = group["betas"]
            square = math.pi / 2 * product * ((1 - first) ** 2 + first**2 * (1 - second) / (1 + second))
        case _:
            return None
    return math.sqrt(square) or None


def _rate(group: Mapping[str, Any]) -> float | None:
    """The inverse of the relaxation time, in steps; None for adaptive rules with decay in the gradient."""
    shrink = 2 * float(group["lr"]) * float(group["weight_decay"])
    if group["form"] == "coupled":
        shrink = shrink / (1 - group["momentum"]) if group["rule"] == "sgd" else 0.0
    return shrink or None


def follow(product: float, since: tuple[float, int], step: int) -> tuple[float, int]:
    """The reference of lr x weight_decay and the step before which it became so: kept while the product stays within 1% of it."""
    reference = since[0]
    return since if abs(product - reference) <= SAME_PRODUCT * reference else (product, step - 1)


def is_equilibrated(theory: Theory, steps: int) -> bool:
    """Whether enough steps have passed under an unchanged lr x weight_decay; the measured rotation has no say in it."""
    return theory.rate is not None and steps * theory.rate >= EQUILIBRIUM
