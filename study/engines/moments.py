"""Moments: what an optimizer remembers of each parameter, by one name in every engine's snapshots.

name            of                          in torch
m               every rule                  momentum_buffer, exp_avg
v               adam, adamw                 exp_avg_sq
square          the rotational constraint   -
initial, initial_norm, bound                -           of constraints and of decay towards the initial value

All parameters have taken as many steps as the trial.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NAMES = {"momentum_buffer": "m", "exp_avg": "m", "exp_avg_sq": "v"}

Remembered = dict[str, dict[str, Any]]
"""Parameter to moment to its value."""


def moments_of(model: nn.Module, optimizer: Optimizer) -> Remembered:
    """What an optimizer remembers of a model's parameters; step counts left out."""
    found: Remembered = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        found[name] = {NAMES.get(key, key): value for key, value in state.items() if key != "step" and value is not None}
    return found


def restore_moments(model: nn.Module, optimizer: Optimizer, remembered: Remembered, steps: int) -> None:
    """Makes a fresh optimizer remember what `moments_of` found after so many steps."""
    parameters = dict(model.named_parameters())
    names = {"m": "exp_avg", "v": "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {}
    names = {"m": "momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else names
    for name, moments in remembered.items():
        parameter = parameters[name]
        if moments:
            own = {names.get(key, key): _like(value, parameter) for key, value in moments.items()}
            # torch's own rules count in tensors, ours in integers.
            count = torch.tensor(float(steps)) if isinstance(optimizer, torch.optim.Adam) else steps
            optimizer.state[parameter] = own if isinstance(optimizer, torch.optim.SGD) else {**own, "step": count}


def _like(value: Any, parameter: Tensor) -> Any:
    return value.detach().clone().to(parameter.device) if isinstance(value, Tensor) else value
