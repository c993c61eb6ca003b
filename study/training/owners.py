"""Owners: what the type of a torch module says about the parameters that it holds."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _WeightNorm

NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Torch's own norms; `weight` is their gain, `bias` their shift."""


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter by its identity: a tied one has the first of its names."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def gain_of_weight_norm(module: nn.Module) -> nn.Parameter | None:
    """The gain of a module whose weight torch's weight_norm splits into gain and direction."""
    steps: Any = getattr(module, "parametrizations", {})
    if "weight" in steps and any(isinstance(step, _WeightNorm) for step in steps["weight"]):
        gain: nn.Parameter = steps["weight"].original0
        return gain
    return None
