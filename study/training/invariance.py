"""Invariance: which parameters the output does not see the scale of, claimed from the computation and proven on numbers.

    kind             parameters                                              why
    weight           one weight in front of norms                            each norm divides its scale out
    gain and shift   of a norm, only homogeneous maps up to the next norms   jointly they are such a weight
    stream           everything that writes one stream that norms read       stem and every last of a ResNet's first stage

A claim is proven when scaling by 3 moves no output by more than 1e-10 of the largest, on a float64 copy in train mode whose
norms have eps 1e-12. Where an eps cannot be set, what it moves must fall 50-fold from the scales 1 and 3 to 10 and 30.

Source: science/effective_lr.md, 2.3 (joint invariances); van Laarhoven, L2 Regularization versus Batch and Weight
Normalization, section 2, arXiv:1706.05350.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from study.errors import ModelError
from study.training import operations
from study.training.graph import Graph, Node
from study.training.places import ends_in_norms, scale_invariant_weights
from study.training.recording import Example, inputs_of, tensors_in, unchanged
from study.training.roles import read

EPS = 1e-12
"""What every norm adds to its variance, where it lets us say."""

TOLERANCE = 1e-10
"""Largest move of an output, as a share of the largest output, that counts as none in float64."""

FALL = 50.0
"""How much smaller a move must be at ten times the scale if only an eps is to blame; it falls 100-fold then."""


@dataclass(frozen=True, slots=True)
class InvariantGroup:
    """Parameters whose joint scale the output does not see."""

    kind: str
    """`weight`, `gain and shift` or `stream`."""
    parameters: tuple[str, ...]
    moved: float
    """Largest move of an output from scale 1 to 3, as a share of the largest output."""
    moved_at_ten: float | None
    """The same from scale 10 to 30, where the first was too large to be rounding."""
    proven: bool


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """Every group that the computation calls scale-invariant, with its proof."""

    groups: tuple[InvariantGroup, ...]

    @property
    def proven(self) -> bool:
        """Whether every claim holds."""
        return all(group.proven for group in self.groups)


def check_scale_invariance(model: nn.Module, example: Example) -> InvarianceReport:
    """Proves on numbers which parameters' scale a model's output does not see in train mode; the model is left as it is.

    Args:
        model: Any module.
        example: Inputs that it runs on in train mode: a tuple, or a dict of keyword inputs.

    Raises:
        ModelError: if the computation cannot be read, or the model does not run on the example.
    """
    graph, failure = read(model, example)
    if graph is None:
        raise ModelError(f"the computation could not be read ({failure})", where="model", remedy="leave compiled code out of it")
    exact = copy.deepcopy(model).double()
    _shrink_eps(exact)
    parameters = dict(exact.named_parameters())
    outputs = _Outputs(exact, example)
    return InvarianceReport(tuple(_checked(kind, names, [parameters[name] for name in names], outputs) for kind, names in invariant_groups(graph)))


def invariant_groups(graph: Graph) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The kind and the parameters of every group that a computation calls scale-invariant."""
    alone = scale_invariant_weights(graph)
    for name in dict.fromkeys(name for node in graph.nodes for name in node.weights if name in alone):
        yield "weight", (name,)
    seen: set[frozenset[str]] = set()
    for node in graph.nodes:
        names = None if alone & set(node.weights) and not node.is_norm else _written_with(node, graph)
        if names and frozenset(names) not in seen and not (len(names) == 1 and names[0] in alone):
            seen.add(frozenset(names))
            yield ("gain and shift" if set(names) <= {node.gain, node.shift} else "stream"), names


def _written_with(seed: Node, graph: Graph) -> tuple[str, ...] | None:
    """The parameters to scale with those of `seed` so that only norms see it; None where there are none."""
    if not _writes(seed, graph):
        return None
    closure = _Closure(graph)
    return closure.names() if closure.scale_writer(seed) and closure.spread() else None


class _Closure:
    """What must be scaled together, grown from one node along the stream that it writes."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._writers: set[int] = set()
        self._bare: set[str] = set()
        self._scaled: set[int] = set()
        self._pending: list[int] = []

    def names(self) -> tuple[str, ...] | None:
        """The parameters, if none of them is used anywhere else."""
        nodes = self._graph.nodes
        names = tuple(
            dict.fromkeys([name for index in sorted(self._writers) for name in _writes(nodes[index], self._graph) or ()] + sorted(self._bare))
        )
        elsewhere = {name for node in nodes if node.index not in self._writers and node.op != "dead" for name in _uses(node)}
        bare = {name for node in nodes if node.parameter for name in (node.parameter,) if self._is_used_unscaled(node)}
        return None if elsewhere & set(names) or bare & set(names) else names

    def scale_writer(self, node: Node) -> bool:
        """Scales the parameters of a norm, a linear layer or an embedding; whether that scales its output."""
        if not _writes(node, self._graph):
            return False
        self._writers.add(node.index)
        self._pending.append(_applied(node, self._graph))
        return True

    def spread(self) -> bool:
        """Follows what is scaled up to the norms that read it; whether all of it ends there."""
        while self._pending:
            index = self._pending.pop()
            if index in self._scaled:
                continue
            self._scaled.add(index)
            if not all(self._passes(user, index) for user in self._graph.users(index)):
                return False
        return True

    def _passes(self, user: Node, index: int) -> bool:
        if user.op == "output":
            return False
        if user.is_norm and not user.is_weight:
            return True
        if user.is_add or user.op in ("cat", "stack", "concat"):
            self._pending.append(user.index)
            return all(self._scale(before) for before in user.inputs if before != index)
        if user.is_weight and user.biases:
            return len(user.inputs) == 1 and user.op in operations.LINEAR and ends_in_norms(user.index, True, self._graph)
        if user.homogeneous:
            self._pending.append(user.index)
        return user.homogeneous

    def _scale(self, index: int) -> bool:
        """Makes a term of a sum scaled, by what writes it."""
        node = self._graph.nodes[index]
        while index not in self._scaled:
            if name := self._graph.sole_parameter(index):
                self._bare.add(name)
                return True
            writer = next((norm for norm in self._graph.nodes if norm.is_norm and norm.is_data and _applied(norm, self._graph) == index), node)
            if _writes(writer, self._graph):
                return writer.index in self._writers or self.scale_writer(writer)
            if node.is_add or node.op in ("cat", "stack", "concat"):
                self._pending.append(index)
                return all(self._scale(before) for before in node.inputs)
            data = [before for before in node.inputs if self._graph.nodes[before].is_data]
            if not node.homogeneous or node.is_weight or len(data) != 1:
                return False
            index, node = data[0], self._graph.nodes[data[0]]
        return True

    def _is_used_unscaled(self, parameter: Node) -> bool:
        """Whether a parameter that stands bare takes part in anything but the sums and gains that were scaled."""
        users, pending = list[Node](), [parameter.index]
        while pending:
            for user in self._graph.users(pending.pop()):
                (users.append(user) if user.is_data else pending.append(user.index))
        return any(user.index not in self._scaled and user.index not in self._writers for user in users)


def _uses(node: Node) -> tuple[str, ...]:
    return (*node.weights, *node.biases, *filter(None, (node.gain, node.shift)))


def _writes(node: Node, graph: Graph) -> tuple[str, ...] | None:
    """The parameters whose joint scale is the scale of a node's output."""
    if node.is_norm and not node.is_weight:
        return tuple(name for name in (node.gain, node.shift) if name) if node.gain and node.is_data else None
    if node.weight_is_normalized:
        return (node.gain, *node.biases) if node.gain else None
    if node.op in operations.EMBEDDINGS:
        return node.weights
    if node.op in operations.LINEAR and node.is_weight and len(node.weights) == 1 and len(node.inputs) <= 1:
        return (*node.weights, *node.biases)
    return None


def _applied(norm: Node, graph: Graph) -> int:
    """The node where a norm's gain is multiplied in: itself, or a product behind it."""
    index = norm.index
    while norm.is_norm and not norm.is_weight:
        users = list(graph.users(index))
        for user in users:
            if any(graph.sole_parameter(before) == norm.gain for before in user.inputs if before != index):
                return user.index
        if len(users) != 1 or users[0].op not in operations.SHAPING:
            break
        index = users[0].index
    return norm.index


def _shrink_eps(model: nn.Module) -> None:
    """Sets every small number that a module calls an eps."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "eps" in name and isinstance(value, float) and 0 < value <= 1e-2:
                setattr(module, name, EPS)


class _Outputs:
    """Runs a float64 model, each time with the same dropout."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self._model = model
        args, kwargs = inputs_of(example)
        self._args, self._kwargs = _doubled(args), _doubled(kwargs)

    def __call__(self) -> Tensor:
        """Every number that the model returns, in one row."""
        with unchanged(self._model, training=True), torch.no_grad(), _InFloat64():
            torch.manual_seed(0)
            try:
                outputs = self._model(*self._args, **self._kwargs)
            except Exception as error:  # the user's own forward raises any type
                raise ModelError(
                    f"the model does not run on it in train mode: {type(error).__name__}: {error}".splitlines()[0],
                    where="example",
                    remedy="give a batch of several inputs, as in training",
                ) from error
        return torch.cat([tensor.reshape(-1) for tensor in tensors_in(outputs) if tensor.is_floating_point()])


class _InFloat64(TorchFunctionMode):
    """Keeps casts to narrower types at float64: some norms compute in float32 whatever they are given."""

    _NARROW = (torch.float32, torch.bfloat16, torch.float16)

    def __torch_function__(self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16) and args[0].dtype == torch.float64:
            return args[0]
        wide = [torch.float64 if any(arg is narrow for narrow in self._NARROW) else arg for arg in args]
        return func(*wide, **{key: torch.float64 if any(arg is narrow for narrow in self._NARROW) else arg for key, arg in (kwargs or {}).items()})


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_doubled(item) for item in value)
    return value


def _checked(kind: str, names: tuple[str, ...], parameters: Sequence[Tensor], outputs: Callable[[], Tensor]) -> InvariantGroup:
    moved = _moved(parameters, outputs, 1.0)
    if moved <= TOLERANCE:
        return InvariantGroup(kind, names, moved, None, True)
    at_ten = _moved(parameters, outputs, 10.0)
    return InvariantGroup(kind, names, moved, at_ten, at_ten * FALL <= moved)


def _moved(parameters: Sequence[Tensor], outputs: Callable[[], Tensor], scale: float) -> float:
    """How far outputs move between `scale` and three times as much, as a share of the largest."""
    initial = [parameter.detach().clone() for parameter in parameters]
    results = []
    with torch.no_grad():
        for factor in (scale, 3 * scale):
            for parameter, start in zip(parameters, initial, strict=True):
                parameter.copy_(start * factor)
            results.append(outputs())
        for parameter, start in zip(parameters, initial, strict=True):
            parameter.copy_(start)
    before, after = results
    return float((after - before).abs().max() / before.abs().max())
