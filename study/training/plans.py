"""Plans of whole trials: the roles of a trial's model are read once, whatever else its trials vary."""

from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor, nn

from study.errors import UnclaimedParameter, UnknownPlace
from study.training.data import load_data
from study.training.decay import decay_plan, plan_hash
from study.training.models import build_model
from study.training.roles import ParameterRole, parameter_roles
from study.trial import DataSpec, ModelSpec, TrialSpec

EXAMPLE_IMAGES = 4
"""Images that a model is run on where its computation cannot be read without."""


def roles_on(model: nn.Module, images: Tensor, places: Mapping[str, str]) -> list[ParameterRole]:
    """The role of every parameter, read from the model alone or, where that is not enough, from a run on some of its images.

    Raises:
        ModelError: as in `parameter_roles`.
    """
    try:
        return parameter_roles(model, places)
    except (UnknownPlace, UnclaimedParameter):
        return parameter_roles(model, places, example=(images[:EXAMPLE_IMAGES],))


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
    built = build_model(network, images.shape, images.num_classes)
    return tuple(roles_on(built, images.train_images, network.places))
