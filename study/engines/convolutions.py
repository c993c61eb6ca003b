"""Convolutions of all slots at once, in the way that is faster for their shape.

grouped     one kernel, with a group for each slot
apart       a kernel for each slot, and their outputs put together

On a CPU grouped kernels were faster in all that was measured. On a GPU that depends on shape, precision and library, by more than a factor
of ten in either direction: there both are timed when a shape is met first, and the faster one is kept.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDS = 3
"""Times that each way is timed, after once that warms up."""


class Convolution(NamedTuple):
    """What the slots have in common."""

    slots: int
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    """Of each slot's own."""

    @classmethod
    def of(cls, module: nn.Conv2d, slots: int) -> "Convolution":
        """A module of torch's, for so many slots."""
        return cls(slots, module.stride, module.padding, module.dilation, module.groups)


def convolved(images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> Tensor:
    """Every slot's images with its own weights.

    Args:
        images: [batch, slots x channels, height, width]
        weights: [slots, outputs, channels, ...]
        biases: [slots, outputs], or None.

    Returns:
        [batch, slots x outputs, height, width]
    """
    return WAYS[_way(images, weights, biases, how)](images, weights, biases, how)


def _grouped(images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> Tensor:
    bias = None if biases is None else biases.flatten()
    return F.conv2d(images, weights.flatten(0, 1), bias, how.stride, how.padding, how.dilation, how.slots * how.groups)


def _apart(images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> Tensor:
    own = zip(images.chunk(how.slots, dim=1), weights, biases if biases is not None else [None] * how.slots, strict=True)
    return torch.cat([F.conv2d(*one, how.stride, how.padding, how.dilation, how.groups) for one in own], dim=1)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Convolution], Tensor]] = {"grouped": _grouped, "apart": _apart}

_known: dict[tuple[object, ...], str] = {}


def _way(images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> str:
    if not images.is_cuda:
        return "grouped"
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype
    key = (how, images.shape, weights.shape, precision, biases is None, weights.requires_grad, images.requires_grad, images.device)
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed, and a step is not recorded before it was taken
            return "grouped"
        _known[key] = _faster(images, weights, biases, how)
    return _known[key]


def _faster(images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> str:
    """The way that takes less time, for tensors like these, backward included where they have one."""
    return min(WAYS, key=lambda way: _seconds(WAYS[way], images, weights, biases, how))


def _seconds(way: Callable[..., Tensor], images: Tensor, weights: Tensor, biases: Tensor | None, how: Convolution) -> float:
    inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (images, weights)]
    learned = [tensor for tensor in inputs if tensor.requires_grad]
    times = []
    for _ in range(ROUNDS + 1):
        start = _now(images.device)
        out = way(*inputs, biases, how)
        if learned and out.requires_grad:
            torch.autograd.grad(out, learned, torch.ones_like(out))
        times.append(_now(images.device) - start)
    return min(times[1:])


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
