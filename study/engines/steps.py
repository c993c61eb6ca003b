"""Steps: the optimizer steps of the first rows of a bank.

images, labels, now ──> forward ─ sum of losses ─ backward ─ update ──> losses and errors, and what is seen of watched weights

No value of one row enters another: losses are summed, never averaged over rows, and clipping, statistics and random numbers are a
row's own. A step reads and writes tensors that stay where they are, the bank's rows and what decay does to them: it can be recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from study.engines.arithmetic import Mode, Pass
from study.engines.bank import Bank
from study.engines.updates import Decay, Moments, Step, Vectors, clipped, step
from study.training.roles import Role
from study.training.updates import norms

NOTHING = torch.empty(0)
"""Stands for a moment that a parameter's rule does not remember."""


class Seen(NamedTuple):
    """What a step shows of the weights that are traced."""

    weights: tuple[int, ...]
    """Which, by index among all parameters."""
    dots: Tensor
    """Products of weight, step and gradient, as `updates.step` returns them: float64 [weights, rows, 4]."""
    adaptive: tuple[int, ...]
    """Those whose rule divides by roots of second moments."""
    inverse: Tensor
    """Of each of them the mean over coordinates of 1 / (sqrt(v) + eps), v bias-corrected: float64 [adaptive, rows]."""


class Taken(NamedTuple):
    """What a step leaves besides the moved weights."""

    numbers: Tensor
    """Loss and share of wrong answers of every row, before the step: [2, rows]."""
    seen: Seen | None
    """None where the step was not watched."""

    def cloned(self) -> "Taken":
        """The same in memory of its own."""
        seen = self.seen and self.seen._replace(dots=self.seen.dots.clone(), inverse=self.seen.inverse.clone())
        return Taken(self.numbers.clone(), seen)


class _Moving(NamedTuple):
    """The parameters that a step moves, and what goes with them."""

    place: dict[int, int]
    """Where each of them stands in the lists, by its index among all parameters."""
    weights: list[Tensor]
    moments: Moments
    decays: dict[int, Decay]
    how: Step
    watched: tuple[int, ...]
    """Which of them are traced, by index among all parameters."""


class Steps:
    """Takes steps of the first rows of a bank."""

    def __init__(self, bank: Bank, rows: int, names: Sequence[str], decays: Mapping[int, Decay]) -> None:
        """Prepares to.

        Args:
            names: What each step depends on, as `updates.step` names it, in the order in which `take` is given it.
            decays: By the parameter's index; parameters that no row decays are left out.
        """
        self.bank, self.rows, self.names = bank, rows, names
        self.weights = [tensor.detach().requires_grad_() for tensor in bank.trained.prefix(rows).values()]
        self.values = {**dict(zip(bank.names, self.weights, strict=True)), **bank.fixed.prefix(rows)}
        self.dtype = self.weights[0].dtype
        self.decays = decays
        self.moments: Moments = {
            kind: [prefix.get(name, NOTHING) for name in bank.names]
            for kind, prefix in ((kind, stack.prefix(rows)) for kind, stack in bank.moments.items())
        }
        if bank.squares:
            self.moments |= self._of_rotation()
        self._known: dict[tuple[int, ...], _Moving] = {}

    def take(self, images: Tensor, labels: Tensor, now: Tensor, generators: Sequence[torch.Generator], watches: bool) -> Taken:
        """One step of every row.

        Args:
            images: [rows, batch, ...]
            labels: [rows, batch]
            now: What the step depends on: [names, rows].
            generators: One for each row, draws its dropout.
            watches: Whether the traced weights are looked at.
        """
        with self.bank.autocast():
            logits = self.bank.arithmetic(images, Pass(self.values, Mode.TRAIN, generators))
            losses = self._losses(logits, labels)
        gradients = torch.autograd.grad(losses.sum(), self.weights, allow_unused=True)
        with torch.no_grad():
            seen = self._update(gradients, dict(zip(self.names, now.unbind(), strict=True)), watches)
            return Taken(torch.stack((losses.detach(), (logits.argmax(-1) != labels).to(self.dtype).mean(1))), seen)

    def settings(self) -> list[Tensor]:
        """What is computed for the trials that hold the rows, and read by every step."""
        anchors = [decay.anchor for decay in self.decays.values() if decay.anchor is not None]
        return [*(decay.rates for decay in self.decays.values()), *anchors, *self.moments.get("initial_norm", ())]

    def state(self) -> list[Tensor]:
        """All that steps write to."""
        kept = [tensor for kind, tensors in self.moments.items() if kind != "initial_norm" for tensor in tensors]
        return [*(weight.detach() for weight in self.weights), *self.bank.fixed.prefix(self.rows).values(), *kept]

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Every row's own loss: [rows]."""
        if self.bank.loss_name == "cross_entropy":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)
        return torch.stack([self.bank.loss(own, given) for own, given in zip(logits, labels, strict=True)])

    def _update(self, gradients: Sequence[Tensor | None], now: Mapping[str, Tensor], watches: bool) -> Seen | None:
        moving = self._moving(tuple(index for index, gradient in enumerate(gradients) if gradient is not None))
        vectors = Vectors({_renumbered(name, moving.place): vector for name, vector in now.items()})
        slopes = [gradient for gradient in gradients if gradient is not None]
        if "clip" in vectors:
            slopes = clipped(slopes, vectors["clip"])
        watched = moving.watched if watches else ()
        dots = step(moving.how, moving.weights, slopes, moving.moments, moving.decays, vectors, [moving.place[index] for index in watched])
        return self._seen(watched, [dots[moving.place[index]] for index in watched], vectors) if watched else None

    def _moving(self, used: tuple[int, ...]) -> _Moving:
        """What a step moves where only these parameters have gradients: as good as always the same ones."""
        if used not in self._known:
            place = {index: position for position, index in enumerate(used)}
            aux, held = (frozenset(place[index] for index in which if index in place) for which in (self.bank.how.aux, self.bank.how.held))
            traced = [self.bank.index[role.name] for role in self.bank.order if role.role is Role.WEIGHT]
            self._known[used] = _Moving(
                place,
                [self.weights[index].detach() for index in used],
                {kind: [tensors[index] for index in used] for kind, tensors in self.moments.items()},
                {place[index]: decay for index, decay in self.decays.items() if index in place},
                replace(self.bank.how, aux=aux, held=held),
                tuple(index for index in traced if index in place),
            )
        return self._known[used]

    def _of_rotation(self) -> Moments:
        """What the rotational constraint reads of each weight that it holds, beside the rule's moments."""
        bank = self.bank
        squares, initial_norms = [NOTHING] * len(self.weights), [NOTHING] * len(self.weights)
        initial = list(bank.initial.prefix(self.rows).values())
        for index, square in bank.squares.items():
            squares[index] = square[: self.rows]
            initial_norms[index] = torch.func.vmap(lambda one: norms(one, bank.constraint["granularity"]))(initial[index])
        return {"square": squares, "initial_norm": initial_norms}

    def _seen(self, watched: tuple[int, ...], dots: list[Tensor], vectors: Vectors) -> Seen:
        roots = self.moments.get("v")
        adaptive = tuple(index for index in watched if roots and roots[index] is not NOTHING)
        inverse = [_inverse_root(self.moments["v"][index], vectors) for index in adaptive]
        return Seen(watched, torch.stack(dots), adaptive, torch.stack(inverse) if inverse else NOTHING)


def _inverse_root(second: Tensor, vectors: Vectors) -> Tensor:
    corrected = second.flatten(1).double() / vectors["correction2"][:, None]
    return (1 / (corrected.sqrt() + vectors["eps"][:, None])).mean(1)


def _renumbered(name: str, place: Mapping[int, int]) -> str:
    """The name of a vector that belongs to one parameter, among those that have a gradient."""
    kind, _, index = name.partition(" ")
    return f"{kind} {place.get(int(index), index)}" if index.isdigit() else name
