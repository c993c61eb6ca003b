"""Decay plans: role and policy decide rate and anchor, and torch does what the plan says."""

import math

import pytest
import torch
from torch import nn

from study.errors import ModelError, NotExpressible
from study.optimizer import PLACES, OptimizerSpec
from study.training.decay import absent_places, build_optimizer, decay_plan, param_groups, plan_hash
from study.training.models import build_model
from study.training.roles import Role, parameter_roles
from study.trial import ModelSpec


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


def test_param_groups_say_what_torch_cannot_express() -> None:
    model = resnet()
    assert sum(len(group["params"]) for group in param_groups(model, OptimizerSpec(gamma="last"))) == len(list(model.parameters()))
    with pytest.raises(NotExpressible, match=r"pulls 2 parameters elsewhere: layer1.0.norm2.weight, .*build_optimizer"):
        param_groups(model, OptimizerSpec(gamma="last@1"))
    with pytest.raises(NotExpressible, match=r"couples decay .* for 7 parameters: stem.conv.weight"):
        param_groups(model, OptimizerSpec(decay="decoupled"))
    with pytest.raises(NotExpressible, match=r"no constraint rescale, which holds 6 parameters"):
        param_groups(model, OptimizerSpec.model_validate({"constraint": {"name": "rescale"}}))
    with pytest.raises(NotExpressible, match="no Lion"):
        param_groups(model, OptimizerSpec(rule="lion"))
    with pytest.raises(NotExpressible, match=r"torch\.optim\.Muon takes matrices only"):
        param_groups(model, OptimizerSpec(rule="muon"))
    assert param_groups(model, OptimizerSpec(decay="decoupled", weight_decay=0.0))


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


def test_the_hash_of_a_plan_tells_plans_apart_and_not_their_spelling() -> None:
    roles = parameter_roles(resnet())

    def hashed(**fields: object) -> str:
        return plan_hash(decay_plan(roles, OptimizerSpec.model_validate(fields)))

    assert hashed(gamma="inner+last") == hashed(gamma="last+inner") == hashed(gamma="last+inner", lr=0.3)
    assert len({hashed(gamma=policy) for policy in ("none", "last", "last@1", "all")}) == 4


@pytest.mark.parametrize(("field", "role"), [("shift", Role.SHIFT), ("embedding", Role.EMBEDDING)])
def test_roles_can_have_strengths_of_their_own(field: str, role: Role) -> None:
    model = build_model(ModelSpec(name="transformer"), (1, 8, 8), 10)
    plan = decay_plan(parameter_roles(model), OptimizerSpec.model_validate({field: "decayed", f"{field}_decay": 0.7}))
    assert {planned.rate for planned in plan if planned.parameter.role is role} == {0.7}
