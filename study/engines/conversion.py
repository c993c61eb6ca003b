"""Conversion: a model's own computation, as torch.fx reads it, with every operation widened by a slot axis.

    modules of torch's ──> layers.py        functions and methods ──> the tables below

An operation that is not in the tables goes through torch.func.vmap by itself. Nothing here is trusted: `admission.py` compares the
result with the solo engine before a study uses it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from study.engines.arithmetic import Mode, Pass, reset_statistics
from study.engines.layers import MODULES, Maps, Site, as_maps, as_rows, beside, dropped, on_either
from study.training.symbolic import trace_module


class Converted:
    """A traced model, run over slots."""

    name = "converted"

    def __init__(self, model: nn.Module) -> None:
        """Reads the model.

        Raises:
            Exception: whatever torch.fx raises on a computation that depends on values.
        """
        traced, _ = trace_module(model)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._nodes = list(traced.graph.nodes)
        self._last_use = _last_uses(self._nodes)
        # Looked up once: in small models, asking a module for its parameters takes longer than computing with them.
        self._layers = {node: self._layer(node) for node in self._nodes if node.op == "call_module"}
        self.draws = any(node.target is F.dropout for node in self._nodes) or any(
            isinstance(layer.module, _DropoutNd) and layer.module.p > 0 for layer in self._layers.values()
        )

    def __call__(self, images: Tensor, run: Pass) -> Tensor:
        """Images [slots, batch, ...] to logits [slots, batch, classes]."""
        known: dict[fx.Node, Any] = {}
        if run.mode is Mode.ESTIMATE:
            reset_statistics(run.values)
        for node in self._nodes:
            match node.op:
                case "placeholder":
                    known[node] = images
                case "get_attr":
                    known[node] = run.values[str(node.target)]
                case "output":
                    logits: Tensor = as_rows(_given(node.args[0], known))
                    return logits
                case "call_module":
                    known[node] = self._module(node, known, run)
                case _:
                    known[node] = _call(node, known, run, self._modules)
            for done in self._last_use.get(node, ()):
                del known[done]
        raise AssertionError("a traced graph ends in its output")

    def _layer(self, node: fx.Node) -> "_Layer":
        path = str(node.target)
        module = self._modules[path]
        handler = next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)
        names = {name: f"{path}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())}
        is_plain = len(node.args) == 1 and not node.kwargs
        return _Layer(module, handler if is_plain else None, names, _may_overwrite(node, self._modules))

    def _module(self, node: fx.Node, known: Mapping[fx.Node, Any], run: Pass) -> Any:
        layer = self._layers[node]
        own = {name: run.values[full] for name, full in layer.names.items()}
        if layer.handler is not None:
            return layer.handler(layer.module, _given(node.args[0], known), own, Site(run, layer.may_overwrite))
        arguments = [as_rows(_given(argument, known)) for argument in node.args]
        return vmap(lambda values, *inputs: functional_call(layer.module, values, inputs))(own, *arguments)


class _Layer(NamedTuple):
    """A module where the model calls it."""

    module: nn.Module
    handler: Callable[..., Any] | None
    """What computes it over slots; None where only vmap can."""
    names: Mapping[str, str]
    """Its own parameters and buffers, by the names that it knows them by, and those that the model knows them by."""
    may_overwrite: bool
    """Whether its input may be written over."""


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """After which node each value is needed no more."""
    found: dict[fx.Node, list[fx.Node]] = {}
    position = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if node.users:
            found.setdefault(max(node.users, key=position.__getitem__), []).append(node)
    return found


def _given(argument: Any, known: Mapping[fx.Node, Any]) -> Any:
    return fx.node.map_arg(argument, lambda node: known[node])


OVERWRITABLE = (nn.Conv2d, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm)
"""Modules whose backward pass does not need their output."""


def _may_overwrite(node: fx.Node, modules: Mapping[str, nn.Module], position: int = 0) -> bool:
    """Whether an operation may write over one of its inputs: nobody else needs it, neither forward nor backward."""
    source = node.args[position]
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return False
    if source.op == "call_module":
        return isinstance(modules[str(source.target)], OVERWRITABLE)
    return source.op == "call_function" and source.target in ADDS


ADDS = frozenset({operator.add, torch.add, operator.iadd})
ARITHMETIC = ADDS | frozenset({operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div})
POINTWISE = frozenset({F.relu, torch.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.leaky_relu, F.elu, torch.exp, torch.rsqrt, torch.sqrt})
RELUS = frozenset({F.relu, torch.relu})
POOLINGS = frozenset({F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d})
QUESTIONS = frozenset({"size", "dim", "ndimension", "numel", "is_floating_point"})
"""Methods that ask for a tensor's shape or type, and not for its values."""


def _call(node: fx.Node, known: Mapping[fx.Node, Any], run: Pass, modules: Mapping[str, nn.Module]) -> Any:
    """A function or method over slots."""
    args, kwargs = _given(node.args, known), _given(node.kwargs, known)
    if not any(isinstance(value, Tensor | Maps) for value in (*_leaves(args), *_leaves(kwargs))):
        return _plain(node)(*args, **kwargs)
    first, target = args[0] if args else None, node.target
    if node.op == "call_method" and target in QUESTIONS:
        return getattr(as_rows(first)[0], str(target))(*args[1:], **kwargs)
    if target is getattr:
        return getattr(as_rows(first)[0], args[1])
    if target in ARITHMETIC and not kwargs:
        return _combined(node, args[0], args[1], modules)
    if target in RELUS and _may_overwrite(node, modules):
        return on_either(F.relu_, first)
    if target in POINTWISE:
        return on_either(target, first, *args[1:], **kwargs)
    if target in POOLINGS and as_rows(first).ndim == 5:
        return on_either(target, as_maps(first), *args[1:], **kwargs)
    if target is F.dropout:
        return _functional_dropout(first, run, *args[1:], **kwargs)
    if target is F.scaled_dot_product_attention:
        return _attention(*args, **kwargs)
    if target in SHIFTED and first is not None and not kwargs and all(isinstance(axis, int | tuple | list) for axis in args[1:]):
        return SHIFTED[target](as_rows(first), *args[1:])
    return _vmapped(_plain(node), args, kwargs)


def _plain(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_method":
        # Rows may lie in another order in memory than a tensor of their own would.
        name = {"view": "reshape", "view_as": "reshape_as"}.get(str(node.target), str(node.target))
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    return node.target  # type: ignore[return-value]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _combined(node: fx.Node, left: Any, right: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Two operands: in one layout, with parameters of fewer axes set beside activations as broadcasting within a slot has it."""
    function: Any = node.target
    both = (left, right)
    if _stand_alike(both):
        slots = next(value.slots for value in both if isinstance(value, Maps))
        tensors = [value.tensor if isinstance(value, Maps) else value for value in both]
        if node.target in ADDS:
            for position, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor) and _may_overwrite(node, modules, position) and _fits(tensors[1 - position], tensor):
                    return Maps(tensor.add_(tensors[1 - position]), slots)
        return Maps(function(*tensors), slots)
    rows = [as_rows(value) for value in both]
    axes = max(value.ndim for value in rows if isinstance(value, Tensor))
    return function(*(beside(value, axes) if isinstance(value, Tensor) and value.ndim < axes else value for value in rows))


def _stand_alike(values: Sequence[Any]) -> bool:
    """Whether operands can be combined side by side: numbers, and maps of equally many axes and channels."""
    shapes = {(value.tensor.ndim, value.tensor.shape[1]) for value in values if isinstance(value, Maps)}
    return len(shapes) == 1 and all(isinstance(value, Maps | int | float) for value in values)


def _fits(other: Any, tensor: Tensor) -> bool:
    """Whether a sum with another operand has the shape of this one, so that it can be written over it."""
    return not isinstance(other, Tensor) or other.shape == tensor.shape


def _functional_dropout(value: Any, run: Pass, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return dropped(value, p, Site(run, may_overwrite=False)) if training and run.mode is Mode.TRAIN and p > 0 else value


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Slots and batch as one batch: vmap would fall back to a loop."""
    rows = [as_rows(tensor) for tensor in (query, key, value)]
    if attn_mask is not None or args or kwargs or any(tensor.ndim < 4 for tensor in rows):
        return _vmapped(F.scaled_dot_product_attention, (*rows, attn_mask, *args), kwargs)  # type: ignore[no-any-return]
    out = F.scaled_dot_product_attention(*(tensor.flatten(0, 1) for tensor in rows))
    return out.unflatten(0, rows[0].shape[:2])  # type: ignore[no-any-return,no-untyped-call]


def _vmapped(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Any other operation: over the slots of its tensors, everything else the same for all."""
    flat = [as_rows(leaf) for leaf in (*_leaves(args), *_leaves(kwargs))]
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]

    def within(*own: Tensor) -> Any:
        left = iter(own)
        return function(*_refilled(args, left), **_refilled(kwargs, left))

    return vmap(within)(*tensors)


def _refilled(value: Any, tensors: Any) -> Any:
    """The same structure, with the next tensors in the places of tensors."""
    if isinstance(value, Mapping):
        return {key: _refilled(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_refilled(item, tensors) for item in value)
    return next(tensors) if isinstance(value, Tensor | Maps) else value


def _axis(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


SHIFTED: dict[Any, Callable[..., Any]] = {
    "transpose": lambda rows, first, second: rows.transpose(_axis(first), _axis(second)),
    "flatten": lambda rows, first=0, last=-1: rows.flatten(_axis(first), _axis(last)),
    torch.flatten: lambda rows, first=0, last=-1: rows.flatten(_axis(first), _axis(last)),
    "unflatten": lambda rows, axis, sizes: rows.unflatten(_axis(axis), sizes),
}
"""Operations that name axes: each stands one further along."""
