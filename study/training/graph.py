"""Graph: a model's computation, reduced to what roles are read from.

    x ──conv──norm──relu──conv──norm──(+)──relu──> ...        every node knows its tensor inputs,
    └───────────────────────────────────┘                     and which of them it merely carries on

A node *carries* an input when its output is that input up to shape and a factor: dropout, reshaping, average pooling,
a gate computed from the input itself. It is *homogeneous* when scaling its input by c > 0 scales its output by c.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _WeightNorm

from study.training.models import RMSNorm2d

NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm2d)
"""Modules whose output does not change when their input is scaled; `weight` is their gain, `bias` their shift."""

WEIGHTS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
"""Modules that are linear in `weight`."""

_CARRYING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.PixelShuffle,
    nn.Upsample,
)
_HOMOGENEOUS_MODULES: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)

_CARRYING_FUNCTIONS: frozenset[object] = frozenset(
    {
        *(
            torch.flatten,
            torch.reshape,
            torch.permute,
            torch.transpose,
            torch.squeeze,
            torch.unsqueeze,
            torch.movedim,
            torch.mean,
            torch.neg,
            torch.div,
        ),
        *(F.dropout, F.avg_pool2d, F.adaptive_avg_pool2d, F.pad, F.interpolate),
        *(operator.neg, operator.getitem, operator.truediv),
    }
)
_CARRYING_METHODS = frozenset(
    {
        *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "expand", "repeat", "movedim", "unflatten"),
        *("mean", "clone", "to", "float", "double", "half", "type_as", "div", "neg", "chunk", "split"),
    }
)
_HOMOGENEOUS_FUNCTIONS: frozenset[object] = frozenset((F.relu, torch.relu, F.leaky_relu, F.max_pool2d, F.adaptive_max_pool2d))
_ADDS: frozenset[object] = frozenset((operator.add, operator.iadd, torch.add, "add", "add_"))
_PRODUCTS: frozenset[object] = frozenset((operator.mul, operator.imul, torch.mul, "mul", "mul_"))


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the computation, in the order of execution."""

    index: int
    module: str
    """Path of the module, for a node that is one; empty otherwise."""
    parameter: str
    """Name of the bare parameter that the node reads; empty otherwise."""
    inputs: tuple[int, ...]
    """Indices of the nodes whose tensors it takes, bare parameters included."""
    is_weight: bool = False
    is_norm: bool = False
    is_add: bool = False
    is_product: bool = False
    is_batch_norm: bool = False
    has_bias: bool = False
    homogeneous: bool = False
    carries: int | None = None
    """The input that it passes on up to shape and a factor."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's nodes, with who comes before whom as bit sets."""

    nodes: tuple[Node, ...]
    ancestors: tuple[int, ...]
    """For each node, the bits of itself and of every node that it depends on; bare parameters left out."""
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


def is_weight_normed(module: nn.Module) -> bool:
    """Whether torch's weight_norm splits this module's weight into a gain and a direction."""
    steps = getattr(module, "parametrizations", {})
    return "weight" in steps and any(isinstance(step, _WeightNorm) for step in steps["weight"])


def is_norm(module: nn.Module) -> bool:
    """Whether the module's own gain multiplies something normalized."""
    return isinstance(module, NORMS) or is_weight_normed(module)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, NORMS) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> Graph:
    """Reads the computation of a model symbolically, without running it on data.

    Raises:
        Exception: whatever torch.fx raises on a forward pass that depends on values; the caller decides what that means.
    """
    return trace_module(model)[1]


def trace_module(model: nn.Module) -> tuple[fx.GraphModule, Graph]:
    """Like `trace`, beside the traced module itself; its graph has one node for each of ours, in the same order."""
    graph = _Tracer().trace(model)
    indices: dict[fx.Node, int] = {}
    nodes: list[Node] = []
    ancestors: list[int] = []
    for step in graph.nodes:
        node = _node(step, len(nodes), indices, ancestors, model)
        indices[step] = node.index
        nodes.append(node)
        reached = 0 if node.parameter else 1 << node.index
        for before in node.inputs:
            reached |= ancestors[before]
        ancestors.append(reached)
    outputs = tuple(index for step, index in indices.items() if step.op == "output")
    return fx.GraphModule(model, graph), Graph(tuple(nodes), tuple(ancestors), outputs)


def _node(step: fx.Node, index: int, indices: dict[fx.Node, int], ancestors: list[int], model: nn.Module) -> Node:
    inputs = tuple(indices[before] for before in step.all_input_nodes)
    if step.op == "call_module":
        return _of_module(str(step.target), model.get_submodule(str(step.target)), index, inputs)
    if step.op == "get_attr":
        is_parameter = isinstance(_attribute(model, str(step.target)), nn.Parameter)
        return Node(index, "", str(step.target) if is_parameter else "", inputs)
    target: Any = step.target
    tensors = tuple(before for before in inputs if ancestors[before])
    if target in _ADDS:
        return Node(index, "", "", inputs, is_add=True, carries=tensors[0] if len(inputs) == 2 and len(tensors) == 1 else None)
    if target in _PRODUCTS:
        return Node(index, "", "", inputs, is_product=True, carries=_gated(tensors, ancestors))
    carrying = target in (_CARRYING_METHODS if step.op == "call_method" else _CARRYING_FUNCTIONS)
    homogeneous = carrying or target in _HOMOGENEOUS_FUNCTIONS or (step.op == "call_method" and target == "relu")
    return Node(index, "", "", inputs, homogeneous=homogeneous, carries=inputs[0] if carrying and len(inputs) == 1 else None)


def _gated(tensors: tuple[int, ...], ancestors: list[int]) -> int | None:
    """The factor that a product carries: the only tensor, or the one that its gate is computed from."""
    if len(tensors) == 1:
        return tensors[0]
    if len(tensors) == 2:
        for value, gate in (tensors, tensors[::-1]):
            if ancestors[gate] >> value & 1:
                return value
    return None


def _of_module(path: str, module: nn.Module, index: int, inputs: tuple[int, ...]) -> Node:
    carrying = isinstance(module, _CARRYING_MODULES)
    is_weight = isinstance(module, WEIGHTS)
    has_bias = is_weight and module.bias is not None
    return Node(
        index,
        path,
        "",
        inputs,
        is_weight=is_weight or isinstance(module, nn.MultiheadAttention),
        is_norm=is_norm(module),
        is_batch_norm=isinstance(module, _NormBase),
        has_bias=has_bias,
        homogeneous=carrying or isinstance(module, _HOMOGENEOUS_MODULES) or (is_weight and not has_bias),
        carries=inputs[0] if carrying else None,
    )


def _attribute(model: nn.Module, path: str) -> object:
    value: object = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
