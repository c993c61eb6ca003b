"""Losses: what a step descends, as functions of (logits [num_images, num_classes], labels [num_images]).

cross_entropy    mean negative log-likelihood, in nats
mse              mean squared distance from one-hot labels, over images and classes
import:...       the user's own
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from study.errors import ImportFailed
from study.training.imported import user_function
from study.trial import IMPORT

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def loss_function(name: str) -> Loss:
    """The loss that a trial's `loss` names: a function of logits and labels to a scalar.

    Raises:
        ImportFailed: if the user's own cannot be imported; when called, if it raises or returns no scalar.
    """
    if name.startswith(IMPORT):
        return _users(name)
    return {"cross_entropy": cross_entropy, "mse": mse}[name]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, in nats."""
    return F.cross_entropy(logits, labels)


def mse(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance between logits and one-hot labels, over images and classes."""
    classes = torch.arange(logits.shape[-1], device=labels.device)
    return F.mse_loss(logits, (labels[:, None] == classes).to(logits.dtype))


def _users(path: str) -> Loss:
    function = user_function(path)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = function(logits, labels)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ImportFailed(f"{path} must return a scalar tensor (got {got})", remedy="take the mean over the images")
        return value

    return loss
