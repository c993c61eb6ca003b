"""Updates: one optimizer step of many slots at once, each with a learning rate, decay plan and age of its own.

gradients ──clip──> + coupled decay ──rule──> + decoupled decay ──> x -lr ──> constraint ──> weights

Everything is a list over the parameters of tensors [slots, *shape]; what differs between slots is a vector [slots]. The rules are those
of torch.optim and of `training/updates.py`, written so that they broadcast; `tests/engines` holds them against both.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from study.training.updates import boxed, muon_scale, orthogonalized, rescaled, rotated

Moments = dict[str, list[Tensor]]
"""`m`, `v` and `square` of every parameter, as the rule and the constraint need them."""

CLIP_EPSILON = 1e-6
"""Added to a gradient's norm before it divides, as torch.nn.utils.clip_grad_norm_ does."""

FILLED_SIDE = 16
"""Muon's matrices are filled with zeros to sides of a multiple of this: products of others round differently in batches of other sizes."""


class Vectors:
    """What one step of every slot depends on, by name: vectors [slots], shaped on demand to stand beside tensors of any rank."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)
        self._views: dict[tuple[str, int], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def beside(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The vector, once for each tensor, with as many axes."""
        return [self._beside(name, tensor) for tensor in tensors]

    def _beside(self, name: str, like: Tensor) -> Tensor:
        key = name, like.ndim
        if key not in self._views:
            self._views[key] = beside(self._values[name], like)
        return self._views[key]


@dataclass(frozen=True, slots=True)
class Decay:
    """What decay does to one parameter in every slot."""

    rates: Tensor
    """[slots, 1, ...], 0 where it leaves the parameter alone."""
    anchor: Tensor | None = None
    """What it pulls towards, broadcastable to the parameter; None for 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """How the slots of one engine move; the same for all."""

    rule: str
    form: str
    nesterov: bool = False
    constraint: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    held: frozenset[int] = frozenset()
    """The parameters that the constraint holds, by index."""
    aux: frozenset[int] = frozenset()
    """The parameters that muon leaves to adamw, by index."""


MOMENTS = {"sgd": ("m",), "adam": ("m", "v"), "adamw": ("m", "v"), "lion": ("m",), "muon": ("m",)}
"""What each rule remembers of every parameter."""

ADAM = ("beta1", "beta2", "eps")
OPTIONS = {"sgd": ("momentum",), "adam": ADAM, "adamw": ADAM, "lion": ("beta1", "beta2"), "muon": ("momentum", *ADAM)}
"""The numbers of the spec that each rule reads; muon's adamw included."""


def step(
    how: Step,
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: Moments,
    decays: Mapping[int, Decay],
    vectors: Vectors,
    watched: Collection[int] = (),
) -> dict[int, Tensor]:
    """Moves the weights of all slots, in place.

    Args:
        decays: By the parameter's index; parameters that no slot decays are left out.
        vectors: `lr`, the rule's own (`momentum`; `beta1 beta2 eps correction1 correction2`; for muon all of these and `aux lr`), `factor`
            where any slot's decay varies over time, and `step` where there is a constraint.
        watched: The parameters whose step is asked for.

    Returns:
        For each watched parameter <w,w>, <w,d>, <d,d> and <g,g> of every slot, where d is the step taken: float64 [slots, 4].
    """
    # Into a moment that is the update itself, decay may be added afterwards, where nothing is copied for it.
    late = how.rule == "sgd" and not how.nesterov
    moved = _with_decay(gradients, weights, decays, vectors) if how.form == "coupled" and not late else gradients
    updates = RULES[how.rule](how, moved, moments, vectors)
    if how.form == "coupled" and late:
        _add_decay(updates, weights, decays, vectors)
    if how.form == "decoupled":
        updates = _with_decay(updates, weights, decays, vectors)
    rates = vectors.beside("lr", updates)
    for index in how.aux:
        rates[index] = vectors.beside("aux lr", [updates[index]])[0]
    taken = {index: updates[index] * rates[index] for index in how.held | set(watched)}
    for index in how.held:
        taken[index] = weights[index] - _constrained(how, index, weights[index], updates[index], taken[index], moments, vectors)
    seen = {index: dots(weights[index], taken[index], gradients[index]) for index in watched}
    free = [index for index in range(len(weights)) if index not in how.held]
    torch._foreach_addcmul_([weights[index] for index in free], [updates[index] for index in free], [rates[index] for index in free], value=-1)
    for index in how.held:
        weights[index].sub_(taken[index])
    return seen


def clipped(gradients: list[Tensor], limits: Tensor) -> list[Tensor]:
    """Gradients scaled down where a slot's global norm is above its limit.

    Args:
        limits: [slots], infinite where a slot does not clip.
    """
    norms_of = torch.stack([torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients])
    factor = Vectors({"factor": (limits / (torch.linalg.vector_norm(norms_of, dim=0) + CLIP_EPSILON)).clamp(max=1.0)})
    return list(torch._foreach_mul(gradients, factor.beside("factor", gradients)))


def dots(weights: Tensor, steps: Tensor, gradients: Tensor) -> Tensor:
    """<w,w>, <w,d>, <d,d> and <g,g> of every slot, for a step d = -steps; accumulated in float64, [slots, 4]."""
    w, d, g = (tensor.reshape(len(tensor), -1).double() for tensor in (weights, steps, gradients))
    return torch.stack(((w * w).sum(1), -(w * d).sum(1), (d * d).sum(1), (g * g).sum(1)), dim=1)


def corrections(betas: Sequence[float], ages: Sequence[int]) -> list[float]:
    """Adam's bias correction 1 - beta^age of every slot, in double precision."""
    return [1 - beta**age for beta, age in zip(betas, ages, strict=True)]


def _with_decay(targets: list[Tensor], weights: list[Tensor], decays: Mapping[int, Decay], vectors: Vectors) -> list[Tensor]:
    """targets + rate x (weight - anchor), where decay acts."""
    found = list(targets)
    if decays:
        totals = torch._foreach_addcmul([targets[index] for index in decays], *_pulls(weights, decays, vectors))
        for index, total in zip(decays, totals, strict=True):
            found[index] = total
    return found


def _add_decay(targets: list[Tensor], weights: list[Tensor], decays: Mapping[int, Decay], vectors: Vectors) -> None:
    """The same in place."""
    if decays:
        torch._foreach_addcmul_([targets[index] for index in decays], *_pulls(weights, decays, vectors))


def _pulls(weights: list[Tensor], decays: Mapping[int, Decay], vectors: Vectors) -> tuple[list[Tensor], list[Tensor]]:
    """How far each weight that decays is from its anchor, and at what rate it is pulled there."""
    ways = [weights[index] if decay.anchor is None else weights[index] - decay.anchor for index, decay in decays.items()]
    rates = [decay.rates for decay in decays.values()]
    if "factor" in vectors:
        rates = list(torch._foreach_mul(rates, vectors.beside("factor", rates)))
    return ways, rates


def _sgd(how: Step, gradients: list[Tensor], moments: Moments, vectors: Vectors) -> list[Tensor]:
    """Heavy-ball momentum: a moment that begins at 0 makes torch's first step."""
    momentum = vectors.beside("momentum", gradients)
    torch._foreach_mul_(moments["m"], momentum)
    torch._foreach_add_(moments["m"], gradients)
    if not how.nesterov:
        return moments["m"]
    updates = torch._foreach_mul(moments["m"], momentum)
    torch._foreach_add_(updates, gradients)
    return list(updates)


def _adam(how: Step, gradients: list[Tensor], moments: Moments, vectors: Vectors) -> list[Tensor]:
    """Bias-corrected first moment over the root of the second.

    Source: Kingma and Ba, Adam, algorithm 1, arXiv:1412.6980.
    """
    _average(moments["m"], gradients, "beta1", vectors)
    _average(moments["v"], list(torch._foreach_mul(gradients, gradients)), "beta2", vectors)
    roots = torch._foreach_div(moments["v"], vectors.beside("correction2", gradients))
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, vectors.beside("eps", gradients))
    updates = torch._foreach_div(moments["m"], vectors.beside("correction1", gradients))
    torch._foreach_div_(updates, roots)
    return list(updates)


def _lion(how: Step, gradients: list[Tensor], moments: Moments, vectors: Vectors) -> list[Tensor]:
    """The sign of an interpolation between moment and gradient.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, algorithm 2, arXiv:2302.06675.
    """
    updates = [moment.clone() for moment in moments["m"]]
    _average(updates, gradients, "beta1", vectors)
    torch._foreach_sign_(updates)
    _average(moments["m"], gradients, "beta2", vectors)
    return updates


def _muon(how: Step, gradients: list[Tensor], moments: Moments, vectors: Vectors) -> list[Tensor]:
    """Hidden weights by orthogonalized moments, a batch of matrices for each of them; the others by adamw.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon.
    """
    hidden, aux = ([index for index in range(len(gradients)) if (index in how.aux) is left] for left in (False, True))
    slopes, kept = [gradients[index] for index in hidden], [moments["m"][index] for index in hidden]
    _average(kept, slopes, "momentum", vectors)
    if how.nesterov:
        kept = [moment.clone() for moment in kept]
        _average(kept, slopes, "momentum", vectors)
    rest: Moments = {kind: [moments[kind][index] for index in aux] for kind in MOMENTS["adamw"]}
    found = dict(zip(hidden, map(_orthogonalized, kept), strict=True))
    found |= zip(aux, _adam(how, [gradients[index] for index in aux], rest, vectors) if aux else (), strict=True)
    return [found[index] for index in range(len(gradients))]


def _orthogonalized(moment: Tensor) -> Tensor:
    """Muon's update of a weight [slots, outputs, ...]; zeros beside its matrices change nothing of them."""
    matrices = moment.reshape(*moment.shape[:2], -1)
    rows, columns = matrices.shape[1:]
    filled = F.pad(matrices, (0, -columns % FILLED_SIDE, 0, -rows % FILLED_SIDE))
    return (orthogonalized(filled)[:, :rows, :columns] * muon_scale(matrices)).reshape(moment.shape)


def _average(averages: list[Tensor], values: list[Tensor], beta: str, vectors: Vectors) -> None:
    """averages <- beta averages + (1 - beta) values, in place."""
    torch._foreach_mul_(averages, vectors.beside(beta, averages))
    torch._foreach_add_(averages, torch._foreach_mul(values, vectors.beside(f"1 - {beta}", averages)))


RULES = {"sgd": _sgd, "adam": _adam, "adamw": _adam, "lion": _lion, "muon": _muon}


def _constrained(how: Step, index: int, weight: Tensor, update: Tensor, plain: Tensor, moments: Moments, vectors: Vectors) -> Tensor:
    """The weight after one step under the constraint; `plain` is the step without it."""
    constraint, age = how.constraint, vectors["step"]
    new = weight - plain
    match constraint["name"]:
        case "rescale":
            held = vmap(lambda one: rescaled(one, constraint["norm"], constraint["granularity"]))(new)
            return torch.where(beside(age % constraint["period"] == 0, new), held, new)
        case "projection":
            return vmap(lambda one: rescaled(one, 1.0, constraint["granularity"]))(new)
        case "norm_schedule":
            return vmap(lambda one, norm: rescaled(one, norm, "tensor"))(new, vectors[f"norm {index}"])
        case "volumization":
            boxes, outside = vmap(lambda one, bound: boxed(one, bound, constraint["strength"]))(new, vectors[f"bound {index}"])
            moments["m"][index].copy_(torch.where(outside, constraint["strength"] * moments["m"][index], moments["m"][index]))
            return boxes
        case "rotational":
            return _turned(constraint["granularity"], index, weight, update, plain, moments, vectors)
    raise AssertionError(f"no constraint {constraint['name']}")


def _turned(granularity: str, index: int, weight: Tensor, update: Tensor, plain: Tensor, moments: Moments, vectors: Vectors) -> Tensor:
    def one(w: Tensor, u: Tensor, angle: Tensor, initial: Tensor, square: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        state = {"initial_norm": initial, "square": square, "step": age}
        return rotated(w, u, angle, state, granularity), state["square"]

    # Where decay pauses, no angle is wanted, and the step is the plain one.
    square, rests = moments["square"][index], vectors["angle"] == 0
    new, after = vmap(one)(weight, update, vectors["angle"], moments["initial_norm"][index], square, vectors["step"])
    square.copy_(torch.where(beside(rests, square), square, after))
    return torch.where(beside(rests, new), weight - plain, new)


def beside(vector: Tensor, tensor: Tensor) -> Tensor:
    """A vector [slots] with the axes of a tensor [slots, ...]."""
    return vector.view(-1, *[1] * (tensor.ndim - 1))
