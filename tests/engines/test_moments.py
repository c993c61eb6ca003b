"""Moments: what an optimizer remembers goes by one name in every engine, and an optimizer that is given it goes on as if nothing had happened."""

from typing import Any

import pytest
import torch
from torch import nn

from study.engines.moments import moments_of, restore_moments
from study.optimizer import OptimizerSpec
from study.training.decay import build_optimizer
from study.training.models import build_model
from study.trial import ModelSpec

OPTIMIZERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sgd": ({"momentum": 0.9}, {"m"}),
    "sgd without momentum": ({"momentum": 0.0}, set()),
    "sgd, decoupled": ({"decay": "decoupled"}, {"m"}),
    "adam": ({"rule": "adam"}, {"m", "v"}),
    "adamw": ({"rule": "adamw"}, {"m", "v"}),
    "adamw, towards its beginning": ({"rule": "adamw", "target": "init", "shift": "decayed"}, {"m", "v", "initial"}),
    "lion": ({"rule": "lion"}, {"m"}),
    "muon": ({"rule": "muon"}, {"m", "v"}),
    "rotational": ({"constraint": {"name": "rotational"}}, {"m", "square", "initial_norm"}),
    "volumization": ({"constraint": {"name": "volumization"}}, {"m", "bound"}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(width=4, blocks=(1,)), (1, 4, 4), 10).double()


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on gradients that depend on the step's number only."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_that_is_given_the_moments_goes_on_bit_for_bit(case: str) -> None:
    fields, names = OPTIMIZERS[case]
    spec = OptimizerSpec.model_validate({"lr": 0.01, "weight_decay": 0.1, **fields})
    whole, later = network(), network()
    optimizer, fresh = build_optimizer(whole, spec), build_optimizer(later, spec)
    walk(whole, optimizer, range(5))
    remembered = moments_of(whole, optimizer)
    assert remembered.keys() == dict(whole.named_parameters()).keys()
    assert set().union(*remembered.values()) == names
    later.load_state_dict(whole.state_dict())
    restore_moments(later, fresh, remembered, 5)
    walk(whole, optimizer, range(5, 9))
    walk(later, fresh, range(5, 9))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, later.get_parameter(name)), name


def test_restored_moments_are_copies() -> None:
    model, spec = network(), OptimizerSpec(rule="adam")
    optimizer, other = build_optimizer(model, spec), build_optimizer(model, spec)
    walk(model, optimizer, range(2))
    remembered = moments_of(model, optimizer)
    kept = {name: moments["m"].clone() for name, moments in remembered.items()}
    restore_moments(model, other, remembered, 2)
    walk(model, other, range(2, 4))
    for name, value in kept.items():
        assert torch.equal(remembered[name]["m"], value), name


def test_before_the_first_step_there_is_nothing_to_remember() -> None:
    model = network()
    assert not any(moments_of(model, build_optimizer(model, OptimizerSpec())).values())
