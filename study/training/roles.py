"""Roles: what every parameter of a model is, and where every norm gain stands, read from the computation.

    place    which norm                                             in a post-activation ResNet
    down     its output is a projection shortcut's addend           shortcut.1
    last     its output is a branch's addend                        norm2 (bottleneck: norm3)
    stream   it normalizes a residual sum and its output goes on    none (post-LN transformers)
    stem     it writes a stream outside any branch                  the net's first norm
    final    outside every branch, no norm after it                 none (pre-activation nets, pre-LN transformers)
    inner    inside a branch, before another weight of it           norm1 (bottleneck: norm1, norm2)

The first match wins. Without residual sums the last norm before the output is `final` and the others are `inner`.
Names and shapes of parameters are never evidence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from study.errors import ModelError, UnclaimedParameter, UnknownPlace
from study.training.graph import Graph, Node, is_norm, is_weight_normed, trace
from study.trial import PLACES

UNKNOWN = "unknown"
"""Place of a gain that the computation does not tell."""


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


@dataclass(frozen=True, slots=True)
class ResidualSum:
    """One `shortcut + branch`, as indices of nodes."""

    sum: int
    start: int
    """The last node that both addends are computed from."""
    branch: int
    shortcut: int


def gain_places(model: nn.Module, example: tuple[Any, ...] | None = None, *, places: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where every norm gain of a model stands: `stem inner last down final stream`.

    Args:
        model: Any module whose forward pass torch.fx can read.
        example: Unused where the forward pass can be read symbolically.
        places: Places of gains that cannot be known, by shell-style pattern of the parameter's name.

    Returns:
        `{"layer1.0.norm2.weight": "last", ...}` in the order of the model's parameters.

    Raises:
        UnknownPlace: if a place cannot be known and is not given.
    """
    del example
    return {role.name: role.place for role in parameter_roles(model, places) if role.role is Role.GAIN}


def parameter_roles(model: nn.Module, places: Mapping[str, str] | None = None) -> list[ParameterRole]:
    """The role of every parameter, each claimed exactly once, in the model's own order.

    Raises:
        UnclaimedParameter: if a parameter belongs to no role.
        UnknownPlace: if a gain's place cannot be known and no pattern names it.
    """
    try:
        graph = trace(model)
    except Exception as error:  # torch.fx raises many types, and the user's own forward any
        graph, failure = None, f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        failure = ""
    where = {**following_places(graph), **norm_places(graph)} if graph else {}
    invariant = scale_invariant_modules(graph) if graph else frozenset()
    modules = dict(model.named_modules())
    found: list[ParameterRole] = []
    for name, parameter in model.named_parameters():
        found.append(_role(name, parameter, modules, where, invariant, graph))
    return _with_known_places(found, places or {}, failure)


def _role(
    name: str, parameter: Tensor, modules: Mapping[str, nn.Module], where: Mapping[str, str], invariant: frozenset[str], graph: Graph | None
) -> ParameterRole:
    path, _, own = name.rpartition(".")
    if path.endswith(".parametrizations.weight"):
        layer = path.removesuffix(".parametrizations.weight")
        if is_weight_normed(modules[layer]):
            if own == "original0":
                return ParameterRole(name, Role.GAIN, layer, where.get(layer, UNKNOWN))
            return ParameterRole(name, Role.WEIGHT, layer, where.get(layer, UNKNOWN), scale_invariant=True)
        return ParameterRole(name, Role.WEIGHT, layer)
    module = modules[path]
    if is_norm(module) and not is_weight_normed(module):
        return ParameterRole(name, Role.GAIN if own == "weight" else Role.SHIFT, path, where.get(path, UNKNOWN))
    match module:
        case nn.Embedding() | nn.EmbeddingBag():
            return ParameterRole(name, Role.EMBEDDING, path)
        case nn.MultiheadAttention():
            if own.endswith("bias") or own.startswith("bias"):
                return ParameterRole(name, Role.BIAS, path)
            return ParameterRole(name, Role.WEIGHT, name)
        case nn.Linear() | nn.Bilinear() | nn.modules.conv._ConvNd():
            if own == "bias":
                return ParameterRole(name, Role.BIAS, path)
            return ParameterRole(name, Role.WEIGHT, path, where.get(path, ""), path in invariant)
        case nn.PReLU():
            return ParameterRole(name, Role.SCALE, path)
    role = _role_of_bare(name, graph) if graph else None
    if role is None:
        raise UnclaimedParameter(
            f"no role claims the parameter {name!r} (shape {list(parameter.shape)}, of a {type(module).__name__})",
            where="model",
            remedy="hold it in a torch.nn layer, or add it to or multiply it with an activation in forward",
        )
    return ParameterRole(name, role, name)


def _role_of_bare(name: str, graph: Graph) -> Role | None:
    """A parameter that is added or joined to activations is an embedding; one that multiplies them is a scale."""
    pending = [node for node in graph.nodes if node.parameter == name]
    while pending:
        for user in graph.users(pending.pop().index):
            if user.is_product:
                return Role.SCALE
            if user.is_add or len(user.inputs) > 1:
                return Role.EMBEDDING
            pending.append(user)
    return None


def _with_known_places(roles: Sequence[ParameterRole], places: Mapping[str, str], failure: str) -> list[ParameterRole]:
    for pattern in places:
        if not any(role.role is Role.GAIN and fnmatchcase(role.name, pattern) for role in roles):
            raise ModelError(
                f"matches no gain of the model (got {pattern!r})", where="model.places", remedy="use a pattern of a gain's name, see `study plan`"
            )
    named = [_named(role, places) for role in roles]
    unknown = [role.name for role in named if role.role is Role.GAIN and role.place == UNKNOWN]
    if unknown:
        reason = f"the computation could not be read ({failure})" if failure else "they stand where no rule applies"
        raise UnknownPlace(
            f"the places of {len(unknown)} gains are not known, {reason}: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}",
            where="model",
            remedy=f"name them in model.places, for example {{{unknown[0]!r}: last}}; places are {', '.join(PLACES)}",
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


def norm_places(graph: Graph) -> dict[str, str]:
    """The place of every norm module in a graph, `unknown` where no rule applies."""
    sums = list(residual_sums(graph))
    return {node.module: _place(node, sums, graph) for node in graph.nodes if node.is_norm}


def following_places(graph: Graph) -> dict[str, str]:
    """For every weight layer whose output a norm takes directly, the place of that norm."""
    places = norm_places(graph)
    sources = {graph.source(node.inputs[0]): places[node.module] for node in graph.nodes if node.is_norm and not node.is_weight and node.inputs}
    return {node.module: sources[node.index] for node in graph.nodes if node.is_weight and node.index in sources}


def residual_sums(graph: Graph) -> Iterator[ResidualSum]:
    """Every addition of a branch to the shortcut around it."""
    found: list[ResidualSum] = []
    for node in graph.nodes:
        if node.is_add and len(node.inputs) == 2 and (residual := _residual(node, graph, found)):
            found.append(residual)
            yield residual


def _residual(node: Node, graph: Graph, before: Sequence[ResidualSum]) -> ResidualSum | None:
    left, right = node.inputs
    common = graph.ancestors[left] & graph.ancestors[right]
    if not common:
        return None
    start = common.bit_length() - 1
    for shortcut, branch in ((left, right), (right, left)):
        if any(graph.source(shortcut) == earlier.sum and earlier.start == start for earlier in before):
            return ResidualSum(node.index, start, branch, shortcut)
    weights = {addend: sum(step.is_weight for step in graph.between(start, addend)) for addend in (left, right)}
    if weights[left] == weights[right]:
        return None
    shortcut, branch = sorted((left, right), key=weights.__getitem__)
    return ResidualSum(node.index, start, branch, shortcut)


def _place(norm: Node, sums: Sequence[ResidualSum], graph: Graph) -> str:
    index = norm.index
    if not sums:
        return "inner" if _norm_follows(index, graph) else "final"
    if any(graph.source(residual.shortcut) == index > residual.start and _has_weight(residual, graph) for residual in sums):
        return "down"
    if any(graph.source(residual.branch) == index for residual in sums):
        return "last"
    around = [residual for residual in sums if any(node.index == index for node in graph.between(residual.start, residual.branch))]
    if around:
        innermost = max(around, key=lambda residual: residual.start)
        later = (
            node.is_weight and node.index != index and graph.depends(node.index, index) for node in graph.between(innermost.start, innermost.branch)
        )
        return "inner" if any(later) else UNKNOWN
    flows_into_sum = any(graph.depends(residual.sum, index) for residual in sums)
    normalized = next((residual for residual in sums if residual.sum == graph.source(norm.inputs[0])), None)
    if normalized and (flows_into_sum or graph.nodes[graph.source(normalized.start)].is_norm):
        return "stream"
    if flows_into_sum:
        return "stem"
    return UNKNOWN if _norm_follows(index, graph) else "final"


def _has_weight(residual: ResidualSum, graph: Graph) -> bool:
    return any(node.is_weight for node in graph.between(residual.start, residual.shortcut))


def _norm_follows(index: int, graph: Graph) -> bool:
    return any(node.is_norm and node.index != index and graph.depends(node.index, index) for node in graph.nodes)


def scale_invariant_modules(graph: Graph) -> frozenset[str]:
    """The weight layers that only norms see: scaling their weight leaves the model's output unchanged in train mode.

    A bias is no obstacle in front of a BatchNorm, which subtracts it again.
    """
    found = set()
    for node in graph.nodes:
        if node.is_weight and node.module and (node.is_norm or _ends_in_norms(node.index, node.has_bias, graph)):
            found.add(node.module)
    return frozenset(found)


def _ends_in_norms(index: int, biased: bool, graph: Graph) -> bool:
    if index in graph.outputs:
        return False
    users = list(graph.users(index))
    return bool(users) and all(_normalizes(user, biased, graph) for user in users)


def _normalizes(user: Node, biased: bool, graph: Graph) -> bool:
    if user.is_norm and not user.is_weight:
        return user.is_batch_norm or not biased
    if biased and user.carries is None:
        return False
    return user.homogeneous and len(user.inputs) == 1 and _ends_in_norms(user.index, biased, graph)
