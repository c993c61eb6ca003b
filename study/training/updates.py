"""Updates: what torch.optim has not, as pure rules on tensors and one optimizer that applies them.

gradient ──rule──> update ──┬── + decay towards its anchor ──> w - lr x update ──┐
                            └── rotational: turned by a fixed angle ─────────────┴── constraint ──> weights

rule            update (decay coupled: g stands for the gradient plus rate x (w - anchor))
sgd             m = momentum m + g                                       nesterov: g + momentum m
adam, adamw     (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
lion            sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g
muon            m = momentum m + (1 - momentum) g, as a matrix, nearly orthogonalized      nesterov: of (1 - momentum) g + momentum m
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from study.training.equilibrium import rotation_at_equilibrium

State = dict[str, Any]
"""Of one parameter: its moments, its initial value, its initial norm; what the rule and the constraint need."""

UPDATE_NORM_DECAY = 0.9
"""Decay of the running mean square of updates in the rotational constraint."""

NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
"""Coefficients of x, x^3 and x^5 in muon's iteration, and how often it is applied: as torch.optim.Muon has them."""

SMALLEST_NORM = 1e-7
"""Norm below which muon does not bring a matrix to norm 1 first."""


def sgd(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Heavy-ball momentum as torch has it: the first step's buffer is the gradient itself."""
    momentum = group["momentum"]
    if not momentum:
        return gradient
    moment: Tensor = momentum * state["m"] + gradient if "m" in state else gradient.clone()
    state["m"] = moment
    return gradient + momentum * moment if group["nesterov"] else moment


def adam(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Bias-corrected first moment over the root of the second.

    Source: Kingma and Ba, Adam, algorithm 1, arXiv:1412.6980.
    """
    first, second = group["betas"]
    state["m"] = first * state.get("m", torch.zeros_like(gradient)) + (1 - first) * gradient
    state["v"] = second * state.get("v", torch.zeros_like(gradient)) + (1 - second) * gradient**2
    corrected: Tensor = state["m"] / (1 - first ** state["step"])
    root: Tensor = (state["v"] / (1 - second ** state["step"])).sqrt() + group["eps"]
    return corrected / root


def lion(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """The sign of an interpolation between moment and gradient.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, algorithm 2, arXiv:2302.06675.
    """
    first, second = group["betas"]
    before = state.get("m", torch.zeros_like(gradient))
    state["m"] = second * before + (1 - second) * gradient
    return torch.sign(first * before + (1 - first) * gradient)


def muon(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """The moment of a weight, taken as a matrix of its output channels, with all singular values brought near 1.

    A tall matrix moves farther by the root of its sides' ratio: torch's `adjust_lr_fn="original"`. torch.optim.Muon takes matrices only
    and orthogonalizes in bfloat16; this rule takes kernels, too, and keeps the parameter's dtype.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon.
    """
    momentum = group["momentum"]
    moment: Tensor = momentum * state.get("m", torch.zeros_like(gradient)) + (1 - momentum) * gradient
    state["m"] = moment
    ahead: Tensor = momentum * moment + (1 - momentum) * gradient if group["nesterov"] else moment
    matrix = ahead.reshape(len(ahead), -1)
    return (orthogonalized(matrix) * muon_scale(matrix)).reshape(gradient.shape)


def muon_scale(matrix: Tensor) -> float:
    """How much farther muon moves a matrix [..., rows, columns] that has more rows than columns."""
    return math.sqrt(max(1.0, matrix.shape[-2] / matrix.shape[-1]))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Matrices [..., rows, columns] with singular values between about 0.7 and 1.2 in place of all that are not next to nothing.

    Newton-Schulz iteration with a quintic polynomial, whose slope at 0 is as steep as can be: it does not converge to 1.
    """
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    tall = matrix.shape[-2] > matrix.shape[-1]
    found: Tensor = (matrix.mT if tall else matrix) / norm.clamp(min=SMALLEST_NORM)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = found @ found.mT
        found = first * found + (third * gram + fifth * (gram @ gram)) @ found
    return found.mT if tall else found


RULES: dict[str, Callable[[Tensor, State, dict[str, Any]], Tensor]] = {"sgd": sgd, "adam": adam, "adamw": adam, "lion": lion, "muon": muon}


def norms(weight: Tensor, granularity: str) -> Tensor:
    """The norm of a weight, or of each of its output channels (its first axis), shaped to divide it."""
    axes = tuple(range(weight.ndim)) if granularity == "tensor" else tuple(range(1, weight.ndim))
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) if axes else weight.abs()


def rescaled(weight: Tensor, norm: float, granularity: str) -> Tensor:
    """The weight in its own direction with the given norm.

    Source: Liu et al., Weight Rescaling, arXiv:2102.03497; norm 1: van Laarhoven, arXiv:1706.05350, section 5.5.
    """
    return weight * (norm / norms(weight, granularity))


def boxed(weight: Tensor, bound: float, strength: float) -> tuple[Tensor, Tensor]:
    """The weight with every coordinate beyond the box pulled back, and which coordinates those are.

    Source: Ziyin et al., Volumization as a Natural Generalization of Weight Decay, arXiv:2003.11243.
    """
    size = weight.abs()
    outside = size > bound
    return torch.where(outside, torch.sign(weight) * (bound + strength * (size - bound)), weight), outside


def rotated(weight: Tensor, update: Tensor, angle: float | Tensor, state: State, granularity: str) -> Tensor:
    """The weight turned against an update by an RMS angle, at its initial norm.

    Source: Kosson et al., Rotational Equilibrium, algorithm of the rotational variants, arXiv:2305.17212.
    """
    size = norms(weight, granularity)
    initial: Tensor = state["initial_norm"]
    axes = tuple(range(weight.ndim)) if granularity == "tensor" else tuple(range(1, weight.ndim))
    unit = weight / size
    tangent = update - unit * (unit * update).sum(dim=axes, keepdim=True)
    square = tangent.square().sum(dim=axes, keepdim=True)
    state["square"] = UPDATE_NORM_DECAY * state.get("square", torch.zeros_like(square)) + (1 - UPDATE_NORM_DECAY) * square
    average = (state["square"] / (1 - UPDATE_NORM_DECAY ** state["step"])).sqrt()
    turned: Tensor = weight - angle * initial * tangent / (average + 1e-8)
    return turned * (initial / norms(turned, granularity))


def scheduled_norm(step: int, steps: Sequence[int], values: Sequence[float]) -> float:
    """A recorded norm at a step, linear between the recorded steps, level beyond them."""
    after = bisect_right(steps, step)
    if after in (0, len(steps)):
        return values[min(after, len(steps) - 1)]
    share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


class PlannedOptimizer(Optimizer):
    """Applies a decay plan that torch's own optimizers cannot express: anchors, other forms of decay, lion, muon, constraints.

    Each param group holds `rule`, `form`, `lr`, `weight_decay`, `anchor` (a number, or `init`), the rule's options, and `constraint`
    (its fields as a mapping) where its weights are constrained.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self._remember(parameter, group)

    def _remember(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, constraint, value = self.state[parameter], group["constraint"], parameter.detach()
        state["step"] = 0
        if group["anchor"] == "init":
            state["initial"] = value.clone()
        if constraint and constraint["name"] == "rotational":
            state["initial_norm"] = norms(value, constraint["granularity"]).clone()
        if constraint and constraint["name"] == "volumization":
            state["bound"] = constraint["bound"] * float(value.abs().max())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
                    parameter.copy_(_updated(parameter.detach(), parameter.grad, self.state[parameter], group))
        return loss


def _updated(weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """The parameter after one step."""
    anchor, constraint = group["anchor"], group["constraint"] or {"name": "none"}
    turns = constraint["name"] == "rotational"
    decays = group["weight_decay"] and not turns
    pull = group["weight_decay"] * (weight - (state["initial"] if anchor == "init" else anchor)) if decays else None
    if pull is not None and group["form"] == "coupled":
        gradient = gradient + pull
    update = RULES[group["rule"]](gradient, state, group)
    if turns and (angle := rotation_at_equilibrium(group)):
        return rotated(weight, update, angle, state, constraint["granularity"])
    if pull is not None and group["form"] == "decoupled":
        update = update + pull
    return _constrained(weight - group["lr"] * update, state, group, constraint)


def _constrained(weight: Tensor, state: State, group: dict[str, Any], constraint: dict[str, Any]) -> Tensor:
    match constraint["name"]:
        case "rescale" if state["step"] % constraint["period"] == 0:
            return rescaled(weight, constraint["norm"], constraint["granularity"])
        case "projection":
            return rescaled(weight, 1.0, constraint["granularity"])
        case "norm_schedule":
            return rescaled(weight, scheduled_norm(state["step"] + 1, group["norm_steps"], group["norm_values"]), "tensor")
        case "volumization":
            weight, outside = boxed(weight, state["bound"], constraint["strength"])
            if "m" in state:
                state["m"] = torch.where(outside, constraint["strength"] * state["m"], state["m"])
    return weight
