"""Decay: from roles and a policy to a plan, and from the plan to torch.

roles + OptimizerSpec ──decay_plan──> rate and anchor of every parameter ──build_optimizer──> one torch optimizer

role                    decays with       towards                     unless
weight                  weight_decay      0, or its initial value     a constraint takes decay's place
gain at a named place   gamma_decay       0 or 1, as `gamma` says     `gamma` leaves its place out
shift, bias             shift_decay       0, or its initial value     `shift: exempt`
embedding               embedding_decay   0, or its initial value     `embedding: exempt`
scale                   never
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.errors import InputError, ModelError, NotExpressible
from study.optimizer import OptimizerSpec, gamma_terms
from study.training.roles import ParameterRole, Role, parameter_roles
from study.training.updates import PlannedOptimizer

Anchor = float | Literal["init"]

ON_INVARIANT = ("rescale", "projection", "norm_schedule")
"""Constraints on scale-invariant weights, whose norm has no effect but on their effective lr."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What decay does to one parameter: `p <- p - lr x rate x (p - anchor)`, or its coupled counterpart."""

    parameter: ParameterRole
    rate: float
    """Decay strength per unit of learning rate; 0 leaves the parameter alone."""
    anchor: Anchor = 0.0
    """The value that decay pulls towards: 0, 1, or `init`."""
    constrained: bool = False
    """Whether the optimizer's constraint holds this parameter."""
    aux: bool = False
    """Whether muon leaves this parameter to adamw."""

    @property
    def group(self) -> str:
        """Name of the param group: parameters of equal rate, anchor, constraint and rule share one."""
        decay = "exempt" if self.rate == 0 else f"decay {self.rate:g}" + (f" to {self.anchor}" if self.anchor else "")
        return decay + (", constrained" if self.constrained else "") + (", adamw" if self.aux else "")


def rule_of(planned: Planned, optimizer: OptimizerSpec) -> str:
    """The rule that moves a parameter."""
    return "adamw" if planned.aux else optimizer.rule


def decay_plan(roles: Iterable[ParameterRole], optimizer: OptimizerSpec) -> list[Planned]:
    """The rate and anchor of every parameter under a policy, and which rule moves it.

    Raises:
        ModelError: if muon would move nothing.
    """
    roles = list(roles)
    if optimizer.rule != "muon":
        return [_planned(role, optimizer) for role in roles]
    if not any(role.hidden for role in roles):
        raise ModelError(
            "no weight of the model is known to be hidden, followed by another weight layer; muon would move nothing",
            where="optimizer.rule",
            remedy="use adamw",
        )
    return [replace(_planned(role, optimizer), aux=not role.hidden) for role in roles]


def plan_hash(plan: Iterable[Planned]) -> str:
    """SHA-256 over what decay does to which parameter: equal for trials with the same plan, however their specs are written."""
    rows = [
        [planned.parameter.name, planned.parameter.role, planned.parameter.place, planned.rate, planned.anchor, planned.constrained]
        for planned in plan
    ]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _planned(parameter: ParameterRole, optimizer: OptimizerSpec) -> Planned:
    decay, anchor = optimizer.weight_decay, _target(optimizer)
    match parameter.role:
        case Role.WEIGHT:
            return _planned_weight(parameter, optimizer)
        case Role.GAIN:
            terms = gamma_terms(optimizer.gamma)
            rate = decay if optimizer.gamma_decay is None else optimizer.gamma_decay
            return _decayed(parameter, rate, terms[parameter.place]) if parameter.place in terms else Planned(parameter, 0.0)
        case Role.SHIFT | Role.BIAS:
            rate = decay if optimizer.shift_decay is None else optimizer.shift_decay
            return _decayed(parameter, rate if optimizer.shift == "decayed" else 0.0, anchor)
        case Role.EMBEDDING:
            rate = decay if optimizer.embedding_decay is None else optimizer.embedding_decay
            return _decayed(parameter, rate if optimizer.embedding == "decayed" else 0.0, anchor)
        case Role.SCALE:
            return Planned(parameter, 0.0)
        case _:
            assert_never(parameter.role)


def _planned_weight(parameter: ParameterRole, optimizer: OptimizerSpec) -> Planned:
    """Constraints take decay's place; the rotational one reads its angle from the rate."""
    name, rate = optimizer.constraint.name, optimizer.weight_decay
    if name == "rotational" and rate > 0:
        return Planned(parameter, rate, constrained=True)
    if name == "volumization" or (name in ON_INVARIANT and parameter.scale_invariant):
        return Planned(parameter, 0.0, constrained=True)
    return _decayed(parameter, rate, _target(optimizer))


def _decayed(parameter: ParameterRole, rate: float, anchor: Anchor) -> Planned:
    return Planned(parameter, rate, anchor) if rate > 0 else Planned(parameter, 0.0)


def _target(optimizer: OptimizerSpec) -> Anchor:
    return "init" if optimizer.target == "init" else 0.0


def absent_places(roles: Iterable[ParameterRole], policy: str) -> list[str]:
    """The places that a policy names one by one and the model does not have.

    Raises:
        ModelError: if the model has none of the places, so that the policy would do nothing.
    """
    if policy.startswith("all"):
        return []
    present = {role.place for role in roles if role.role is Role.GAIN}
    named = gamma_terms(policy)
    absent = [place for place in named if place not in present]
    if absent and len(absent) == len(named):
        has = f"has gains at {', '.join(sorted(present))}" if present else "has no norm gains"
        raise ModelError(
            f"the model has no gain at {' or '.join(absent)}, the policy would do nothing (got {policy!r})",
            where="optimizer.gamma",
            remedy=f"the model {has}; use one of those, none or all",
        )
    return absent


def param_groups(model: nn.Module, optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    """A model's parameters as param groups of torch's own optimizer of the same rule, each parameter exactly once.

    Every group holds `params`, `lr`, `weight_decay` and the rule's own options.

    Raises:
        NotExpressible: if torch's rule cannot decay as the policy says; `build_optimizer` can.
        ModelError: if the model does not fit the policy.
    """
    plan = plan_for(model, optimizer)
    if reason := why_not_torch(plan, optimizer):
        raise NotExpressible(reason, where="optimizer", remedy="use study.build_optimizer, which can")
    return _groups(model, plan, optimizer)


def why_not_torch(plan: Sequence[Planned], optimizer: OptimizerSpec) -> str:
    """Why torch's own optimizer of this rule would train other weights than the plan; empty where it trains the same."""
    anchored = [planned.parameter.name for planned in plan if planned.anchor]
    if anchored:
        return f"torch's weight decay pulls to 0 only, the policy pulls {len(anchored)} parameters elsewhere: {_some(anchored)}"
    constrained = [planned.parameter.name for planned in plan if planned.constrained]
    if constrained:
        return f"torch has no constraint {optimizer.constraint.name}, which holds {len(constrained)} parameters: {_some(constrained)}"
    if optimizer.rule == "lion":
        return "torch.optim has no Lion"
    if optimizer.rule == "muon":
        return "torch.optim.Muon takes matrices only, orthogonalizes them in bfloat16, and leaves all else to a second optimizer"
    if optimizer.rule == "sgd" and optimizer.form == "decoupled":
        decayed = [planned.parameter.name for planned in plan if planned.rate]
        return (
            f"torch.optim.SGD couples decay into the gradient, the policy decouples it for {len(decayed)} parameters: {_some(decayed)}"
            if decayed
            else ""
        )
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def build_optimizer(model: nn.Module, optimizer: OptimizerSpec) -> Optimizer:
    """One torch optimizer that trains a model under a policy; expresses every rule, form, anchor and constraint.

    It is torch's own wherever that trains the same weights, else a `PlannedOptimizer`.

    Raises:
        ModelError: if the model does not fit the policy.
        InputError: if it is given anything but the optimizer's part of a config.
    """
    if not isinstance(optimizer, OptimizerSpec):
        said = f"takes the optimizer's part of a config (got {type(optimizer).__name__})"
        raise InputError(said, where="build_optimizer", remedy="after best = study.load_best(...), give best.optimizer")
    return optimizer_for(model, plan_for(model, optimizer), optimizer)


def plan_for(model: nn.Module, optimizer: OptimizerSpec) -> list[Planned]:
    """The decay plan of a model, checked against the places that it has."""
    roles = parameter_roles(model)
    absent_places(roles, optimizer.gamma)
    return decay_plan(roles, optimizer)


def optimizer_for(model: nn.Module, plan: Sequence[Planned], optimizer: OptimizerSpec, *, fused: bool | None = None) -> Optimizer:
    """The optimizer that interprets a plan.

    Args:
        fused: Update all parameters in one kernel, where torch has one; None leaves the choice to torch.
    """
    if why_not_torch(plan, optimizer):
        return PlannedOptimizer(_planned_groups(model, plan, optimizer))
    groups = _groups(model, plan, optimizer)
    match optimizer.rule, optimizer.form:
        case "sgd", _:
            return SGD(groups, fused=fused)
        case _, "coupled":
            return Adam(groups, fused=fused)
    return AdamW(groups, fused=fused)


def _groups(model: nn.Module, plan: Sequence[Planned], optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for planned in plan:
        group = groups.setdefault(
            planned.group,
            {"params": [], "name": planned.group, "lr": optimizer.lr, "weight_decay": planned.rate, **_options(optimizer.rule, optimizer)},
        )
        group["params"].append(parameters[planned.parameter.name])
    return list(groups.values())


def _options(rule: str, optimizer: OptimizerSpec) -> dict[str, Any]:
    if rule in ("sgd", "muon"):
        return {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    return {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}


def _planned_groups(model: nn.Module, plan: Sequence[Planned], optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    """Groups for PlannedOptimizer; under a norm schedule every constrained weight has one of its own, with its norms."""
    parameters = dict(model.named_parameters())
    norms = recorded_norms(optimizer.constraint.trace, plan) if optimizer.constraint.name == "norm_schedule" else {}
    groups: dict[str, dict[str, Any]] = {}
    for planned in plan:
        own = norms.get(planned.parameter.name, {}) if planned.constrained else {}
        group = groups.setdefault(
            group_key(planned, optimizer),
            {
                "params": [],
                "name": planned.group,
                "rule": rule_of(planned, optimizer),
                "form": optimizer.form,
                "lr": optimizer.peak(aux=planned.aux),
                "weight_decay": planned.rate,
                "anchor": planned.anchor,
                "constraint": optimizer.constraint.model_dump() if planned.constrained else None,
                **_options(rule_of(planned, optimizer), optimizer),
                **own,
            },
        )
        group["params"].append(parameters[planned.parameter.name])
    return list(groups.values())


def group_key(planned: Planned, optimizer: OptimizerSpec) -> str:
    """Equal for parameters of one param group: under a norm schedule every constrained weight has one of its own."""
    own = planned.constrained and optimizer.constraint.name == "norm_schedule"
    return f"{planned.group} {planned.parameter.name}" if own else planned.group


def recorded_norms(trace: str | None, plan: Sequence[Planned]) -> dict[str, dict[str, list[Any]]]:
    """Steps and norms of each constrained weight in another trial's trace, by the parameter's name.

    Source: Hoffer et al., Norm matters, section 3 (a schedule of norms in place of decay), arXiv:1803.01814.
    """
    import pandas as pd

    path = Path(trace or "")
    if not path.exists():
        raise ModelError(f"the trace does not exist (got {trace!r})", where="optimizer.constraint.trace", remedy="name a trial's trace.parquet")
    table = pd.read_parquet(path, columns=["step", "layer", "weight_norm"])
    found = {}
    for planned in plan:
        if planned.constrained:
            rows = table[table["layer"] == planned.parameter.layer]
            if rows.empty:
                raise ModelError(
                    f"the trace has no layer {planned.parameter.layer!r}", where="optimizer.constraint.trace", remedy="use a trace of the same model"
                )
            found[planned.parameter.name] = {"norm_steps": rows["step"].tolist(), "norm_values": rows["weight_norm"].tolist()}
    return found
