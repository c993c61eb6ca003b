"""Plans of whole trials: the roles of a trial's model are read once, whatever else its trials vary."""

from functools import lru_cache

from study.training.data import load_data
from study.training.decay import decay_plan, plan_hash
from study.training.models import build_model
from study.training.roles import ParameterRole, parameter_roles
from study.trial import DataSpec, ModelSpec, TrialSpec


def plan_hash_of(trial: TrialSpec) -> str:
    """What tells apart the decay plans of trials: the hash of rate and anchor of every parameter of the trial's model.

    Raises:
        InputError: if the trial's data or model cannot be built.
    """
    roles = _roles(trial.data.model_dump_json(), trial.model.model_dump_json())
    return plan_hash(decay_plan(roles, trial.optimizer))


@lru_cache
def _roles(data: str, model: str) -> tuple[ParameterRole, ...]:
    images, network = load_data(DataSpec.model_validate_json(data)), ModelSpec.model_validate_json(model)
    return tuple(parameter_roles(build_model(network, images.shape, images.num_classes), network.places))
