"""Normalizations: norms that are written out, found by the power to which scaling a tensor raises each value computed from it.

    v                1      mean(v^2)        2      v * rsqrt(mean(v^2) + eps)       1 - 1 = 0     a norm of v
    v - mean(v)      1      var(v), std(v)   2, 1   (v - mean(v)) / sqrt(var(v))     1 - 1 = 0     a norm of v

A product whose factors both depend on v, and whose power is 0, does not change when v is scaled: that is a proof, up to eps,
and the only evidence that counts. The parameter that multiplies the result first is its gain, the one added first its shift.
"""

from dataclasses import replace

from study.training import operations
from study.training.graph import Graph, Node, Ref

LARGEST_EPS = 1e-2
"""A number up to this added under a root counts as an eps, which the power leaves out."""

NEAREST = 8
"""How many of the nearest tensors that both factors of a product depend on may be what it normalizes."""

_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "var": 2.0, "std": 1.0, "norm": 1.0, "var_mean": 2.0}
_KEEPING = operations.HOMOGENEOUS | {"clamp", "clamp_min", "maximum", "max", "mean", "sum", "nan_to_num"}


def with_written_norms(graph: Graph) -> Graph:
    """The graph with each written-out norm as one node of its input, and with gains and shifts where products and sums apply them."""
    nodes = list(graph.nodes)
    for node in graph.nodes:
        if node.is_product and (start := _normalized(node, graph)) is not None:
            inputs, gain = (_centred(start, graph),), _gain_inside(node, start, graph)
            nodes[node.index] = replace(node, op="norm", is_norm=True, inputs=inputs, gain=gain, carries=None, homogeneous=False)
    graph = _with_affine(replace(graph, nodes=tuple(nodes)))
    return _alive(_with_normalized_weights(graph))


def _normalized(node: Node, graph: Graph) -> int | None:
    """The tensor whose scale a product does not see, if there is one."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if graph.nodes[left].is_data != graph.nodes[right].is_data:
        return None
    common = graph.ancestors[left] & graph.ancestors[right] if node.is_data else _reached(left, graph) & _reached(right, graph)
    if not common:
        return None
    for _ in range(NEAREST):
        start = common.bit_length() - 1
        if start < 0:
            break
        powers: dict[int, float | None] = {start: 1.0}
        if _power(left, start, graph, powers) and _power(node.index, start, graph, powers) == 0:
            return start
        common ^= 1 << start
    return None


def _gain_inside(node: Node, start: int, graph: Graph) -> str:
    """The parameter that multiplies a tensor before its scale is divided out, as in g * (x - mean) / std."""
    for index in node.inputs if node.is_data else ():
        factor = graph.nodes[index]
        if index != start and factor.op == "mul" and len(factor.inputs) == 2:
            for before in factor.inputs:
                if name := graph.sole_parameter(before):
                    return name
    return ""


def _reached(index: int, graph: Graph) -> int:
    """Bits of a node without data and of all before it, parameters included."""
    bits = 1 << index
    for before in graph.nodes[index].inputs:
        bits |= _reached(before, graph)
    return bits


def _power(index: int, start: int, graph: Graph, powers: dict[int, float | None]) -> float | None:
    """How a node's value scales with that of `start`; None where no power says it."""
    if index not in powers:
        powers[index] = None
        reaches = graph.depends(index, start) if graph.nodes[start].is_data else bool(_reached(index, graph) >> start & 1)
        powers[index] = _power_of(graph.nodes[index], start, graph, powers) if index >= start and reaches else 0.0
    return powers[index]


def _power_of(node: Node, start: int, graph: Graph, powers: dict[int, float | None]) -> float | None:
    given = [_power(arg.index, start, graph, powers) if isinstance(arg, Ref) else 0.0 for arg in node.arguments]
    own = _power(node.inputs[0], start, graph, powers) if node.inputs else None
    if None in given or own is None:
        return None
    values = [value for value in given if value is not None]
    match node.op:
        case "mul":
            return sum(values[:2]) if len(values) >= 2 else None
        case "div":
            return values[0] - values[1] if len(values) >= 2 else None
        case "rdiv":
            return -values[0]
        case "pow":
            exponent = node.arguments[1] if len(node.arguments) > 1 else None
            return own * exponent if isinstance(exponent, int | float) else None
        case "add" | "sub" | "rsub":
            return _sum_of(node, values)
        case "getitem" if graph.nodes[node.inputs[0]].op == "var_mean":
            return own if node.arguments[1] == 0 else own / 2
        case "matmul" | "bmm" | "einsum" if not node.is_weight:
            refs = [value for value, arg in zip(given, node.arguments, strict=True) if isinstance(arg, Ref) and value is not None]
            return sum(refs) if len(refs) == 2 else None
        case op if op in _POWERS:
            return own * _POWERS[op]
        case op if op in _KEEPING or node.homogeneous:
            return own
    return own if own == 0 else None


def _sum_of(node: Node, values: list[float]) -> float | None:
    """A sum's power is its terms', if they agree; an eps has any."""
    terms = [value for value, arg in zip(values, node.arguments, strict=True) if not (isinstance(arg, int | float) and abs(arg) <= LARGEST_EPS)]
    return terms[0] if len(set(terms)) == 1 else None


def _centred(index: int, graph: Graph) -> int:
    """What a norm takes as its input: the tensor before its own mean was subtracted and before casts."""
    while True:
        node = graph.nodes[index]
        if (node.op == "sub" and len(node.inputs) == 2 and _is_mean(node.inputs[1], node.inputs[0], graph)) or (
            node.op in ("to", "float", "type") and len(node.inputs) == 1
        ):
            index = node.inputs[0]
        else:
            return index


def _is_mean(index: int, of: int, graph: Graph) -> bool:
    while index != of:
        node = graph.nodes[index]
        if len(node.inputs) != 1 or not (node.op in operations.SHAPING or node.op in ("mean", "var_mean")):
            return False
        index = node.inputs[0]
    return True


def _with_affine(graph: Graph) -> Graph:
    """Gives norms that have no gain, or no shift, those that follow them directly as a product and a sum."""
    nodes, norm_of = list(graph.nodes), {node.index: node.index for node in graph.nodes if node.is_norm and not node.is_weight}
    for node in graph.nodes:
        before = [norm_of[index] for index in node.inputs if index in norm_of]
        if node.index in norm_of or len(before) != 1:
            continue
        norm = nodes[before[0]]
        name = graph.sole_parameter(next((index for index in node.inputs if index not in norm_of), norm.index))
        if node.op in operations.SHAPING and len(node.inputs) == 1:
            norm_of[node.index] = norm.index
        elif node.op == "mul" and name and not norm.gain and not norm.shift:
            nodes[norm.index] = replace(norm, gain=name)
            norm_of[node.index] = norm.index
        elif node.op == "add" and name and not norm.shift and _owner(name) == _owner(norm.gain):
            nodes[norm.index] = replace(norm, shift=name)
            norm_of[node.index] = norm.index
    return replace(graph, nodes=tuple(nodes))


def _owner(name: str) -> str | None:
    """The module that holds a parameter; a table of positions is told from a shift by it."""
    return name.rpartition(".")[0] if name else None


def _with_normalized_weights(graph: Graph) -> Graph:
    """Marks the weight layers whose weight is normalized before use, with its gain."""
    nodes = list(graph.nodes)
    for node in graph.nodes:
        if node.weight_from is not None and not node.weight_is_normalized:
            norm = _norm_before(node.weight_from, graph)
            if norm is not None:
                weights = tuple(name for name in node.weights if name != norm.gain)
                nodes[node.index] = replace(node, weights=weights, gain=norm.gain, is_norm=bool(norm.gain), weight_is_normalized=True)
    return replace(graph, nodes=tuple(nodes))


def _norm_before(index: int, graph: Graph) -> Node | None:
    """The norm that a weight comes from, with nothing but shapes, factors and its gain after it."""
    node = graph.nodes[index]
    if node.is_norm or node.op == "normalize":
        return node
    if node.op == "mul" or (node.op in operations.SHAPING and len(node.inputs) == 1):
        found = (_norm_before(before, graph) for before in node.inputs)
        return next((norm for norm in found if norm is not None), None)
    return None


def _alive(graph: Graph) -> Graph:
    """The graph without uses of tensors that reach no output: the insides of norms that are now one node."""
    if not graph.outputs:
        return graph
    alive = 0
    nodes = list(graph.nodes)
    for node in reversed(graph.nodes):
        if node.index in graph.outputs or alive >> node.index & 1:
            for before in (*node.inputs, *(() if node.weight_from is None else (node.weight_from,))):
                alive |= 1 << before
        elif node.op not in ("input", "parameter"):
            nodes[node.index] = Node(node.index, "dead", is_data=False)
    return replace(graph, nodes=tuple(nodes))
