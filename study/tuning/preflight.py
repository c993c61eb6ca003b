"""Preflight: builds the trial once before anything starts, so that what cannot work is said at once; the audit of `study plan`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from study.errors import InputError
from study.results.export_plan import ModelPlan, PlanRow
from study.space import arm_label
from study.spec import ResourcesSpec, StudySpec
from study.training.compare import Comparison, compare
from study.training.data import Data, load_data
from study.training.decay import Planned, absent_places, decay_plan, plan_hash
from study.training.losses import loss_function
from study.training.models import build_model
from study.training.plans import roles_on
from study.training.roles import ParameterRole, Role
from study.trial import TrialSpec
from study.tuning.points import size_warnings
from study.tuning.starting import is_alone


@dataclass(frozen=True, slots=True)
class Audit:
    """What a spec comes down to on its own model and data."""

    trials: int
    replicates: int
    """At most."""
    arms: tuple[str, ...]
    steps_per_trial: int
    plan: tuple[Planned, ...]
    """Decay of every parameter, under the base trial's policy."""
    compare: Mapping[str, Comparison]
    """What the libraries that were asked for do by default, by their names."""
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The JSON document of `study plan`."""
        parameters = [
            {
                "name": planned.parameter.name,
                "role": str(planned.parameter.role),
                "place": planned.parameter.place,
                "rate": planned.rate,
                "anchor": planned.anchor,
                "constrained": planned.constrained,
                "group": planned.group,
            }
            for planned in self.plan
        ]
        steps = self.steps_per_trial
        forecast = {"steps_per_trial": steps, "steps": steps * self.trials, "replicates": self.replicates, "replicate_steps": steps * self.replicates}
        return {
            "trials": self.trials,
            "arms": list(self.arms),
            "forecast": forecast,
            "parameters": parameters,
            "plan_hash": plan_hash(self.plan),
            "compare": {library: each.document() for library, each in self.compare.items()},
            "warnings": list(self.warnings),
        }


def audit(spec: StudySpec, libraries: Iterable[str] | None = ()) -> Audit:
    """Builds data and model of the base trial and holds every policy that the study may draw against them.

    Args:
        libraries: Whose default decay is set beside the base trial's, out of `study.training.compare.LIBRARIES`; None for all.

    Raises:
        InputError: if data, model and policies do not fit together, or a library is not known.
    """
    trial = spec.trial
    loss_function(trial.loss)
    data, model, roles = _built(trial)
    steps = _steps_per_epoch(data, trial) * trial.schedule.epochs
    plan = tuple(decay_plan(roles, trial.optimizer))
    return Audit(
        spec.search.trials,
        spec.replicate.top * spec.replicate.seeds * len(spec.arms),
        tuple(arm_label(arm) for arm in spec.arms),
        steps,
        plan,
        compare(model, plan, trial.optimizer.weight_decay, libraries),
        tuple(_warnings(spec, roles, steps)),
    )


def check_room(resources: ResourcesSpec) -> None:
    """Checks that this machine has what a trial reserves, for which Ray would wait for ever; a cluster may get it yet.

    Raises:
        InputError: if it has less.
    """
    if not is_alone():
        return
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if resources.engine != "fused" and resources.cpus_per_trial > cores:
        message = f"a trial asks for more cores than the {cores} of this machine (got {resources.cpus_per_trial})"
        raise InputError(
            message, where="resources.cpus_per_trial", remedy=f"use at most {cores}, or run it on a cluster: RAY_ADDRESS, `study submit`"
        )
    if resources.gpus_per_trial and max(1.0, resources.gpus_per_trial) > gpus:
        message = f"a trial asks for a GPU, of which PyTorch sees {gpus} on this machine (got {resources.gpus_per_trial:g})"
        remedy = "set it to 0 to train on the CPU, or run it on a cluster: RAY_ADDRESS, `study submit`; `study doctor` looks for GPUs"
        raise InputError(message, where="resources.gpus_per_trial", remedy=remedy)


def model_plan(trial: TrialSpec) -> ModelPlan:
    """What decay does to each parameter of a trial's model, for exports.

    Raises:
        InputError: if data and model do not fit together.
    """
    data, model, roles = _built(trial)
    plan = decay_plan(roles, trial.optimizer)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    spared = {library: frozenset(each.exempt) for library, each in compare(model, plan, trial.optimizer.weight_decay).items()}
    rows = (
        PlanRow(
            planned.parameter.name,
            str(planned.parameter.role),
            planned.rate,
            planned.anchor,
            planned.constrained,
            planned.parameter.name in frozen,
            frozenset(library for library, names in spared.items() if planned.parameter.name in names),
        )
        for planned in plan
    )
    return ModelPlan(tuple(rows), _steps_per_epoch(data, trial))


def _built(trial: TrialSpec) -> tuple[Data, nn.Module, list[ParameterRole]]:
    data = load_data(trial.data)
    model = build_model(trial.model, data.shape, data.num_classes)
    return data, model, roles_on(model, data.train_images, trial.model.places)


def _steps_per_epoch(data: Data, trial: TrialSpec) -> int:
    return len(data.train_labels) // trial.data.batch_size


def _warnings(spec: StudySpec, roles: list[ParameterRole], steps: int) -> list[str]:
    found = []
    if not any(path.startswith("model.") for path in spec.space):
        for policy in _policies(spec, spec.trial):
            if absent := absent_places(roles, policy):
                found.append(f"optimizer.gamma: {policy}: the model has no gain at {' or '.join(absent)}; the rest of the policy is applied")
    found += size_warnings(spec)
    if not any(role.scale_invariant for role in roles if role.role is Role.WEIGHT):
        found.append(
            "no weight of this model is scale-invariant: its effective learning rates have no expected rotation, medians are over all weights"
        )
    if steps <= 5 * spec.trial.trace.every:
        found.append(f"trace.every {spec.trial.trace.every} samples at most {steps // spec.trial.trace.every} of a trial's {steps} steps; lower it")
    return found


def _policies(spec: StudySpec, trial: TrialSpec) -> list[str]:
    axis = spec.space.get("optimizer.gamma")
    return [str(choice) for choice in axis.choices or ()] if axis else [trial.optimizer.gamma]
