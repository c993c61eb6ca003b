"""Interval: one epoch of the trials that hold the first rows of a bank.

orders, tables ─ [images ─ step]* ─ statistics ─ evaluate ─ measure

What a step does is in `steps.py`; here is what goes in for each trial, and what is made of what comes out.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from study.engines.arithmetic import Mode, Pass
from study.engines.bank import Bank, Member
from study.engines.recordings import Recordings
from study.engines.solo import STATISTICS_IMAGES
from study.engines.steps import Seen
from study.engines.updates import OPTIONS, Decay, beside, corrections
from study.measurement import LayerSample, Progress, Reason
from study.optimizer import OptimizerSpec
from study.training.decay import Planned, rule_of
from study.training.effective_lr import effective_lr, rotation
from study.training.equilibrium import follow, is_equilibrated, rotation_at_equilibrium, theory_of
from study.training.gains import by_place, stacked_samples
from study.training.roles import ParameterRole, Role
from study.training.updates import scheduled_norm

EVALUATION_ROWS = 4
"""Rows that are evaluated at once; never one alone, where there are two."""

EVALUATION_IMAGES = 256
"""Images of each row that go through the model at once when it is evaluated."""


class Interval:
    """One epoch of the trials that hold the first rows."""

    def __init__(self, bank: Bank, members: list[Member], recordings: Recordings) -> None:
        self.bank, self.members, self.recordings = bank, members, recordings
        self.rows = recordings.padded(len(members))
        for row in range(len(members), self.rows):
            bank.move(0, row)
        # Rows beyond the trials' own only fill up: they repeat the first trial.
        self.padded = [*members, *[members[0]] * (self.rows - len(members))]
        self.courses = [member.course for member in self.padded]
        self.dtype = next(iter(bank.trained.tensors.values())).dtype
        self.seen: list[tuple[int, Seen]] = []

    def run(self) -> list[Progress]:
        """Trains, evaluates and measures."""
        start = time.perf_counter()
        orders = self._orders()
        numbers = self._train(orders)
        self._count(len(orders))
        # Each row's own numbers side by side: the order of a sum must not depend on the number of rows.
        losses, errors = numbers.movedim(1, 2).contiguous().mean(2).tolist()
        first, largest = numbers[0, 0].tolist(), self._largest()
        reasons: list[Reason] = []
        values: list[dict[str, float]] = []
        for row, member in enumerate(self.members):
            member.course.epoch += 1
            values.append(member.course.trained(first[row], losses[row], errors[row]))
            reasons.append(member.course.divergence(losses[row], largest[row]))
        samples = self._samples()
        if not all(reasons):
            self._evaluate(values, reasons)
        seconds = (time.perf_counter() - start) / len(self.members)
        return [member.course.measured(values[row], samples[row], reasons[row], seconds) for row, member in enumerate(self.members)]

    def _orders(self) -> Tensor:
        """The images of every step and row: int64 [steps, rows, batch]."""
        orders = [member.course.batches() for member in self.members]
        orders += [orders[0]] * (self.rows - len(self.members))
        return torch.stack(orders, dim=1).to(self.bank.device)

    def _train(self, orders: Tensor) -> Tensor:
        """Losses and errors of every step and row: [2, steps, rows]."""
        tables = self._tables(len(orders))
        now = torch.tensor(list(tables.values()), dtype=self.dtype, device=self.bank.device).movedim(0, 1)
        steps = self.recordings.steps(self.rows, tuple(tables), self._decays())
        generators = [member.dropout for member in self.members]
        generators += [torch.Generator(self.bank.device).manual_seed(0) for _ in range(self.rows - len(generators))]
        numbers = []
        for number, chosen in enumerate(orders):
            taken = steps.take(*self._batch(chosen), now[number], generators, self._watches(number))
            numbers.append(taken.numbers)
            if taken.seen:
                self.seen.append((number, taken.seen))
        return torch.stack(numbers, dim=1)

    def _decays(self) -> dict[int, Decay]:
        """What decay does to each parameter that any row decays; where steps are recorded, to every one, as other trials will come."""
        plans = [{planned.parameter.name: planned for planned in member.plan} for member in self.padded]
        initial = self.bank.initial.prefix(self.rows)
        anywhere = self.recordings.records and any(planned.anchor for plan in plans for planned in plan.values())
        found = {}
        for index, name in enumerate(self.bank.names):
            planned = [plan[name] for plan in plans]
            turns = planned[0].constrained and self.bank.constraint["name"] == "rotational"
            rates = [0.0 if turns else one.rate for one in planned]
            if any(rates) or self.recordings.records:
                anchor = self._anchor(planned, initial[name]) if anywhere or any(one.anchor for one in planned) else None
                found[index] = Decay(beside(self._vector(rates), initial[name]), anchor)
        return found

    def _anchor(self, planned: list[Planned], initial: Tensor) -> Tensor:
        numbers = beside(self._vector(0.0 if one.anchor == "init" else float(one.anchor or 0) for one in planned), initial)
        if not self.recordings.records and not any(one.anchor == "init" for one in planned):
            return numbers
        return numbers + initial * beside(self._vector(float(one.anchor == "init") for one in planned), initial)

    def _tables(self, steps: int) -> dict[str, list[list[float]]]:
        """What each step of each row depends on, by name: [steps, rows]."""
        optimizers = [course.trial.optimizer for course in self.courses]
        scheduled = [[course.scheduled(course.step + number) for course in self.courses] for number in range(steps)]
        tables = {"lr": [[lr for lr, _ in row] for row in scheduled]}
        factors = [[factor for _, factor in row] for row in scheduled]
        if self.recordings.records or any(factor != 1.0 for row in factors for factor in row):
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
        return tables | self._tables_of_constraint(optimizers, scheduled, ages)

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

    def _batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images [rows, batch, ...] and labels [rows, batch] of one step."""
        first = self.courses[0].data
        if all(course.data is first and course.trial.data.augment == "none" for course in self.courses):
            return first.train_images[chosen], first.train_labels[chosen]
        own = [course.batch(indices) for course, indices in zip(self.courses[: len(self.members)], chosen, strict=False)]
        own += [own[0]] * (self.rows - len(own))
        images, labels = zip(*own, strict=True)
        return torch.stack(images), torch.stack(labels)

    def _watches(self, number: int) -> bool:
        """Whether any trial is traced at a step of this epoch."""
        return any((member.course.step + number + 1) % member.course.trial.trace.every == 0 for member in self.members)

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
        for number, seen in self.seen:
            dots, means = seen.dots.tolist(), dict(zip(seen.adaptive, seen.inverse.tolist(), strict=True))
            for row, member in enumerate(self.members):
                if (self.began[row] + number + 1) % member.course.trial.trace.every == 0:
                    found[row] += [
                        self._sample(row, number, roles[index], own[row], means[index][row] if index in means else None)
                        for index, own in zip(seen.weights, dots, strict=True)
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
        weights = self.bank.trained.prefix(self.rows).values()
        return torch.stack([weight.reshape(self.rows, -1).abs().amax(1) for weight in weights]).amax(0).tolist()

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
        """Logits of every row; on a CPU a few rows at a time, as batches are larger than in training, and all would spill the caches."""
        logits = []
        values = self._values()
        steps = torch.arange(0, self.rows, self.bank.step)
        for starts in steps.tensor_split(-(-self.rows // EVALUATION_ROWS) if self.bank.device.type == "cpu" else 1):
            part = slice(int(starts[0]), int(starts[-1]) + self.bank.step)
            with self.bank.autocast():
                logits.append(self.bank.arithmetic(images[part], Pass({name: value[part] for name, value in values.items()}, mode)))
        return torch.cat(logits)

    def _logits(self, count: int) -> Tensor:
        parts = []
        for start in range(0, count, EVALUATION_IMAGES):
            images = torch.stack([course.data.validation_images[start : start + EVALUATION_IMAGES] for course in self.courses])
            parts.append(self._run(Mode.EVALUATE, images))
        return torch.cat(parts, dim=1).to(self.dtype)

    def _values(self) -> dict[str, Tensor]:
        return {**self.bank.trained.prefix(self.rows), **self.bank.fixed.prefix(self.rows)}

    def _gains(self) -> list[dict[str, float]]:
        """The metrics of the gains of each trial."""
        gains = [role for role in self.bank.roles if role.role is Role.GAIN]
        if not gains:
            return [{} for _ in self.members]
        values = self._values()
        stacked = stacked_samples([role.place for role in gains], [values[role.name][: len(self.members)] for role in gains])
        return [by_place(samples) for samples in stacked]


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
