"""Places: where every norm stands, read from the sums of branch and shortcut around it.

    place    which norm                                               in a post-activation ResNet
    down     its output is a projection shortcut's addend             shortcut.1
    last     its output is a branch's addend, activations aside       norm2 (bottleneck: norm3)
    stream   it normalizes a residual sum and its output goes on      none (post-LN transformers)
    stem     it writes a stream outside any branch                    the net's first norm
    final    outside every branch, no norm after it                   none (pre-activation nets, pre-LN transformers)
    inner    inside a branch, before another weight of it             norm1 (bottleneck: norm1, norm2)

The first match wins. Without residual sums the last norm before the output is `final` and the others are `inner`.
A norm shared by branch and projection at the start of a pre-activation block resets the stream: `stream`, or `stem` for the first.
A norm of a residual sum with a weight between it and the next stream (ConvNeXt's downsampling) writes that stream: `stem`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from study.training.graph import Graph, Node
from study.training.operations import SHAPING

UNKNOWN = "unknown"
"""Place of a gain that the computation does not tell."""


@dataclass(frozen=True, slots=True)
class ResidualSum:
    """One `shortcut + branch`, as indices of nodes."""

    sum: int
    start: int
    """The last node that both addends are computed from."""
    branch: int
    shortcut: int


def gain_and_shift_places(graph: Graph) -> dict[str, str]:
    """The place of every parameter that is a norm's gain or shift; `unknown` where its uses disagree or no rule applies."""
    found: dict[str, str] = {}
    for node, place in zip(_norms(graph), _places(graph).values(), strict=True):
        for name in filter(None, (node.gain, node.shift)):
            found[name] = place if found.get(name, place) == place else UNKNOWN
    return found


def following_places(graph: Graph) -> dict[str, str]:
    """For every weight whose output a norm takes directly, the place of that norm."""
    places = _places(graph)
    sources = {graph.source(node.inputs[0]): places[node.index] for node in _norms(graph) if not node.is_weight and node.inputs}
    found = {name: sources[node.index] for node in graph.nodes if node.is_weight and node.index in sources for name in node.weights}
    own = {name: places[node.index] for node in _norms(graph) if node.is_weight for name in node.weights}
    return {**found, **own}


def residual_sums(graph: Graph) -> list[ResidualSum]:
    """Every addition of a branch to the shortcut around it."""
    found: list[ResidualSum] = []
    for node in graph.nodes:
        if node.is_add and len(node.inputs) == 2 and (residual := _residual(node, graph, found)):
            found.append(residual)
    return [residual for residual in found if not any(_adds_parallel_branches(residual, outer, graph) for outer in found)]


def _norms(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.is_norm and (node.is_data or node.is_weight)]


def _places(graph: Graph) -> dict[int, str]:
    sums = residual_sums(graph)
    return {node.index: _place(node, sums, graph) for node in _norms(graph)}


def _residual(node: Node, graph: Graph, before: Sequence[ResidualSum]) -> ResidualSum | None:
    left, right = node.inputs
    common = graph.ancestors[left] & graph.ancestors[right]
    if not common:
        return None
    start = common.bit_length() - 1
    for shortcut, branch in ((left, right), (right, left)):
        continues = any(graph.source(shortcut) == earlier.sum and earlier.start == start for earlier in before)
        if continues and graph.has_weight_between(start, branch):
            return ResidualSum(node.index, start, branch, shortcut)
    weights = {addend: sum(step.is_weight for step in graph.between(start, addend)) for addend in (left, right)}
    if weights[left] == weights[right]:
        return None
    shortcut, branch = sorted((left, right), key=weights.__getitem__)
    return ResidualSum(node.index, start, branch, shortcut)


def _adds_parallel_branches(residual: ResidualSum, outer: ResidualSum, graph: Graph) -> bool:
    """Whether a sum of two weighted paths, attention and MLP, is one branch of another sum around the same place."""
    return (
        residual.sum != outer.sum
        and graph.source(outer.branch) == residual.sum
        and graph.has_weight_between(residual.start, residual.shortcut)
        and outer.start <= residual.start
        and not graph.has_weight_between(outer.start, residual.start)
    )


def _place(norm: Node, sums: Sequence[ResidualSum], graph: Graph) -> str:
    index = norm.index
    if not sums:
        return "inner" if _norm_follows(index, graph) else "final"
    if any(
        graph.source(residual.shortcut) == index > residual.start and graph.has_weight_between(residual.start, residual.shortcut) for residual in sums
    ):
        return "down"
    around = [
        residual for residual in sums if graph.depends(residual.branch, index) and graph.depends(index, residual.start) and index > residual.start
    ]
    if any(_ends_branch(index, residual.branch, graph) for residual in around):
        return "last"
    if around:
        innermost = max(around, key=lambda residual: residual.start)
        return "inner" if graph.has_weight_between(index, innermost.branch) else UNKNOWN
    return _place_outside(norm, sums, graph)


def _place_outside(norm: Node, sums: Sequence[ResidualSum], graph: Graph) -> str:
    """The place of a norm that is in no branch."""
    index = norm.index
    starts = [residual.start for residual in sums if graph.depends(residual.start, index)]
    normalized = next((residual for residual in sums if residual.sum == graph.source(norm.inputs[0])), None)
    if normalized and not norm.is_weight:
        goes_on = any(not graph.has_weight_between(index, start) for start in starts)
        if goes_on or (not starts and graph.nodes[graph.source(normalized.start)].is_norm):
            return "stream"
    first = next((residual for residual in sums if graph.depends(residual.sum, index)), None)
    if first is not None:
        return "stem" if graph.depends(first.start, index) else UNKNOWN
    return "stem" if _norm_follows(index, graph) else "final"


def _ends_branch(index: int, addend: int, graph: Graph) -> bool:
    """Whether nothing but shapes, factors, activations and sums of parallel branches comes between a norm and the sum."""
    pending = [addend]
    while pending:
        at = graph.source(pending.pop())
        if at == index:
            return True
        node = graph.nodes[at]
        data = [before for before in node.inputs if graph.depends(before, index)]
        if node.is_weight or node.is_norm or not data:
            continue
        if (len(data) == 1 and (node.is_add or len(node.inputs) == 1)) or _activates(node, data, graph):
            pending.extend(data)
    return False


def _activates(node: Node, data: Sequence[int], graph: Graph) -> bool:
    """Whether a product is an activation written out, such as x * sigmoid(x)."""
    if not node.is_product or len(data) != 2:
        return False
    common = graph.ancestors[data[0]] & graph.ancestors[data[1]]
    start = common.bit_length() - 1
    return not any(graph.has_weight_between(start, factor) for factor in data)


def _norm_follows(index: int, graph: Graph) -> bool:
    return any(node.is_norm and node.index != index and graph.depends(node.index, index) for node in graph.nodes)


def hidden_weights(graph: Graph) -> frozenset[str]:
    """The weights that are followed by another weight layer wherever they are used: all but those of the output layer."""
    layers = [node for node in graph.nodes if node.is_weight and node.is_data]
    found: dict[str, bool] = {}
    for node in layers:
        followed = any(graph.depends(later.index, node.index) for later in layers if later.index > node.index)
        for name in node.weights:
            found[name] = found.get(name, True) and followed
    return frozenset(name for name, followed in found.items() if followed)


def scale_invariant_weights(graph: Graph) -> frozenset[str]:
    """The weights that only norms see: scaling one leaves the model's output unchanged in train mode.

    A bias is no obstacle in front of a BatchNorm, which subtracts it again.
    """
    found: dict[str, bool] = {}
    for node in graph.nodes:
        if node.is_weight and (node.is_data or node.weights):
            alone = node.weight_from is None or len(node.weights) == 1
            invariant = node.weight_is_normalized or ends_in_norms(node.index, bool(node.biases), graph)
            for name in node.weights:
                found[name] = found.get(name, True) and alone and invariant
    for name in _used_otherwise(graph):
        found[name] = False
    return frozenset(name for name, invariant in found.items() if invariant)


def _used_otherwise(graph: Graph) -> Iterator[str]:
    """Parameters that are embeddings, gains, shifts or biases somewhere, or stand bare in the computation."""
    for node in graph.nodes:
        yield from node.biases
        yield from (name for name in (node.gain, node.shift) if name)
        if not node.is_weight:
            yield from node.weights
        if node.is_data:
            for before in node.inputs:
                if not graph.nodes[before].is_data:
                    yield from graph.parameters_of(before)


def ends_in_norms(index: int, biased: bool, graph: Graph) -> bool:
    """Whether all that takes a node's output is, through positively homogeneous maps, a norm."""
    if any(index in graph.nodes[output].inputs for output in graph.outputs):
        return False
    users = list(graph.users(index))
    return bool(users) and all(_normalizes(user, biased, graph) for user in users)


def _normalizes(user: Node, biased: bool, graph: Graph) -> bool:
    if user.is_norm and not user.is_weight:
        return user.is_batch_norm or not biased
    if biased:
        return _reshapes(user) and ends_in_norms(user.index, biased, graph)
    data = [before for before in user.inputs if graph.nodes[before].is_data]
    if user.is_weight and user.biases and user.op.startswith(("conv", "linear")) and len(data) == 1:
        return ends_in_norms(user.index, True, graph)
    return user.homogeneous and len(data) == 1 and ends_in_norms(user.index, biased, graph)


def _reshapes(node: Node) -> bool:
    return node.op in SHAPING and len(node.inputs) == 1
