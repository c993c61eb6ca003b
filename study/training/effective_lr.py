"""EffectiveLR: the step that weights really take, sampled in anybody's training loop without touching it.

    optimizer.step()
      ├── before: keep a copy of the weights                 (sampled steps only)
      └── after:  |w|, |g|, lr/|w|^2, angle(w, w')  ──> one LayerSample per weight

Behind a norm the scale of a weight w has no effect on the output, so only its direction learns. Decay and gradients set |w|,
|w| sets the effective learning rate, and at equilibrium the direction turns by a fixed angle per step, `rotation_expected`.

    rule                 effective_lr    rotation at equilibrium                        rate of approach
    sgd, momentum m      lr/|w|^2        sqrt(2 lr wd / (1+m))                          2 lr wd / (1-m)
    sgd, decoupled       lr/|w|^2        sqrt(2 lr wd (1-m) / (1+m))                    2 lr wd
    adamw                lr/|w|          sqrt(2 lr wd (1-b1) / (1+b1))                  2 lr wd
    lion                 lr/|w|          sqrt(pi lr wd ((1-b1)^2 + b1^2 (1-b2)/(1+b2))) 2 lr wd
    adam with L2         lr/|w|          none: it depends on the gradient's size        none

Source: van Laarhoven, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350 (effective lr);
Wan et al., Spherical Motion Dynamics, theorems 1 to 3, arXiv:2006.08419 (sgd); Kosson et al., Rotational Equilibrium,
arXiv:2305.17212 (adamw).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.measurement import LayerSample
from study.training.roles import ParameterRole, Role, parameter_roles
from study.training.updates import PlannedOptimizer, rotation_at_equilibrium

EQUILIBRIUM = 5.0
"""Relaxation times after which a layer counts as equilibrated."""

SAME_PRODUCT = 0.01
"""Relative change of lr x weight_decay up to which it counts as unchanged."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What theory says of one param group. Rates are per optimizer step, angles in radians."""

    effective_lr_power: int | None
    """2 where the effective lr is lr/|w|^2, 1 where it is lr/|w|, None where the rule is not known."""
    rotation_expected: float | None
    """Angle per step at equilibrium, of a scale-invariant weight."""
    rate: float | None
    """Inverse of the relaxation time."""


def rule_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Rule:
    """The theory of one param group at its present lr and weight_decay."""
    match optimizer:
        case PlannedOptimizer():
            described = dict(group)
        case SGD() if not (group["dampening"] or group["maximize"]):
            described = {**group, "rule": "sgd", "form": "coupled"}
        case SGD():
            return Rule(2, None, None)
        case Adam():
            decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")
            described = {**group, "rule": "adam", "form": "decoupled" if decoupled else "coupled"}
        case _:
            return Rule(None, None, None)
    return Rule(2 if described["rule"] == "sgd" else 1, rotation_at_equilibrium(described), _rate(described))


def _rate(group: Mapping[str, Any]) -> float | None:
    """The inverse of the relaxation time, in steps; None for adaptive rules with decay in the gradient."""
    shrink = 2 * float(group["lr"]) * float(group["weight_decay"])
    if group["form"] == "decoupled":
        return shrink
    return shrink / (1 - group["momentum"]) if group["rule"] == "sgd" else None


def angle(before: Tensor, after: Tensor) -> float:
    """The angle between two tensors in radians, by atan2 of dot products in float64: good to 1e-7 where acos reads 0."""
    start = before.reshape(-1).to(torch.float64)
    change = after.reshape(-1).to(torch.float64) - start
    along, norm2, change2 = torch.stack((start.dot(change), start.dot(start), change.dot(change))).tolist()
    return math.atan2(math.sqrt(max(norm2 * change2 - along * along, 0.0)), norm2 + along)


class EffectiveLR:
    """Samples the effective learning rate of every weight at every `every`-th optimizer step.

    Training is not changed: the weights are bit-identical with and without a tracer.

    >>> tracer = EffectiveLR(model, optimizer, every=20)        # doctest: +SKIP
    >>> for images, labels in batches:                           # doctest: +SKIP
    ...     optimizer.zero_grad(); loss_fn(model(images), labels).backward(); optimizer.step()
    ...     if sample := tracer.sample():
    ...         log({layer: row.effective_lr for layer, row in sample.items()})

    Args:
        model: The model whose weights `optimizer` updates.
        optimizer: Any torch optimizer; of rules that are not known, only what needs no rule is reported.
        every: Optimizer steps between samples.
        roles: The parameters' roles, if they are known already.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int = 20, *, roles: list[ParameterRole] | None = None) -> None:
        parameters = dict(model.named_parameters())
        known = parameter_roles(model) if roles is None else roles
        self.every = every
        self.step = 0
        self._weights = [(role, parameters[role.name]) for role in known if role.role is Role.WEIGHT]
        self._group_of = {id(parameter): index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        self._products: list[tuple[float, int]] = [(math.nan, 0)] * len(optimizer.param_groups)
        self._before: list[Tensor] = []
        self._sample: dict[str, LayerSample] = {}
        self._hooks = [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]

    def sample(self) -> dict[str, LayerSample] | None:
        """Layer to its sample, if the latest optimizer step was a sampled one; None otherwise."""
        return self._sample or None

    def detach(self) -> None:
        """Takes the tracer off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a later tracer needs to go on where this one stands."""
        return {"step": self.step, "products": [list(product) for product in self._products]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.step = int(state["step"])
        self._products = [(float(product), int(since)) for product, since in state["products"]]

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (self.step + 1) % self.every == 0:
            self._before = [parameter.detach().clone() for _, parameter in self._weights]

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.step += 1
        self._follow_products(optimizer)
        self._sample = {}
        if self._before:
            rules = [rule_of(optimizer, group) for group in optimizer.param_groups]
            for (role, parameter), before in zip(self._weights, self._before, strict=True):
                if parameter.grad is not None and (group := self._group_of.get(id(parameter))) is not None:
                    self._sample[role.layer] = self._row(
                        role, parameter, before, optimizer.param_groups[group], rules[group], self._products[group][1]
                    )
            self._before = []

    def _follow_products(self, optimizer: Optimizer) -> None:
        """Remembers, for each group, since which step lr x weight_decay has stayed within 1%."""
        for index, group in enumerate(optimizer.param_groups):
            product = float(group["lr"]) * float(group.get("weight_decay", 0.0))
            reference = self._products[index][0]
            if not abs(product - reference) <= SAME_PRODUCT * reference:
                self._products[index] = (product, self.step - 1)

    def _row(self, role: ParameterRole, parameter: Tensor, before: Tensor, group: Mapping[str, Any], rule: Rule, since: int) -> LayerSample:
        assert parameter.grad is not None
        weight_norm = float(torch.linalg.vector_norm(before, dtype=torch.float64))
        lr = float(group["lr"])
        known = rule.effective_lr_power is not None and weight_norm > 0
        return LayerSample(
            step=self.step,
            layer=role.layer,
            role=str(role.role),
            place=role.place,
            scale_invariant=role.scale_invariant,
            equilibrated=rule.rate is not None and (self.step - since) * rule.rate >= EQUILIBRIUM,
            lr=lr,
            weight_decay=float(group.get("weight_decay", 0.0)),
            weight_norm=weight_norm,
            grad_norm=float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)),
            effective_lr=lr / weight_norm ** (rule.effective_lr_power or 0) if known else None,
            rotation=angle(before, parameter.detach()),
            rotation_expected=rule.rotation_expected if role.scale_invariant else None,
        )
