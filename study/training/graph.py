"""Graph: a model's computation, reduced to what roles are read from.

    x ──conv──norm──relu──conv──norm──(+)──relu──> ...        every node knows its tensor inputs,
    └───────────────────────────────────┘                     and which of them it merely carries on

A node *carries* an input when its output is that input up to shape and a factor: dropout, reshaping, average pooling,
a gate computed from the input by weights. It is *homogeneous* when scaling its input by c > 0 scales its output by c.
Two tracers call a Builder, one call for each operation: `symbolic.py` without data, `recording.py` on an example.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from study.training import operations


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a node's tensor among the arguments of an operation."""

    index: int


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the computation, in the order of execution."""

    index: int
    op: str
    """Torch's name for it; `input`, `parameter`, `constant` and `output` besides."""
    inputs: tuple[int, ...] = ()
    """Indices of the nodes whose tensors it takes, bare parameters included; the weights and biases of a layer left out."""
    arguments: tuple[Ref | float | None, ...] = ()
    """Its positional arguments, tensors and numbers."""
    parameter: str = ""
    """Name of the bare parameter that the node reads; empty otherwise."""
    weights: tuple[str, ...] = ()
    """Parameters that it is linear in."""
    biases: tuple[str, ...] = ()
    gain: str = ""
    """Of a norm: the parameter that multiplies its output; of a weight: the one that multiplies its normalized weight."""
    shift: str = ""
    weight_from: int | None = None
    """The node that computes its weight from parameters, if one does."""
    is_data: bool = True
    """Whether it depends on the model's inputs."""
    is_weight: bool = False
    is_norm: bool = False
    is_batch_norm: bool = False
    weight_is_normalized: bool = False
    """Whether the scale of its weight is divided out before use: weight norm, weight standardization."""
    homogeneous: bool = False
    carries: int | None = None
    """The input that it passes on up to shape and a factor."""

    @property
    def is_add(self) -> bool:
        """Whether it adds or subtracts tensors."""
        return self.op in operations.ADDS

    @property
    def is_product(self) -> bool:
        """Whether it multiplies or divides tensors element by element."""
        return self.op in ("mul", "div")


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's nodes, with who comes before whom as bit sets."""

    nodes: tuple[Node, ...]
    ancestors: tuple[int, ...]
    """For each node, the bits of itself and of every node that it depends on, parameters and integers left out."""
    outputs: tuple[int, ...]

    def source(self, index: int) -> int:
        """The node whose value arrives at `index`, with everything that merely carries it taken away."""
        while (carried := self.nodes[index].carries) is not None:
            index = carried
        return index

    def users(self, index: int) -> Iterator[Node]:
        """The nodes that take this node's tensor."""
        return (node for node in self.nodes[index + 1 :] if index in node.inputs)

    def depends(self, later: int, earlier: int) -> bool:
        """Whether `later` is computed from `earlier`."""
        return bool(self.ancestors[later] >> earlier & 1)

    def between(self, start: int, end: int) -> Iterator[Node]:
        """The nodes on any path from `start`, left out, to `end`, included."""
        return (node for node in self.nodes[start + 1 : end + 1] if self.depends(node.index, start) and self.depends(end, node.index))

    def has_weight_between(self, start: int, end: int) -> bool:
        """Whether any path from `start`, left out, to `end`, included, holds a weight layer."""
        return any(node.is_weight for node in self.between(start, end))

    def parameters_of(self, index: int) -> tuple[str, ...]:
        """The parameters that a node without data is computed from, in order."""
        node = self.nodes[index]
        names = [node.parameter] if node.parameter else [*node.weights, *([node.gain] if node.gain else [])]
        for before in node.inputs:
            names += self.parameters_of(before)
        return tuple(dict.fromkeys(names))

    def sole_parameter(self, index: int) -> str:
        """The one parameter that a node holds, up to its shape; empty if it is computed in any other way."""
        while not self.nodes[index].parameter:
            node = self.nodes[index]
            if node.is_data or node.op not in operations.SHAPING or len(node.inputs) != 1:
                return ""
            index = node.inputs[0]
        return self.nodes[index].parameter


class Builder:
    """Collects the operations of one forward pass, in their order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.ancestors: list[int] = []
        self.outputs: list[int] = []

    def input(self, *, discrete: bool = False) -> int:
        """An input of the model; integers and truth values are no stream."""
        return self._append(Node(len(self.nodes), "input"), 0 if discrete else 1 << len(self.nodes))

    def parameter(self, name: str) -> int:
        """A parameter, read by itself."""
        return self._append(Node(len(self.nodes), "parameter", parameter=name, is_data=False), 0)

    def constant(self) -> int:
        """A buffer or a number."""
        return self._append(Node(len(self.nodes), "constant", is_data=False), 0)

    def output(self, inputs: Sequence[int]) -> int:
        """What the model returns."""
        index = self._append(Node(len(self.nodes), "output", tuple(inputs)), self._reached(inputs))
        self.outputs.append(index)
        return index

    def layer(self, op: str, inputs: Sequence[int], *, names: Mapping[str, str], gain: str = "") -> int:
        """A module that is one operation, with the names of its own parameters; `gain` is that of its normalized weight."""
        return self._append(self._node(op, inputs, tuple(map(Ref, inputs)), names, gain, None), self._reached(inputs, op))

    def call(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, discrete: bool = False) -> int:
        """An operation on tensors, given as Refs, and anything else."""
        inputs = tuple(dict.fromkeys(_refs((*args, *kwargs.values()))))
        if op in operations.CREATING:
            return self.constant()
        if op in operations.HOMOGENEOUS:  # a size or dtype says nothing of scale
            inputs = tuple(index for index in inputs if self.nodes[index].is_data or self.graph().parameters_of(index))
        names: dict[str, str] = {}
        gain, weight_from = "", None
        for operand, ref in self._held(op, args, kwargs):
            if op in operations.LINEAR and operand == "weight":
                gain, weight_from = self._gain_of_weight(ref), ref
            names[operand] = self._name(ref, gain)
            inputs = tuple(index for index in inputs if index != ref)
        arguments = tuple(arg if isinstance(arg, Ref | int | float) else None for arg in args)
        op = op.removeprefix("torch.")
        node = self._node(op, inputs, arguments, names, gain, weight_from)
        return self._append(node, 0 if discrete else self._reached(inputs, op))

    def graph(self) -> Graph:
        """What was collected."""
        return Graph(tuple(self.nodes), tuple(self.ancestors), tuple(self.outputs))

    def _append(self, node: Node, reached: int) -> int:
        is_data = node.is_data and node.op not in ("parameter", "constant")
        if node.inputs and node.op not in operations.EMBEDDINGS:
            is_data = any(self.nodes[before].is_data for before in node.inputs)
        self.nodes.append(replace(node, is_data=is_data))
        self.ancestors.append(reached | 1 << node.index if reached else 0)
        return node.index

    def _reached(self, inputs: Sequence[int], op: str = "") -> int:
        """The nodes that a floating-point result of these inputs depends on: those of integers are no stream, unless a layer makes one of them."""
        if op in operations.EMBEDDINGS:
            return 1 << len(self.nodes)
        reached = 1 << len(self.nodes) if not inputs or (op in operations.LINEAR and any(self.nodes[before].is_data for before in inputs)) else 0
        for before in inputs:
            reached |= self.ancestors[before]
        return reached

    def _held(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
        """The arguments of an operation that are computed from parameters alone, as weight or bias."""
        if op.removeprefix("torch.") not in operations.NORMS | operations.LINEAR | operations.EMBEDDINGS:
            return
        given = {**dict(zip(operations.operand_names(op), args, strict=False)), **kwargs}
        if op in operations.CONTRACTIONS:
            refs = list(_refs(args))
            held = [index for index in refs if not self.nodes[index].is_data]
            if len(held) == 1 and len(refs) == 2:
                yield "weight", held[0]
            return
        for operand in ("weight", "bias"):
            value = given.get(operand)
            if isinstance(value, Ref) and not self.nodes[value.index].is_data and (op in operations.LINEAR or self._parameter(value.index)):
                yield operand, value.index

    def _gain_of_weight(self, index: int) -> str:
        """The gain of a weight that torch's own weight_norm computes."""
        node = self.nodes[index]
        while node.op in operations.SHAPING and len(node.inputs) == 1:
            node = self.nodes[node.inputs[0]]
        return self._parameter(node.inputs[1]) if node.op == "weight_norm" and len(node.inputs) == 2 else ""

    def _parameter(self, index: int) -> str:
        return self.graph().sole_parameter(index)

    def _name(self, index: int, gain: str) -> str:
        return " ".join(name for name in self.graph().parameters_of(index) if name != gain)

    def _node(
        self, op: str, inputs: Sequence[int], arguments: tuple[Ref | float | None, ...], names: Mapping[str, str], gain: str, weight_from: int | None
    ) -> Node:
        index = len(self.nodes)
        weight, bias = tuple(names.get("weight", "").split()), tuple(names.get("bias", "").split())
        if op in operations.NORMS:
            gain, shift = " ".join(weight), " ".join(bias)
            return Node(index, op, tuple(inputs), arguments, gain=gain, shift=shift, is_norm=True, is_batch_norm=op == "batch_norm")
        is_linear = op in operations.LINEAR and ("weight" in names or op not in operations.CONTRACTIONS)
        if is_linear or op in operations.OPAQUE_WEIGHTS:
            node = Node(index, op, tuple(inputs), arguments, weights=weight, biases=bias, gain=gain, weight_from=weight_from, is_weight=True)
            homogeneous = is_linear and "bias" not in names and len(inputs) == 1
            return replace(node, is_norm=bool(gain), weight_is_normalized=bool(gain), homogeneous=homogeneous)
        if op in operations.EMBEDDINGS:
            return Node(index, op, tuple(inputs), arguments, weights=weight)
        carries, homogeneous = self._flow(op, inputs, arguments)
        return Node(index, op, tuple(inputs), arguments, carries=carries, homogeneous=homogeneous)

    def _flow(self, op: str, inputs: Sequence[int], arguments: Sequence[Ref | float | None]) -> tuple[int | None, bool]:
        """What an operation without parameters of its own carries on, and whether it is homogeneous."""
        data = [before for before in inputs if self.ancestors[before]]
        if op in ("mul", "div") and (
            (not isinstance(arguments[0], Ref) and op == "div") or (len(inputs) == 1 and arguments[:2] == (Ref(inputs[0]),) * 2)
        ):
            return None, False
        if op in operations.ADDS:
            return (data[0] if len(data) == 1 and len(inputs) == 2 else None), False
        if op in ("mul", "div"):
            divided = op == "mul" or inputs[:1] == data[:1]
            return (self._gated(data) if divided else None), len(data) == 1 and divided
        if len(data) != 1:
            return None, False
        return (data[0] if op in operations.CARRYING else None), op in operations.HOMOGENEOUS

    def _gated(self, data: Sequence[int]) -> int | None:
        """The factor that a product carries: the only activation, or the one that its gate is computed from by weights."""
        if len(data) == 1:
            return data[0]
        if len(data) == 2:
            for value, gate in (data, data[::-1]):
                if self.ancestors[gate] >> value & 1 and any(
                    node.is_weight and self.ancestors[node.index] >> value & 1 and self.ancestors[gate] >> node.index & 1
                    for node in self.nodes[value + 1 : gate + 1]
                ):
                    return value
        return None


def _refs(values: object) -> Iterator[int]:
    if isinstance(values, Ref):
        yield values.index
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _refs(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _refs(value)
