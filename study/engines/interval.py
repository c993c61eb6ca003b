"""Interval: one epoch of the trials that hold the first rows of a bank.

[images ─ forward ─ sum of losses ─ backward ─ update]* ─ statistics ─ evaluate ─ measure

No value of one row enters another: losses are summed, never averaged over rows, and clipping, statistics and random numbers are a
row's own.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from study.engines.arithmetic import Mode, Pass
from study.engines.bank import Bank, Member
from study.engines.solo import STATISTICS_IMAGES
from study.engines.updates import OPTIONS, Decay, Moments, Step, Vectors, beside, clipped, corrections, step
from study.measurement import LayerSample, Progress, Reason
from study.optimizer import OptimizerSpec
from study.training.decay import Planned, rule_of
from study.training.effective_lr import effective_lr, rotation
from study.training.equilibrium import follow, is_equilibrated, rotation_at_equilibrium, theory_of
from study.training.gains import by_place, stacked_samples
from study.training.roles import ParameterRole, Role
from study.training.updates import norms, scheduled_norm

EVALUATION_ROWS = 4
"""Rows that are evaluated at once; never one alone, where there are two."""

EVALUATION_IMAGES = 256
"""Images of each row that go through the model at once when it is evaluated."""

NOTHING = torch.empty(0)
"""Stands for a moment that a parameter's rule does not remember."""


class _Moving(NamedTuple):
    """The parameters that a step moves, and what goes with them."""

    place: dict[int, int]
    """Where each of them stands in the lists, by its index among all parameters."""
    weights: list[Tensor]
    moments: Moments
    decays: dict[int, Decay]
    how: Step


class Interval:
    """One epoch of the trials that hold the first rows."""

    def __init__(self, bank: Bank, members: list[Member]) -> None:
        self.bank, self.members = bank, members
        self.rows = bank.padded(len(members))
        for row in range(len(members), self.rows):
            bank.move(0, row)
        # Rows beyond the trials' own only fill up: they repeat the first trial.
        self.padded = [*members, *[members[0]] * (self.rows - len(members))]
        self.courses = [member.course for member in self.padded]
        self.weights = [tensor.detach().requires_grad_() for tensor in bank.trained.prefix(self.rows).values()]
        self.values = {**dict(zip(bank.names, self.weights, strict=True)), **bank.fixed.prefix(self.rows)}
        self.moments: Moments = {
            kind: [prefix.get(name, NOTHING) for name in bank.names]
            for kind, prefix in ((kind, stack.prefix(self.rows)) for kind, stack in bank.moments.items())
        }
        self._hold()
        self.dtype = self.weights[0].dtype
        self.decays = self._decays()
        self.seen: list[tuple[int, dict[int, Tensor], dict[int, Tensor]]] = []
        self._known: dict[tuple[int, ...], _Moving] = {}

    def run(self) -> list[Progress]:
        """Trains, evaluates and measures."""
        start = time.perf_counter()
        orders = [member.course.batches() for member in self.members]
        orders += [orders[0]] * (self.rows - len(self.members))
        numbers = self._train(orders)
        self._count(len(orders[0]))
        # Each row's own numbers side by side: the order of a sum must not depend on the number of rows.
        losses, errors = numbers.movedim(1, 2).contiguous().mean(2).tolist()
        largest = self._largest()
        reasons: list[Reason] = []
        values: list[dict[str, float]] = []
        for row, member in enumerate(self.members):
            member.course.epoch += 1
            values.append(member.course.trained(float(numbers[0, 0, row]), losses[row], errors[row]))
            reasons.append(member.course.divergence(losses[row], largest[row]))
        samples = self._samples()
        if not all(reasons):
            self._evaluate(values, reasons)
        seconds = (time.perf_counter() - start) / len(self.members)
        return [member.course.measured(values[row], samples[row], reasons[row], seconds) for row, member in enumerate(self.members)]

    def _train(self, orders: list[Tensor]) -> Tensor:
        """Losses and errors of every step and row: [2, steps, rows]."""
        tables = self._tables(len(orders[0]))
        rows = []
        generators = [member.dropout for member in self.members]
        generators += [torch.Generator(self.bank.device).manual_seed(0) for _ in range(self.rows - len(generators))]
        for number in range(len(orders[0])):
            images, labels = self._batch([order[number] for order in orders])
            with self._autocast():
                logits = self.bank.arithmetic(images, Pass(self.values, Mode.TRAIN, generators))
                losses = self._losses(logits, labels)
            gradients = torch.autograd.grad(losses.sum(), self.weights, allow_unused=True)
            with torch.no_grad():
                self._update(number, list(gradients), tables)
                rows.append(torch.stack((losses.detach(), (logits.argmax(-1) != labels).to(self.dtype).mean(1))))
        return torch.stack(rows, dim=1)

    def _update(self, number: int, gradients: list[Tensor | None], tables: Mapping[str, Tensor]) -> None:
        moving = self._moving(tuple(index for index, gradient in enumerate(gradients) if gradient is not None))
        vectors = Vectors({_renumbered(name, moving.place): table[number] for name, table in tables.items()})
        slopes = [gradient for gradient in gradients if gradient is not None]
        if "clip" in vectors:
            slopes = clipped(slopes, vectors["clip"])
        watched = [moving.place[index] for index in self._watched(number) if index in moving.place]
        seen = step(moving.how, moving.weights, slopes, moving.moments, moving.decays, vectors, watched)
        if watched:
            used = list(moving.place)
            found = {used[position]: dots for position, dots in seen.items()}
            self.seen.append((number, found, self._inverse_roots(found, vectors)))

    def _moving(self, used: tuple[int, ...]) -> "_Moving":
        """What a step moves where only these parameters have gradients: as good as always the same ones."""
        if used not in self._known:
            place = {index: position for position, index in enumerate(used)}
            aux, held = (frozenset(place[index] for index in which if index in place) for which in (self.bank.how.aux, self.bank.how.held))
            self._known[used] = _Moving(
                place,
                [self.weights[index].detach() for index in used],
                {kind: [tensors[index] for index in used] for kind, tensors in self.moments.items()},
                {place[index]: decay for index, decay in self.decays.items() if index in place},
                replace(self.bank.how, aux=aux, held=held),
            )
        return self._known[used]

    def _hold(self) -> None:
        """What the constraint reads of each weight that it holds, beside the rule's moments."""
        bank, count = self.bank, len(self.weights)
        if bank.squares:
            empty = [NOTHING] * count
            self.moments["square"], self.moments["initial_norm"] = list(empty), list(empty)
            initial = list(bank.initial.prefix(self.rows).values())
            for index, square in bank.squares.items():
                self.moments["square"][index] = square[: self.rows]
                self.moments["initial_norm"][index] = torch.func.vmap(lambda one: norms(one, bank.constraint["granularity"]))(initial[index])

    def _decays(self) -> dict[int, Decay]:
        """What decay does to each parameter that any row decays."""
        plans = [{planned.parameter.name: planned for planned in member.plan} for member in self.padded]
        initial = self.bank.initial.prefix(self.rows)
        found = {}
        for index, name in enumerate(self.bank.names):
            planned = [plan[name] for plan in plans]
            turns = planned[0].constrained and self.bank.constraint["name"] == "rotational"
            rates = [0.0 if turns else one.rate for one in planned]
            if any(rates):
                weight = self.weights[index]
                found[index] = Decay(beside(self._vector(rates), weight), self._anchor(planned, weight, initial[name]))
        return found

    def _anchor(self, planned: list[Planned], weight: Tensor, initial: Tensor) -> Tensor | None:
        if not any(one.anchor for one in planned):
            return None
        numbers = beside(self._vector([0.0 if one.anchor == "init" else float(one.anchor) for one in planned]), weight)
        if not any(one.anchor == "init" for one in planned):
            return numbers
        return numbers + initial * beside(self._vector([float(one.anchor == "init") for one in planned]), weight)

    def _tables(self, steps: int) -> dict[str, Tensor]:
        """What each step of each row depends on, by name: [steps, rows]."""
        optimizers = [course.trial.optimizer for course in self.courses]
        scheduled = [[course.scheduled(course.step + number) for course in self.courses] for number in range(steps)]
        tables = {"lr": [[lr for lr, _ in row] for row in scheduled]}
        factors = [[factor for _, factor in row] for row in scheduled]
        if any(factor != 1.0 for row in factors for factor in row):
            tables["factor"] = factors
        if self.bank.how.aux:
            tables["aux lr"] = [[course.scheduled(course.step + number, aux=True)[0] for course in self.courses] for number in range(steps)]
        for name in OPTIONS[self.bank.how.rule]:
            tables[name] = [[float(getattr(optimizer, name)) for optimizer in optimizers]] * steps
            tables[f"1 - {name}"] = [[1 - value for value in tables[name][0]]] * steps
        ages = [[course.step + number + 1 for course in self.courses] for number in range(steps)]
        if "eps" in tables:
            for index, name in ((1, "beta1"), (2, "beta2")):
                tables[f"correction{index}"] = [corrections(tables[name][0], row) for row in ages]
        if any(optimizer.clip is not None for optimizer in optimizers):
            tables["clip"] = [[float("inf") if optimizer.clip is None else optimizer.clip for optimizer in optimizers]] * steps
        tables |= self._tables_of_constraint(optimizers, scheduled, ages)
        return {name: torch.tensor(table, dtype=self.dtype, device=self.bank.device) for name, table in tables.items()}

    def _tables_of_constraint(
        self, optimizers: list[OptimizerSpec], scheduled: list[list[tuple[float, float]]], ages: list[list[int]]
    ) -> dict[str, list[list[float]]]:
        tables: dict[str, list[list[float]]] = {"step": [[float(age) for age in row] for row in ages]} if self.bank.held else {}
        match self.bank.constraint["name"]:
            case "rotational":
                tables["angle"] = [
                    [_angle(optimizer, lr, factor) for optimizer, (lr, factor) in zip(optimizers, row, strict=True)] for row in scheduled
                ]
            case "volumization":
                for index in self.bank.held:
                    initial = list(self.bank.initial.prefix(self.rows).values())[index]
                    bounds = (self.bank.constraint["bound"] * initial.abs().flatten(1).amax(1)).tolist()
                    tables[f"bound {index}"] = [bounds] * len(ages)
            case "norm_schedule":
                for index in self.bank.held:
                    recorded = [member.norms[index] for member in self.padded]
                    tables[f"norm {index}"] = [
                        [scheduled_norm(age + 1, own["norm_steps"], own["norm_values"]) for age, own in zip(row, recorded, strict=True)]
                        for row in ages
                    ]
        return tables

    def _vector(self, values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=self.dtype, device=self.bank.device)

    def _batch(self, indices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Images [rows, batch, ...] and labels [rows, batch] of one step."""
        first = self.courses[0].data
        if all(course.data is first and course.trial.data.augment == "none" for course in self.courses):
            chosen = torch.stack(indices)
            return first.train_images[chosen], first.train_labels[chosen]
        own = [course.batch(chosen) for course, chosen in zip(self.courses[: len(self.members)], indices, strict=False)]
        own += [own[0]] * (self.rows - len(own))
        images, labels = zip(*own, strict=True)
        return torch.stack(images), torch.stack(labels)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Every row's own loss: [rows]."""
        if self.courses[0].trial.loss == "cross_entropy":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)
        return torch.stack([course.loss(own, given) for course, own, given in zip(self.courses, logits, labels, strict=True)])

    def _autocast(self) -> Any:
        return torch.autocast(self.bank.device.type, torch.bfloat16) if self.bank.precision == "bf16" else nullcontext()

    def _watched(self, number: int) -> list[int]:
        """The weights to be traced at a step of this epoch: all or none."""
        if not any((member.course.step + number + 1) % member.course.trial.trace.every == 0 for member in self.members):
            return []
        return [self.bank.index[role.name] for role in self.bank.order if role.role is Role.WEIGHT]

    def _inverse_roots(self, watched: Iterable[int], vectors: Vectors) -> dict[int, Tensor]:
        """The mean over coordinates of 1 / (sqrt(v) + eps), v bias-corrected: [rows], of parameters whose rules have it."""
        found = {}
        for index in watched:
            if "v" not in self.moments or self.moments["v"][index] is NOTHING:
                continue
            second = self.moments["v"][index].flatten(1).double() / vectors["correction2"][:, None]
            found[index] = (1 / (second.sqrt() + vectors["eps"][:, None])).mean(1)
        return found

    def _count(self, steps: int) -> None:
        """Counts the epoch's steps, and follows lr x decay of every group through them."""
        self.began = [member.course.step for member in self.members]
        self.since: list[list[dict[str, int]]] = []
        for member in self.members:
            rates = {group: (planned.rate, planned.aux) for group, planned in member.groups().items()}
            trail = []
            for _ in range(steps):
                scheduled = {aux: member.course.scheduled(member.course.step, aux=aux) for aux in {aux for _, aux in rates.values()}}
                member.course.step += 1
                for group, (rate, aux) in rates.items():
                    lr, factor = scheduled[aux]
                    member.products[group] = follow(lr * rate * factor, member.products[group], member.course.step)
                trail.append({group: since for group, (_, since) in member.products.items()})
            self.since.append(trail)

    def _samples(self) -> list[list[LayerSample]]:
        """The layers' samples of every trial."""
        found: list[list[LayerSample]] = [[] for _ in self.members]
        roles = {self.bank.index[role.name]: role for role in self.bank.order}
        for number, dots, inverse in self.seen:
            numbers, means = {index: table.tolist() for index, table in dots.items()}, {index: table.tolist() for index, table in inverse.items()}
            for row, member in enumerate(self.members):
                if (self.began[row] + number + 1) % member.course.trial.trace.every == 0:
                    found[row] += [
                        self._sample(row, number, roles[index], own[row], means[index][row] if index in means else None)
                        for index, own in numbers.items()
                    ]
        return found

    def _sample(self, row: int, number: int, role: ParameterRole, dots: list[float], inverse: float | None) -> LayerSample:
        member = self.members[row]
        planned = next(planned for planned in member.plan if planned.parameter.name == role.name)
        lr, factor = member.course.scheduled(self.began[row] + number, aux=planned.aux)
        optimizer = member.course.trial.optimizer
        group = _described(rule_of(planned, optimizer), optimizer, lr, planned.rate * factor)
        theory, age = theory_of(group), self.began[row] + number + 1
        norm2, along, moved2, gradient2 = dots
        return LayerSample(
            step=age,
            layer=role.layer,
            role=str(role.role),
            place=role.place,
            scale_invariant=role.scale_invariant,
            equilibrated=is_equilibrated(theory, age - self.since[row][number][member.group(planned)]),
            lr=lr,
            weight_decay=planned.rate * factor,
            weight_norm=norm2**0.5,
            grad_norm=gradient2**0.5,
            effective_lr=effective_lr(lr, norm2, theory),
            rotation=rotation(norm2, along, moved2),
            rotation_expected=theory.rotation_expected if role.scale_invariant else None,
            source="update",
            relaxation_time=1 / theory.rate if theory.rate else None,
            coordinate_rate=None if inverse is None else lr * inverse,
        )

    @torch.no_grad()
    def _largest(self) -> list[float]:
        """The largest size of any parameter of each row; NaN where one is NaN."""
        return torch.stack([weight.detach().reshape(self.rows, -1).abs().amax(1) for weight in self.weights]).amax(0).tolist()

    @torch.no_grad()
    def _evaluate(self, values: list[dict[str, float]], reasons: list[Reason]) -> None:
        """Adds to each trial's values what it measures between epochs, except where it diverged."""
        if self.bank.estimates:
            self._run(Mode.ESTIMATE, torch.stack([course.data.train_images[:STATISTICS_IMAGES] for course in self.courses]))
        count = len(self.courses[0].data.validation_labels)
        logits = self._logits(count) if count else None
        gains = self._gains()
        for row, member in enumerate(self.members):
            if reasons[row]:
                continue
            values[row] |= (member.course.evaluated(logits[row]) if logits is not None else {}) | gains[row]
            if member.course.is_last and member.course.ends_with_more:
                self.bank.shell.load_state_dict(self.bank.state(row))
                values[row] |= member.course.concluded(self.bank.shell.eval())

    def _run(self, mode: Mode, images: Tensor) -> Tensor:
        """Logits of every row, a few rows at a time: batches are larger than in training, and all rows at once would spill the caches."""
        logits = []
        steps = torch.arange(0, self.rows, self.bank.step)
        for starts in steps.tensor_split(-(-self.rows // EVALUATION_ROWS)):
            part = slice(int(starts[0]), int(starts[-1]) + self.bank.step)
            with self._autocast():
                logits.append(self.bank.arithmetic(images[part], Pass({name: value[part] for name, value in self.values.items()}, mode)))
        return torch.cat(logits)

    def _logits(self, count: int) -> Tensor:
        parts = []
        for start in range(0, count, EVALUATION_IMAGES):
            images = torch.stack([course.data.validation_images[start : start + EVALUATION_IMAGES] for course in self.courses])
            parts.append(self._run(Mode.EVALUATE, images))
        return torch.cat(parts, dim=1).to(self.dtype)

    def _gains(self) -> list[dict[str, float]]:
        """The metrics of the gains of each trial."""
        gains = [role for role in self.bank.roles if role.role is Role.GAIN]
        if not gains:
            return [{} for _ in self.members]
        stacked = stacked_samples([role.place for role in gains], [self.values[role.name][: len(self.members)] for role in gains])
        return [by_place(samples) for samples in stacked]


def _renumbered(name: str, place: Mapping[int, int]) -> str:
    """The name of a table that belongs to one parameter, among those that have a gradient."""
    kind, _, index = name.partition(" ")
    return f"{kind} {place.get(int(index), index)}" if index.isdigit() else name


def _described(rule: str, optimizer: OptimizerSpec, lr: float, decay: float) -> dict[str, Any]:
    """A param group as theory wants it described."""
    return {
        "rule": rule,
        "form": optimizer.form,
        "lr": lr,
        "weight_decay": decay,
        "momentum": optimizer.momentum,
        "nesterov": optimizer.nesterov,
        "betas": (optimizer.beta1, optimizer.beta2),
    }


def _angle(optimizer: OptimizerSpec, lr: float, factor: float) -> float:
    return rotation_at_equilibrium(_described(optimizer.rule, optimizer, lr, optimizer.weight_decay * factor)) or 0.0
