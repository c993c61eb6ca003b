"""EffectiveLR: the step that weights really take, sampled in anybody's training loop without touching it.

    optimizer.step()
      ├── before: keep a copy of the weights                              (sampled steps only)
      └── after:  <w,w> <w,d> <d,d> <g,g>, d the step taken  ──> one LayerSample per weight

Behind a norm the scale of a weight w has no effect on the output, so only its direction learns. Decay and gradients set |w|,
|w| sets the effective learning rate, and at equilibrium the direction turns by a fixed angle per step: `equilibrium.py` has the theory.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.errors import InputError
from study.measurement import GainSample, LayerSample
from study.training.equilibrium import Theory, follow, is_equilibrated, theory_of
from study.training.gains import gain_samples
from study.training.recording import Example
from study.training.roles import ParameterRole, Role, visible_roles
from study.training.sharding import bare_model, local, summed_over_shards
from study.training.updates import PlannedOptimizer

CHUNK = 1 << 16
"""Coordinates that are widened to float64 at once."""


@dataclass(frozen=True, slots=True)
class FilterSample:
    """One weight at one optimizer step, output channel by output channel: tensors of shape [out_channels], on the weight's device."""

    weight_norm: Tensor
    grad_norm: Tensor
    effective_lr: Tensor | None
    rotation: Tensor
    """In radians."""


class EffectiveLR:
    """Samples the effective learning rate of every weight at every `every`-th optimizer step.

    Training is not changed: the weights are bit-identical with and without a tracer. Only sampled steps cost anything, and a
    sample's rotation is that of its one step. Gradients are read as the step leaves them: accumulated, clipped, and divided by the
    scale of a GradScaler. Models may be wrapped by torch.compile, DistributedDataParallel and fully_shard, optimizers by accelerate.

    >>> tracer = EffectiveLR(model, optimizer, every=20)        # doctest: +SKIP
    >>> for images, labels in batches:                           # doctest: +SKIP
    ...     optimizer.zero_grad(); loss_fn(model(images), labels).backward(); optimizer.step()
    ...     if sample := tracer.sample():
    ...         log({layer: row.effective_lr for layer, row in sample.items()})

    Args:
        model: The model whose weights `optimizer` updates.
        optimizer: Any torch optimizer. SGD, Adam, AdamW, Muon and those of `study.build_optimizer` are known; of others, only what
            needs no rule is reported, unless `rule` says what they are.
        every: Optimizer steps between samples.
        example: Inputs that the model runs on, where torch.fx cannot read its computation: a tuple, or a dict of keyword inputs.
        rule: What an optimizer of somebody else's does, as its param groups would have to say it, for example
            `{"rule": "lion", "form": "decoupled"}`; the groups give lr, weight_decay and betas.
        filters: Whether to keep each sample's output channels apart, too.
        roles: The parameters' roles, if they are known already.

    Raises:
        ModelError: if the model does not run on the example, has parameters without a shape yet, or flattens its parameters.
        InputError: if `every` is no number of steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int = 20,
        *,
        example: Example | None = None,
        rule: Mapping[str, Any] | None = None,
        filters: bool = False,
        roles: Sequence[ParameterRole] | None = None,
    ) -> None:
        if every < 1:
            raise InputError(f"every so many steps must be at least 1 (got {every!r})", where="EffectiveLR.every", remedy="1 samples every step")
        self.every = every
        self.step = 0
        self._model = bare_model(model)
        self._roles = list(roles) if roles is not None else _roles_of(self._model, example)
        self._rule = rule
        self._keeps_filters = filters
        optimizer = bare_optimizer(optimizer)
        group_of = {id(parameter): index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        parameters = dict(self._model.named_parameters())
        weights = [(role, parameters[role.name]) for role in self._roles if role.role is Role.WEIGHT]
        self._traced = [(role, weight, group_of[id(weight)]) for role, weight in weights if id(weight) in group_of]
        self._products: list[tuple[float, int]] = [(math.nan, 0)] * len(optimizer.param_groups)
        self._before: list[Tensor] = []
        self._sample: dict[str, LayerSample] = {}
        self._filters: dict[str, FilterSample] = {}
        self._hooks = [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]

    def sample(self) -> dict[str, LayerSample] | None:
        """Layer to its sample, if the latest optimizer step was a sampled one; None otherwise."""
        return self._sample or None

    def filters(self) -> dict[str, FilterSample] | None:
        """Layer to the samples of its output channels, where they were asked for and the latest step was a sampled one."""
        return self._filters or None

    def gains(self) -> dict[str, GainSample]:
        """Name of every norm gain to its size now, its distance to 1, and its dead channels."""
        return gain_samples(self._model, self._roles)

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
            self._before = [local(weight.detach()).clone() for _, weight, _ in self._traced]

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.step += 1
        self._sample, self._filters = {}, {}
        for index, group in enumerate(optimizer.param_groups):
            self._products[index] = follow(_product(group), self._products[index], self.step)
        if self._before:
            before, self._before = self._before, []
            if not _was_skipped(optimizer):
                self._measure(optimizer, before)

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer, before: Sequence[Tensor]) -> None:
        moved = [(role, weight, group, start) for (role, weight, group), start in zip(self._traced, before, strict=True) if weight.grad is not None]
        if not moved:
            return
        theories = [theory_in(optimizer, group, self._rule) for group in optimizer.param_groups]
        numbers = summed_over_shards(
            [weight for _, weight, _, _ in moved],
            [_numbers(optimizer, weight, optimizer.param_groups[index], start) for _, weight, index, start in moved],
        )
        for (role, weight, index, start), (norm2, along, moved2, gradient2, *inverse) in zip(moved, numbers, strict=True):
            group, theory = optimizer.param_groups[index], theories[index]
            steps = self.step - self._products[index][1]
            self._sample[role.layer] = LayerSample(
                step=self.step,
                layer=role.layer,
                role=str(role.role),
                place=role.place,
                scale_invariant=role.scale_invariant,
                equilibrated=is_equilibrated(theory, steps),
                lr=float(group["lr"]),
                weight_decay=float(group.get("weight_decay", 0.0)),
                weight_norm=math.sqrt(norm2),
                grad_norm=math.sqrt(gradient2),
                effective_lr=effective_lr(float(group["lr"]), norm2, theory),
                rotation=rotation(norm2, along, moved2),
                rotation_expected=theory.rotation_expected if role.scale_invariant else None,
                relaxation_time=1 / theory.rate if theory.rate else None,
                coordinate_rate=float(group["lr"]) * inverse[0] / weight.numel() if inverse else None,
            )
            if self._keeps_filters:
                self._filters[role.layer] = _filter_sample(start, weight, group, theory)


def effective_lr(lr: float, norm2: float, theory: Theory) -> float | None:
    """lr/|w|^2 or lr/|w|, as the rule has it; None for rules that are not known, and for a weight that is 0.

    Source: van Laarhoven, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350.
    """
    if theory.effective_lr_power is None or not norm2 > 0:
        return None
    return lr / norm2 if theory.effective_lr_power == 2 else lr / math.sqrt(norm2)


def rotation(norm2: float, along: float, moved2: float) -> float:
    """The angle between w and w + d in radians, from <w,w>, <w,d> and <d,d>: good to 1e-7 where acos of a cosine reads 0."""
    return math.atan2(math.sqrt(max(norm2 * moved2 - along * along, 0.0)), norm2 + along)


def theory_in(optimizer: Optimizer, group: Mapping[str, Any], rule: Mapping[str, Any] | None = None) -> Theory:
    """The theory of one param group at its present lr and weight_decay; of an optimizer that is not known, what `rule` says it is."""
    match optimizer:
        case _ if rule is not None:
            return theory_of({"momentum": 0.0, "nesterov": False, **group, **rule})
        case PlannedOptimizer():
            return theory_of(group)
        case SGD() if not (group["dampening"] or group["maximize"]):
            return theory_of({**group, "rule": "sgd", "form": "coupled"})
        case SGD():
            return Theory(2)
        case Adam() if not group["amsgrad"]:
            decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay")
            return theory_of({**group, "rule": "adam", "form": "decoupled" if decoupled else "coupled"})
        case Adam():
            return Theory(1)
        case torch.optim.Muon():
            return theory_of({**group, "rule": "muon", "form": "decoupled"})
    return Theory()


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _roles_of(model: nn.Module, example: Example | None) -> list[ParameterRole]:
    roles, failure = visible_roles(model, example=example)
    if failure:
        warnings.warn(
            f"the model's computation could not be read ({failure}): no weight counts as scale-invariant; give EffectiveLR an example of the inputs",
            stacklevel=3,
        )
    return roles


def _product(group: Mapping[str, Any]) -> float:
    return float(group["lr"]) * float(group.get("weight_decay", 0.0))


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told by a GradScaler not to move."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _numbers(optimizer: Optimizer, weight: Tensor, group: Mapping[str, Any], before: Tensor) -> Tensor:
    """<w,w>, <w,d>, <d,d>, <g,g> over a weight, or over the part of it that is here; and the sum of Adam's inverse roots, if it has them."""
    assert weight.grad is not None
    own, state = dots(before, local(weight), local(weight.grad)), optimizer.state.get(weight, {})
    second = state.get("exp_avg_sq", state.get("v"))
    if second is None or not {"betas", "eps"} <= group.keys():
        return own
    corrected = local(second).to(_wide(weight)) / (1 - float(group["betas"][1]) ** float(state["step"]))
    return torch.cat((own, (1 / (corrected.sqrt() + float(group["eps"]))).sum().reshape(1)))


def dots(before: Tensor, after: Tensor, gradient: Tensor) -> Tensor:
    """<w,w>, <w,d>, <d,d> and <g,g> with d = after - before, accumulated in float64; shape [4]."""
    wide = _wide(before)
    flat = [tensor.detach().reshape(-1) for tensor in (before, after, gradient)]
    chunks = zip(*(torch.split(tensor, CHUNK) for tensor in flat), strict=True) if before.numel() > CHUNK else [flat]
    parts = []
    for start, end, slope in chunks:
        w, g = start.to(wide), slope.to(wide)
        d = end.to(wide) - w
        parts.append(torch.stack((w.dot(w), w.dot(d), d.dot(d), g.dot(g))))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _filter_sample(before: Tensor, weight: Tensor, group: Mapping[str, Any], theory: Theory) -> FilterSample:
    assert weight.grad is not None
    w, after, g = (local(tensor).detach().to(_wide(before)).reshape(len(before), before[:1].numel()) for tensor in (before, weight, weight.grad))
    d = after - w
    norm2, along, moved2 = (w * w).sum(1), (w * d).sum(1), (d * d).sum(1)
    norm, power = norm2.sqrt(), theory.effective_lr_power
    return FilterSample(
        weight_norm=norm,
        grad_norm=g.norm(dim=1),
        effective_lr=None if power is None else float(group["lr"]) / norm**power,
        rotation=torch.atan2((norm2 * moved2 - along * along).clamp(min=0).sqrt(), norm2 + along),
    )


def _wide(tensor: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
