"""Bank: everything that the rows of a fused engine share, and everything that each of them has of its own.

Member     one trial: its course, its decay plan, its random numbers
Bank       the model's computation, the roles of its parameters, and a stack for each kind of tensor:

           trained   parameters            moments   what the rule remembers
           fixed     buffers, frozen ones  initial   where every parameter began
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from study.engines.arithmetic import Arithmetic, Looped
from study.engines.conversion import Converted
from study.engines.course import Course
from study.engines.engine import Snapshot
from study.engines.stack import Stack
from study.engines.updates import MOMENTS, Step
from study.training.decay import Planned, decay_plan, group_key, recorded_norms, rule_of
from study.training.plans import roles_on
from study.training.roles import ParameterRole, Role
from study.training.updates import norms
from study.trial import TrialSpec

FEWEST_ROWS = 2
"""A single row is trained beside a copy of itself: one group alone takes other kernels, and so other bits."""

VECTOR = 16
"""Numbers of float32 that the widest vector registers hold."""

WIDEST_STEP = 4
"""Rows are filled up to a multiple of at most this, so that channels fill vector registers."""

OWN = {
    "": ("seed", "metrics", "probes"),
    "data": ("seed", "label_noise"),
    "optimizer": (
        *("lr", "aux_lr", "weight_decay", "intrinsic_lr", "momentum", "beta1", "beta2", "eps", "clip", "target"),
        *("gamma", "gamma_decay", "shift", "shift_decay", "embedding", "embedding_decay"),
    ),
    "schedule": None,
    "trace": None,
}
"""What may differ between the trials of one engine: fields by section, None for whole sections."""


def fusion_key(trial: TrialSpec) -> str:
    """Equal for trials that can be trained in one engine."""
    fields = trial.model_dump(mode="json")
    for section, names in OWN.items():
        if names is None:
            fields.pop(section)
            continue
        for name in names:
            (fields[section] if section else fields).pop(name)
    fields["optimizer"]["decay"] = trial.optimizer.form
    if trial.optimizer.constraint.name == "rotational":
        fields["optimizer"]["turns"] = trial.optimizer.weight_decay > 0
    return json.dumps(fields, sort_keys=True)


@dataclass(slots=True)
class Member:
    """One admitted trial."""

    course: Course
    plan: list[Planned]
    dropout: torch.Generator
    products: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Param group to its lr x decay and the step since which it has been so."""
    norms: dict[int, dict[str, list[Any]]] = field(default_factory=dict)
    """Parameter to the norms that a schedule of norms holds it to."""

    def __post_init__(self) -> None:
        """No step has been followed yet."""
        self.products = dict.fromkeys((self.group(planned) for planned in self.plan), (math.nan, 0))

    def group(self, planned: Planned) -> str:
        """The param group that a parameter is in."""
        return group_key(planned, self.course.trial.optimizer)

    def groups(self) -> dict[str, Planned]:
        """Every param group, with one of its parameters."""
        return {self.group(planned): planned for planned in self.plan}


def dropout_states(generator: torch.Generator) -> list[Tensor]:
    """What a snapshot holds of a trial's dropout: the states of a CPU's generator, and of its device's where that is another."""
    others = [] if generator.device.type == "cpu" else [torch.Generator().manual_seed(0).get_state()]
    return [*others, generator.get_state()]


class Bank:
    """What the rows share: the model's computation, the roles of its parameters, and the stacks of all tensors."""

    def __init__(self, trial: TrialSpec, course: Course, model: nn.Module, rows: int, arithmetic: str) -> None:
        self.key = fusion_key(trial)
        self.shell = model
        self.device, self.precision = course.data.train_images.device, trial.precision
        self.loss, self.loss_name = course.loss, trial.loss
        self.roles = roles_on(model, course.data.train_images, trial.model.places)
        self.arithmetic = _arithmetic(model, arithmetic)
        self.estimates = any(isinstance(module, _NormBase) and module.track_running_stats for module in model.modules())
        state = model.state_dict(keep_vars=True)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = [name for name in state if name in trained]
        self.index = {name: index for index, name in enumerate(self.names)}
        self.step = _step_of_rows(model, self.roles)
        rows += 1  # the parking place
        self.trained = Stack({name: state[name].detach() for name in self.names}, rows)
        self.fixed = Stack({name: value.detach() for name, value in state.items() if name not in trained}, rows)
        self.constraint = trial.optimizer.constraint.model_dump()
        plan = decay_plan(self.roles, trial.optimizer)
        self.held = [self.index[planned.parameter.name] for planned in plan if planned.constrained and planned.parameter.name in self.index]
        self.rules = {planned.parameter.name: rule_of(planned, trial.optimizer) for planned in plan}
        kinds = dict.fromkeys(kind for rule in self.rules.values() for kind in MOMENTS[rule])
        self.moments = {kind: self._moments(kind, rows) for kind in kinds}
        self.initial = Stack(self.trained.row(0), rows)
        """Where every parameter began: what decay pulls to under `target: init`, and what the rotational constraint and boxes read."""
        self.squares = {index: self._squares(index) for index in self.held if self.constraint["name"] == "rotational"}
        aux = frozenset(self.index[planned.parameter.name] for planned in plan if planned.aux and planned.parameter.name in self.index)
        self.how = Step(trial.optimizer.rule, trial.optimizer.form, trial.optimizer.nesterov, self.constraint, frozenset(self.held), aux)
        self.order = [role for role in self.roles if role.name in self.index]

    def _moments(self, kind: str, rows: int) -> Stack:
        """One moment of every parameter whose rule remembers it."""
        return Stack({name: value for name, value in self.trained.row(0).items() if kind in MOMENTS[self.rules[name]]}, rows)

    def padded(self, trials: int) -> int:
        """The rows to train for so many trials."""
        return max(FEWEST_ROWS, -(-trials // self.step) * self.step)

    def autocast(self) -> AbstractContextManager[object]:
        """What the model is run in."""
        # Every weight is read once in a step, so that nothing would be found in a cache, which recorded steps must not have.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False) if self.precision == "bf16" else nullcontext()

    def _squares(self, index: int) -> Tensor:
        """The running mean squares of updates that the rotational constraint keeps of one weight."""
        weights = self.trained.tensors[self.names[index]]
        return torch.zeros_like(torch.func.vmap(lambda one: norms(one, self.constraint["granularity"]))(weights))

    def load(self, row: int, state: Mapping[str, Tensor], member: Member) -> None:
        """Begins a trial in a row: nothing of the row's past is left."""
        values = {name: value.detach() for name, value in state.items()}
        self.trained.load(row, values)
        self.fixed.load(row, values)
        self.initial.load(row, values)
        for moments in self.moments.values():
            moments.clear(row)
        for square in self.squares.values():
            square[row].zero_()
        if self.constraint["name"] == "norm_schedule":
            found = recorded_norms(self.constraint["trace"], member.plan)
            member.norms = {self.index[name]: recorded for name, recorded in found.items()}

    def restore(self, row: int, member: Member, snapshot: Snapshot) -> None:
        """Puts a row where a snapshot stands."""
        state = snapshot.state
        self.trained.load(row, state["model"])
        self.fixed.load(row, state["model"])
        for name, moments in state["moments"].items():
            for kind, stack in self.moments.items():
                if kind in moments:
                    stack.tensors[name][row].copy_(moments[kind])
            if "square" in moments:
                self.squares[self.index[name]][row].copy_(moments["square"])
        member.dropout.set_state(state["dropout"][-1])
        products = [(float(product), int(since)) for product, since in state["tracer"]["products"]]
        member.products = dict(zip(member.products, products, strict=True))

    def move(self, source: int, target: int) -> None:
        """Copies a row over another."""
        for stack in (self.trained, self.fixed, self.initial, *self.moments.values()):
            stack.move(source, target)
        for square in self.squares.values():
            square[target].copy_(square[source])

    def state(self, row: int) -> dict[str, Tensor]:
        """One trial's parameters and buffers, as its model's state_dict has them."""
        values = {**self.trained.row(row), **self.fixed.row(row)}
        return {name: values[name].cpu() for name in self.shell.state_dict()}

    def remembered(self, row: int, member: Member) -> dict[str, dict[str, Any]]:
        """What the optimizer remembers of each parameter, as `moments.py` names it."""
        kinds = {kind: stack.row(row) for kind, stack in self.moments.items()}
        initial = self.initial.row(row)
        anchored = {planned.parameter.name for planned in member.plan if planned.anchor == "init"}
        found: dict[str, dict[str, Any]] = {name: {kind: values[name] for kind, values in kinds.items() if name in values} for name in self.names}
        for name in anchored & set(self.names):
            found[name]["initial"] = initial[name]
        for index in self.held:
            found[self.names[index]] |= self._of_constraint(index, row, initial[self.names[index]])
        return found

    def _of_constraint(self, index: int, row: int, initial: Tensor) -> dict[str, Any]:
        match self.constraint["name"]:
            case "rotational":
                return {"square": self.squares[index][row].clone(), "initial_norm": norms(initial, self.constraint["granularity"])}
            case "volumization":
                return {"bound": self.constraint["bound"] * float(initial.abs().max())}
        return {}


def _step_of_rows(model: nn.Module, roles: Sequence[ParameterRole]) -> int:
    """The rows must be a multiple of this for their channels to fill vector registers, as far as `WIDEST_STEP` goes.

    Kernels take the channels that are left over another way, which rounds otherwise: a trial's bits would depend on the number of rows.
    """
    gains = {role.name for role in roles if role.role is Role.GAIN}
    channels = [len(parameter) for name, parameter in model.named_parameters() if parameter.ndim == 4 or (name in gains and parameter.ndim)]
    return min(WIDEST_STEP, VECTOR // math.gcd(VECTOR, *channels))


def _arithmetic(model: nn.Module, wanted: str) -> Arithmetic:
    if wanted == "looped":
        return Looped(model)
    try:
        return Converted(model)
    except Exception:  # torch.fx raises many types; what it cannot read is looped over, unless it was asked for by name
        if wanted == "converted":
            raise
        return Looped(model)
