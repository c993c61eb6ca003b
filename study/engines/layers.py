"""Layers: torch's modules over slots, each slot with weights of its own.

layout      tensor                        used by
Maps        [batch, slots x C, ...]       convolutions, poolings, BatchNorm: one grouped kernel for all slots
rows        [slots, batch, ...]           linear layers (batched matrix products), attention, everything else
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from study.engines.arithmetic import Mode, Pass
from study.engines.convolutions import Convolution, convolved
from study.training.owners import gain_of_weight_norm


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


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operation stands."""

    run: Pass
    may_overwrite: bool
    """Whether its first input is needed by nobody else, so that it may be written over."""


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
    return Maps(convolved(maps.tensor, _grouped_weight(module, own), own.get("bias"), Convolution.of(module, maps.slots)), maps.slots)


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
        out = out * beside(own["weight"], rows.ndim)
    return out + beside(own["bias"], rows.ndim) if own.get("bias") is not None else out


def beside(values: Tensor, ndim: int) -> Tensor:
    """Values [slots, *shape] shaped to stand beside rows of `ndim` axes, the last of which are the shape."""
    return values.reshape(len(values), *[1] * (ndim - values.ndim), *values.shape[1:])


def _relu(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    # Writing over a view would make autograd copy it.
    overwrites = site.may_overwrite and (value.tensor if isinstance(value, Maps) else value)._base is None
    return on_either(F.relu_ if overwrites else F.relu, value)


def _pointwise(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return on_either(module, value)


def _identity(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return value


def on_either(function: Callable[..., Tensor], value: Any, *args: Any, **kwargs: Any) -> Any:
    """An element-wise function, or one of each image's maps, in the layout that its input has."""
    if isinstance(value, Maps):
        return Maps(function(value.tensor, *args, **kwargs), value.slots)
    return function(value, *args, **kwargs)


def _pooled(module: nn.Module, value: Any, own: Mapping[str, Tensor], site: Site) -> Any:
    return on_either(module, as_maps(value))


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
