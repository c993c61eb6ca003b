"""Conversion: a model's own computation, as torch.fx reads it, with every operation widened by a slot axis.

    layout      tensor                        used by
    Maps        [batch, slots x C, ...]       convolutions, poolings, BatchNorm: one grouped kernel for all slots
    rows        [slots, batch, ...]           linear layers (batched matrix products), attention, everything else

An operation that is not in the tables goes through torch.func.vmap by itself. Nothing here is trusted: `admission.py` compares the
result with the solo engine before a study uses it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from study.engines.arithmetic import Mode, Pass, reset_statistics
from study.training.owners import gain_of_weight_norm
from study.training.symbolic import trace_module


@dataclass(slots=True)
class Maps:
    """Images or vectors of all slots side by side in the channels: [batch, slots x channels, ...]."""

    tensor: Tensor
    slots: int

    def rows(self) -> Tensor:
        """A view as [slots, batch, channels, ...]."""
        return self.tensor.unflatten(1, (self.slots, -1)).transpose(0, 1)  # type: ignore[no-any-return,no-untyped-call]


def as_rows(value: Any) -> Any:
    """Maps as rows; everything else as it is."""
    return value.rows() if isinstance(value, Maps) else value


def as_maps(value: Any) -> Maps:
    """Rows [slots, batch, C, H, W] side by side, channels-last."""
    if isinstance(value, Maps):
        return value
    return Maps(value.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last), len(value))


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

    def _module(self, node: fx.Node, known: Mapping[fx.Node, Any], run: Pass) -> Any:
        path = str(node.target)
        module = self._modules[path]
        own = _own_values(module, path, run.values)
        handler = next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)
        value = _given(node.args[0], known)
        if handler is not None and len(node.args) == 1 and not node.kwargs:
            return handler(module, value, own, Site(run, _may_overwrite(node, self._modules)))
        arguments = [as_rows(_given(argument, known)) for argument in node.args]
        return vmap(lambda values, *inputs: functional_call(module, values, inputs))(own, *arguments)


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operation stands."""

    run: Pass
    may_overwrite: bool
    """Whether its first input is needed by nobody else, so that it may be written over."""


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


def _own_values(module: nn.Module, path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a module's own parameters and buffers, by the names that it knows them by."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return {name: values[f"{path}.{name}"] for name in names}


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


def _grouped_weight(module: nn.Module, own: Mapping[str, Tensor]) -> Tensor:
    """A layer's weights [slots, ...], put together where the layer keeps them as gain and direction.

    Source: Salimans and Kingma, Weight Normalization, eq. 2, arXiv:1602.07868.
    """
    if gain_of_weight_norm(module) is None:
        return own["weight"]
    gain, direction = own["parametrizations.weight.original0"], own["parametrizations.weight.original1"]
    unit: Tensor = direction / torch.linalg.vector_norm(direction, dim=tuple(range(2, direction.ndim)), keepdim=True)
    return gain * unit


def _conv2d(module: nn.Conv2d, value: Any, own: Mapping[str, Tensor], site: Site) -> Maps:
    if module.padding_mode != "zeros":
        return _vmapped_module(module, value, own, site)  # type: ignore[no-any-return]
    maps = as_maps(value)
    bias = own["bias"].flatten() if "bias" in own else None
    weight = _grouped_weight(module, own).flatten(0, 1)
    return Maps(
        F.conv2d(maps.tensor, weight, bias, module.stride, module.padding, module.dilation, maps.slots * module.groups),
        maps.slots,
    )


def _linear(module: nn.Linear, value: Any, own: Mapping[str, Tensor], site: Site) -> Tensor:
    rows: Tensor = as_rows(value)
    flat = rows.flatten(1, -2) if rows.ndim > 3 else rows
    weight, bias = _grouped_weight(module, own), own.get("bias")
    if torch.is_autocast_enabled(flat.device.type):
        across = weight.transpose(1, 2)
        out = torch.bmm(flat, across) if bias is None else torch.baddbmm(bias.unsqueeze(1), flat, across)
    else:
        out = _BatchedLinear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return out.unflatten(1, rows.shape[1:-1]) if rows.ndim > 3 else out  # type: ignore[no-untyped-call]


class _BatchedLinear(torch.autograd.Function):
    """F.linear of every slot: inputs [slots, n, in], weights [slots, out, in], biases [slots, out] or None.

    torch's own derivative of a transposed factor lies transposed in memory, which makes every later step of the optimizer slow.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        """[slots, n, out]."""
        ctx.save_for_backward(inputs, weights)
        ctx.has_bias = biases is not None
        across = weights.transpose(1, 2)
        return torch.bmm(inputs, across) if biases is None else torch.baddbmm(biases.unsqueeze(1), inputs, across)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Derivatives by inputs, weights and biases."""
        inputs, weights = ctx.saved_tensors
        needs_inputs, needs_weights, _ = ctx.needs_input_grad
        by_inputs = torch.bmm(gradients, weights) if needs_inputs else None
        by_weights = torch.bmm(gradients.transpose(1, 2), inputs) if needs_weights else None
        return by_inputs, by_weights, gradients.sum(1) if ctx.has_bias else None


def _batch_norm(module: _BatchNorm, value: Any, own: dict[str, Tensor], site: Site) -> Any:
    """Per-slot statistics for free: every slot's channels are channels of their own.

    Running statistics are left alone in training, as they are estimated anew before every evaluation.
    """
    joined, slots = (value.tensor, value.slots) if isinstance(value, Maps) else (value.transpose(0, 1).flatten(1, 2), len(value))
    estimates = site.run.mode is Mode.ESTIMATE and module.track_running_stats
    reads = site.run.mode is not Mode.TRAIN and module.track_running_stats
    mean, variance = (own["running_mean"].view(-1), own["running_var"].view(-1)) if reads else (None, None)
    gain, shift = (own["weight"].flatten(), own["bias"].flatten()) if module.affine else (None, None)
    share = 1.0
    if estimates:
        # The same for all slots: how often this pass has come by here.
        share = 1 / int(own["num_batches_tracked"].add_(1).flatten()[0])
    out = F.batch_norm(joined, mean, variance, gain, shift, estimates or not reads, share, module.eps)
    return Maps(out, slots)


def _group_norm(module: nn.GroupNorm, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    if not isinstance(value, Maps):
        return _vmapped_module(module, value, own, site)
    gain, shift = (own["weight"].flatten(), own["bias"].flatten()) if module.affine else (None, None)
    return Maps(F.group_norm(value.tensor, value.slots * module.num_groups, gain, shift, module.eps), value.slots)


def _layer_norm(module: nn.LayerNorm, value: Any, own: Mapping[str, Tensor], site: Site) -> Tensor:
    rows: Tensor = as_rows(value)
    out = F.layer_norm(rows, module.normalized_shape, None, None, module.eps)
    if "weight" in own:
        out = out * _beside(own["weight"], rows.ndim)
    return out + _beside(own["bias"], rows.ndim) if own.get("bias") is not None else out


def _beside(values: Tensor, ndim: int) -> Tensor:
    """Values [slots, *shape] shaped to stand beside rows of `ndim` axes, the last of which are the shape."""
    return values.reshape(len(values), *[1] * (ndim - values.ndim), *values.shape[1:])


def _relu(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    # Writing over a view would make autograd copy it.
    overwrites = site.may_overwrite and (value.tensor if isinstance(value, Maps) else value)._base is None
    return _on_either(F.relu_ if overwrites else F.relu, value)


def _pointwise(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return _on_either(module, value)


def _identity(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return value


def _on_either(function: Callable[..., Tensor], value: Any, *args: Any, **kwargs: Any) -> Any:
    """An element-wise function, or one of each image's maps, in the layout that its input has."""
    if isinstance(value, Maps):
        return Maps(function(value.tensor, *args, **kwargs), value.slots)
    return function(value, *args, **kwargs)


def _pooled(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return _on_either(module, as_maps(value))


def _flattened(module: nn.Flatten, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    first, last = module.start_dim, module.end_dim
    return as_rows(value).flatten(first + 1 if first >= 0 else first, last + 1 if last >= 0 else last)


def _dropout(module: nn.Dropout, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return dropped(value, module.p, site) if site.run.mode is Mode.TRAIN and module.p > 0 else value


def dropped(value: Any, rate: float, site: Site) -> Tensor:
    """Dropout as torch has it, every slot's mask drawn by the slot's own generator."""
    rows: Tensor = as_rows(value)
    if rate >= 1:
        return rows * 0
    masks = [torch.empty(rows.shape[1:], dtype=rows.dtype, device=rows.device).bernoulli_(1 - rate, generator=own) for own in site.run.generators]
    return rows * torch.stack(masks).div_(1 - rate)


def _vmapped_module(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return vmap(lambda values, inputs: functional_call(module, values, (inputs,)))(dict(own), as_rows(value))


MODULES: dict[type, Callable[..., Any]] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    _BatchNorm: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _relu,
    nn.Identity: _identity,
    nn.Flatten: _flattened,
    nn.Dropout: _dropout,
    nn.AdaptiveAvgPool2d: _pooled,
    nn.AvgPool2d: _pooled,
    nn.MaxPool2d: _pooled,
    **dict.fromkeys((nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh), _pointwise),
}
"""How a module of torch's is run over slots."""

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
        return _on_either(F.relu_, first)
    if target in POINTWISE:
        return _on_either(target, first, *args[1:], **kwargs)
    if target in POOLINGS and as_rows(first).ndim == 5:
        return _on_either(target, as_maps(first), *args[1:], **kwargs)
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
    return function(*(_beside(value, axes) if isinstance(value, Tensor) and value.ndim < axes else value for value in rows))


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
