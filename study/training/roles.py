"""Roles: what every parameter of a model is, read from the computation and from the torch layers that hold it.

    weight      a linear layer's, or a bare parameter in a matrix product
    gain        multiplies what a norm divided by its scale; `places.py` says where it stands
    shift       added behind a gain
    bias        a linear layer's
    scale       any other parameter that multiplies activations: LayerScale, PReLU
    embedding   tables, and any other parameter that is added or joined to activations: positions, class tokens

Names and shapes of parameters are never evidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from study.errors import ModelError, UnclaimedParameter, UnknownPlace
from study.optimizer import PLACES
from study.training.graph import Graph
from study.training.operations import EMBEDDINGS
from study.training.owners import NORMS, gain_of_weight_norm
from study.training.places import UNKNOWN, following_places, gain_and_shift_places, hidden_weights, scale_invariant_weights
from study.training.recording import Example, record
from study.training.symbolic import trace

HOW_TO_GIVE = "study.gain_places(model, (inputs,))"


class Role(StrEnum):
    """What a parameter does."""

    WEIGHT = "weight"
    GAIN = "gain"
    SHIFT = "shift"
    BIAS = "bias"
    SCALE = "scale"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class ParameterRole:
    """One parameter of a model."""

    name: str
    role: Role
    layer: str
    """The module that it belongs to."""
    place: str = ""
    """Of gains and shifts: where their norm stands. Of weights: where the norm stands that takes their output, if one does."""
    scale_invariant: bool = False
    """Of weights: whether scaling it leaves the model's output unchanged in train mode."""
    hidden: bool = False
    """Of weights: whether another weight layer takes what it puts out, so that it is not the output layer's."""


def gain_places(model: nn.Module, example: Example | None = None, *, places: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where every norm gain of a model stands: `stem inner last down final stream`.

    A gain is the parameter that multiplies something whose scale was divided out: by a norm of torch's, as a module or a
    function, or by a computation of which it can be shown that scaling its input changes nothing. Names, shapes and the types
    of other people's modules are no evidence. A parameter p that enters as 1 + p is a scale, not a gain.

    Args:
        model: Any module.
        example: Inputs that the model runs on: a tuple, or a dict of keyword inputs. Needed where the forward pass depends on
            values and torch.fx cannot read it. The run changes nothing.
        places: Places of gains that cannot be known, by shell-style pattern of the parameter's name.

    Returns:
        `{"layer1.0.norm2.weight": "last", ...}` in the order of the model's parameters.

    Raises:
        UnknownPlace: if a place cannot be known and is not given.
        UnclaimedParameter: if a parameter belongs to no role.
        ModelError: if the model does not run on the example, or has parameters without a shape yet.
    """
    return {role.name: role.place for role in parameter_roles(model, places, example=example) if role.role is Role.GAIN}


def parameter_roles(model: nn.Module, places: Mapping[str, str] | None = None, *, example: Example | None = None) -> list[ParameterRole]:
    """The role of every parameter, each claimed exactly once, in the model's own order.

    A tied parameter is claimed once, under its first name, as what it is there. A frozen one has its role like any other.

    Raises:
        UnclaimedParameter: if a parameter belongs to no role.
        UnknownPlace: if a gain's place cannot be known and no pattern names it.
        ModelError: if the model does not run on the example, or has parameters without a shape yet.
    """
    found, failure = _found(model, example)
    for name, role in found.items():
        if role is None:
            raise _unclaimed(model, name, failure)
    return _with_known_places([role for role in found.values() if role is not None], places or {}, failure, needs_example=example is None)


def visible_roles(model: nn.Module, *, example: Example | None = None) -> tuple[list[ParameterRole], str]:
    """The roles that can be seen, for those who only look on: parameters without one are left out, places may be `unknown`.

    Returns:
        The roles, and why the computation could not be read; empty where it could. Without it no weight is known to be scale-invariant.

    Raises:
        ModelError: if the model does not run on the example, or has parameters without a shape yet.
    """
    found, failure = _found(model, example)
    return [role for role in found.values() if role is not None], failure


def _found(model: nn.Module, example: Example | None) -> tuple[dict[str, ParameterRole | None], str]:
    """Every parameter's role, None where there is none; and why the computation could not be read, if it could not."""
    _check_initialized(model)
    graph, failure = read(model, example)
    where = {**following_places(graph), **gain_and_shift_places(graph)} if graph else {}
    invariant, hidden = (scale_invariant_weights(graph), hidden_weights(graph)) if graph else (frozenset[str](), frozenset[str]())
    modules = dict(model.named_modules())
    found = {name: _role(name, modules, where, invariant, graph) for name, _ in model.named_parameters()}
    return {name: role and replace(role, hidden=role.role is Role.WEIGHT and name in hidden) for name, role in found.items()}, failure


def read(model: nn.Module, example: Example | None) -> tuple[Graph | None, str]:
    """The computation of a model, from a run on an example if there is one; or why it could not be read.

    Raises:
        ModelError: if the model does not run on the example.
    """
    try:
        return (trace(model) if example is None else record(model, example)), ""
    except ModelError:
        raise
    except Exception as error:  # torch.fx raises many types, and the user's own forward any
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _check_initialized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"the parameter {name!r} has no shape yet", where="model", remedy="run the model once on a batch first")


def _role(
    name: str, modules: Mapping[str, nn.Module], where: Mapping[str, str], invariant: frozenset[str], graph: Graph | None
) -> ParameterRole | None:
    path = name.rpartition(".")[0]
    layer = path.partition(".parametrizations.")[0]
    role = _role_by_owner(name, modules) or (_role_in(name, graph) if graph else None)
    if graph and _role_by_owner(name, modules) is not Role.EMBEDDING:
        role = _role_as_norm(name, graph) or role
    match role:
        case Role.GAIN | Role.SHIFT:
            return ParameterRole(name, role, layer, where.get(name, UNKNOWN))
        case Role.WEIGHT:
            bare = _role_by_owner(name, modules) is None or isinstance(modules[path], nn.MultiheadAttention | nn.RNNBase)
            return ParameterRole(name, role, name if bare else layer, where.get(name, ""), name in invariant)
        case Role.SCALE | Role.EMBEDDING if _role_by_owner(name, modules) is None:
            return ParameterRole(name, role, name)
        case Role():
            return ParameterRole(name, role, layer)
    return None


def _unclaimed(model: nn.Module, name: str, failure: str) -> UnclaimedParameter:
    owner, shape = type(model.get_submodule(name.rpartition(".")[0])).__name__, list(model.get_parameter(name).shape)
    if failure:
        reason, remedy = f"; the computation could not be read ({failure})", f"give an example of its inputs: {HOW_TO_GIVE}"
    else:
        reason, remedy = "", "hold it in a torch.nn layer, or add it to or multiply it with an activation in forward"
    return UnclaimedParameter(f"no role claims the parameter {name!r} (shape {shape}, of a {owner}){reason}", where="model", remedy=remedy)


def _role_by_owner(name: str, modules: Mapping[str, nn.Module]) -> Role | None:
    """What the type of the torch module that holds a parameter says of it."""
    path, _, own = name.rpartition(".")
    layer, _, parametrized = path.partition(".parametrizations.")
    if parametrized:
        if own == "original0" and gain_of_weight_norm(modules[layer]) is not None:
            return Role.GAIN
        return Role.BIAS if parametrized == "bias" else Role.WEIGHT
    module = modules[path]
    if isinstance(module, NORMS):
        return {"weight": Role.GAIN, "bias": Role.SHIFT}.get(own)
    match module:
        case nn.Embedding() | nn.EmbeddingBag():
            return Role.EMBEDDING
        case nn.MultiheadAttention() | nn.RNNBase():
            return Role.BIAS if "bias" in own else Role.WEIGHT
        case nn.Linear() | nn.Bilinear() | nn.modules.conv._ConvNd():
            return {"weight": Role.WEIGHT, "bias": Role.BIAS}.get(own)
        case nn.PReLU():
            return Role.SCALE
    return None


def _role_as_norm(name: str, graph: Graph) -> Role | None:
    """Gain or shift, if a norm of the computation has the parameter as such."""
    for node in graph.nodes:
        if node.is_norm and name in (node.gain, node.shift):
            return Role.GAIN if name == node.gain else Role.SHIFT
    return None


def _role_in(name: str, graph: Graph) -> Role | None:
    """What a parameter does first in the computation.

    One that is added or joined to activations is an embedding; one that multiplies them element by element is a scale.
    """
    pending = [node.index for node in graph.nodes if node.parameter == name]
    for node in graph.nodes:
        if name in node.weights:
            return Role.EMBEDDING if node.op in EMBEDDINGS else Role.WEIGHT
        if name in node.biases:
            return Role.BIAS
    while pending:
        for user in graph.users(pending.pop(0)):
            if user.is_data or user.op == "output":
                if user.is_product or user.is_norm or user.op == "prelu":
                    return Role.SCALE
                if user.is_add or len(user.inputs) > 1:
                    return Role.EMBEDDING
            pending.append(user.index)
    return None


def _with_known_places(roles: Sequence[ParameterRole], places: Mapping[str, str], failure: str, *, needs_example: bool) -> list[ParameterRole]:
    for pattern in places:
        if not any(role.role is Role.GAIN and fnmatchcase(role.name, pattern) for role in roles):
            raise ModelError(
                f"matches no gain of the model (got {pattern!r})", where="model.places", remedy="use a pattern of a gain's name, see `study plan`"
            )
    named = [_named(role, places) for role in roles]
    unknown = [role.name for role in named if role.role is Role.GAIN and role.place == UNKNOWN]
    if unknown:
        reason = f"the computation could not be read ({failure})" if failure else "they stand where no rule applies, or in several places"
        give = f"give an example of its inputs ({HOW_TO_GIVE}), or " if needs_example else ""
        raise UnknownPlace(
            f"the places of {len(unknown)} gains are not known, {reason}: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}",
            where="model",
            remedy=f"{give}name them in model.places, for example {{{unknown[0]!r}: last}}; places are {', '.join(PLACES)}",
        )
    return named


def _named(role: ParameterRole, places: Mapping[str, str]) -> ParameterRole:
    if role.role not in (Role.GAIN, Role.SHIFT):
        return role
    stem = role.name.rpartition(".")[0]
    for pattern, place in places.items():
        if fnmatchcase(role.name, pattern) or fnmatchcase(f"{stem}.weight", pattern):
            return ParameterRole(role.name, role.role, role.layer, place)
    return role
