"""Decay: from roles and a policy to a plan, and from the plan to torch.

roles + OptimizerSpec ──decay_plan──> rate and anchor of every parameter ──build_optimizer──> one torch optimizer

role                    decays with      towards       unless
weight                  weight_decay     0
gain at a named place   gamma_decay      its anchor    `gamma` leaves its place out
shift, bias             weight_decay     0             `shift: exempt`
embedding               weight_decay     0             `embedding: exempt`
scale                   never
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from study.errors import ModelError, NotExpressible
from study.training.roles import ParameterRole, Role, parameter_roles
from study.trial import OptimizerSpec, gamma_terms


@dataclass(frozen=True, slots=True)
class Planned:
    """What decay does to one parameter: `p <- p - lr x rate x (p - anchor)`, or its coupled counterpart."""

    parameter: ParameterRole
    rate: float
    """Decay strength per unit of learning rate; 0 leaves the parameter alone."""
    anchor: float = 0.0
    """The value that decay pulls towards."""

    @property
    def group(self) -> str:
        """Name of the param group: parameters of equal rate and anchor share one."""
        if self.rate == 0:
            return "exempt"
        return f"decay {self.rate:g}" + (f" to {self.anchor:g}" if self.anchor else "")


def decay_plan(roles: Iterable[ParameterRole], optimizer: OptimizerSpec) -> list[Planned]:
    """The rate and anchor of every parameter under a policy."""
    return [_planned(role, optimizer) for role in roles]


def _planned(parameter: ParameterRole, optimizer: OptimizerSpec) -> Planned:
    decay = optimizer.weight_decay
    match parameter.role:
        case Role.WEIGHT:
            return Planned(parameter, decay)
        case Role.GAIN:
            terms = gamma_terms(optimizer.gamma)
            rate = decay if optimizer.gamma_decay is None else optimizer.gamma_decay
            named = rate > 0 and parameter.place in terms
            return Planned(parameter, rate, terms[parameter.place]) if named else Planned(parameter, 0.0)
        case Role.SHIFT | Role.BIAS:
            return Planned(parameter, decay if optimizer.shift == "decayed" else 0.0)
        case Role.EMBEDDING:
            return Planned(parameter, decay if optimizer.embedding == "decayed" else 0.0)
        case Role.SCALE:
            return Planned(parameter, 0.0)
        case _:
            assert_never(parameter.role)


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
    anchored = [planned.parameter.name for planned in plan if planned.anchor]
    if anchored:
        raise NotExpressible(
            f"torch's weight decay pulls to 0 only, the policy pulls {len(anchored)} gains to 1: {', '.join(anchored[:3])}",
            where="optimizer.gamma",
            remedy="use study.build_optimizer, which can",
        )
    if optimizer.rule == "sgd" and optimizer.form == "decoupled":
        raise NotExpressible(
            "torch.optim.SGD couples decay into the gradient", where="optimizer.decay", remedy="use study.build_optimizer, which can"
        )
    return _groups(model, plan, optimizer)


def build_optimizer(model: nn.Module, optimizer: OptimizerSpec) -> Optimizer:
    """One torch optimizer that trains a model under a policy; expresses every rule, form and anchor.

    Raises:
        ModelError: if the model does not fit the policy.
    """
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
    groups = _groups(model, plan, optimizer)
    match optimizer.rule, optimizer.form:
        case "sgd", "coupled":
            built: Optimizer = SGD(groups, fused=fused)
        case "sgd", "decoupled":
            return DecoupledSGD(groups, lr=optimizer.lr)
        case _, "coupled":
            built = Adam(groups, fused=fused)
        case _:
            built = AdamW(groups, fused=fused)
    if any(planned.anchor for planned in plan):
        if optimizer.form == "coupled":
            built.register_step_pre_hook(_pull_gradients)
        else:
            built.register_step_post_hook(_pull_parameters)
    return built


def _groups(model: nn.Module, plan: Sequence[Planned], optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for planned in plan:
        group = groups.setdefault(
            (planned.rate, planned.anchor),
            {"params": [], "name": planned.group, "lr": optimizer.lr, "weight_decay": planned.rate, "anchor": planned.anchor, **_options(optimizer)},
        )
        group["params"].append(parameters[planned.parameter.name])
    return list(groups.values())


def _options(optimizer: OptimizerSpec) -> dict[str, Any]:
    if optimizer.rule == "sgd":
        return {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    return {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}


def _pull_gradients(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Torch adds `weight_decay x p` to the gradient; taking `weight_decay x anchor` away makes it pull to the anchor."""
    for group in optimizer.param_groups:
        if group["anchor"]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.sub_(group["weight_decay"] * group["anchor"])


@torch.no_grad()
def _pull_parameters(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Torch shrinks by `lr x weight_decay x p`; adding `lr x weight_decay x anchor` makes it pull to the anchor."""
    for group in optimizer.param_groups:
        if group["anchor"]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(group["lr"] * group["weight_decay"] * group["anchor"])


class DecoupledSGD(Optimizer):
    """SGD with momentum whose decay stays out of the momentum buffer: `p <- p - lr x (m + weight_decay x (p - anchor))`.

    Torch has no such optimizer: its SGD adds decay to the gradient.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 1 (SGDW), arXiv:1711.05101;
    here decay is multiplied by lr, as torch's AdamW does it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        anchor: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "anchor": anchor})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update, momentum = parameter.grad, group["momentum"]
        assert update is not None
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = update.clone()
            else:
                state["momentum_buffer"].mul_(momentum).add_(update)
            buffer = state["momentum_buffer"]
            update = update.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if group["weight_decay"]:
            rate = group["lr"] * group["weight_decay"]
            parameter.mul_(1 - rate)
            if group["anchor"]:
                parameter.add_(rate * group["anchor"])
        parameter.add_(update, alpha=-group["lr"])
