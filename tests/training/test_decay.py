"""Decay plans: role and policy decide rate and anchor, and torch does what the plan says."""

import copy
import math

import pytest
import torch
from torch import nn

from study.errors import ModelError, NotExpressible
from study.training.decay import DecoupledSGD, absent_places, build_optimizer, decay_plan, param_groups
from study.training.models import build_model
from study.training.roles import Role, parameter_roles
from study.trial import PLACES, ModelSpec, OptimizerSpec


def resnet(order: str = "post") -> nn.Module:
    return build_model(ModelSpec(width=4, blocks=(1, 1), order=order), (1, 8, 8), 10)  # type: ignore[arg-type]


def rates(policy: str, **fields: object) -> dict[str, tuple[float, float]]:
    optimizer = OptimizerSpec.model_validate({"weight_decay": 0.01, "gamma": policy, **fields})
    plan = decay_plan(parameter_roles(resnet()), optimizer)
    return {planned.parameter.place: (planned.rate, planned.anchor) for planned in plan if planned.parameter.role is Role.GAIN}


EXEMPT = (0.0, 0.0)
POLICIES = {
    "none": {"stem": EXEMPT, "inner": EXEMPT, "last": EXEMPT, "down": EXEMPT},
    "all": {"stem": (0.01, 0.0), "inner": (0.01, 0.0), "last": (0.01, 0.0), "down": (0.01, 0.0)},
    "all@1": {"stem": (0.01, 1.0), "inner": (0.01, 1.0), "last": (0.01, 1.0), "down": (0.01, 1.0)},
    "last": {"stem": EXEMPT, "inner": EXEMPT, "last": (0.01, 0.0), "down": EXEMPT},
    "inner@1+down": {"stem": EXEMPT, "inner": (0.01, 1.0), "last": EXEMPT, "down": (0.01, 0.0)},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_decays_the_gains_that_it_names(policy: str) -> None:
    assert rates(policy) == POLICIES[policy]


def test_gains_can_have_a_strength_of_their_own() -> None:
    assert rates("last", gamma_decay=0.04)["last"] == (0.04, 0.0)
    assert rates("last", gamma_decay=0.0)["last"] == EXEMPT


@pytest.mark.parametrize(("field", "role"), [("shift", Role.SHIFT), ("shift", Role.BIAS), ("embedding", Role.EMBEDDING)])
def test_shifts_and_embeddings_are_decayed_or_exempt(field: str, role: Role) -> None:
    model = build_model(ModelSpec(name="transformer"), (1, 8, 8), 10)
    for choice, rate in (("decayed", 0.01), ("exempt", 0.0)):
        plan = decay_plan(parameter_roles(model), OptimizerSpec.model_validate({"weight_decay": 0.01, field: choice}))
        assert {planned.rate for planned in plan if planned.parameter.role is role} == {rate}


@pytest.mark.parametrize("policy", [*PLACES[:4], "none", "all", "all@1", "inner+last@1"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_one_optimizer_holds_every_parameter_once(policy: str, rule: str, decay: str) -> None:
    model = resnet()
    optimizer = build_optimizer(model, OptimizerSpec.model_validate({"rule": rule, "gamma": policy, "decay": decay}))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("policy", ["none", "all", "all@1", "last@1+down"])
def test_ten_steps_follow_the_written_rule(rule: str, decay: str, policy: str) -> None:
    """Every parameter against the update written out by hand in float64."""
    torch.manual_seed(0)
    model = resnet().double()
    spec = OptimizerSpec.model_validate({"rule": rule, "lr": 0.05, "weight_decay": 0.1, "gamma": policy, "decay": decay})
    optimizer = build_optimizer(model, spec)
    plan = {planned.parameter.name: planned for planned in decay_plan(parameter_roles(model), spec)}
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 11):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            value, planned = expected[name], plan[name]
            pull = planned.rate * (value - planned.anchor)
            if decay == "coupled":
                gradient = gradient + pull
            if rule == "sgd":
                first[name] = 0.9 * first[name] + gradient
                update = first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = value - 0.05 * update - (0.05 * pull if decay == "decoupled" else 0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-11, atol=1e-12), name


def test_nesterov_with_decoupled_decay_equals_torch_when_nothing_decays() -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    mine = DecoupledSGD(ours.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    torchs = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(5):
        gradients = [torch.randn_like(parameter) for parameter in ours.parameters()]
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-6)


def test_param_groups_say_what_torch_cannot_express() -> None:
    model = resnet()
    assert sum(len(group["params"]) for group in param_groups(model, OptimizerSpec(gamma="last"))) == len(list(model.parameters()))
    with pytest.raises(NotExpressible, match=r"pulls 2 gains to 1.*build_optimizer"):
        param_groups(model, OptimizerSpec(gamma="last@1"))
    with pytest.raises(NotExpressible, match="couples decay"):
        param_groups(model, OptimizerSpec(decay="decoupled"))


def test_param_groups_train_in_plain_torch() -> None:
    model = resnet()
    groups = param_groups(model, OptimizerSpec(gamma="last", weight_decay=0.3))
    optimizer = torch.optim.SGD(groups)
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.3]
    assert math.isclose(optimizer.param_groups[0]["momentum"], 0.9)


def test_a_policy_that_would_do_nothing_is_an_error_and_a_half_empty_one_is_not() -> None:
    roles = parameter_roles(build_model(ModelSpec(name="mlp"), (64,), 10))
    with pytest.raises(ModelError, match=r"no gain at down.*has gains at final, inner"):
        absent_places(roles, "down")
    assert absent_places(roles, "inner+down") == ["down"]
    assert absent_places(roles, "all") == absent_places(roles, "none") == []
