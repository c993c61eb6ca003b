"""Roles are read from the computation: where a gain stands, never what it is called."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study.errors import ModelError, UnclaimedParameter, UnknownPlace
from study.training.models import build_model
from study.training.roles import Role, gain_places, parameter_roles
from study.trial import ModelSpec


def model_of(**fields: object) -> nn.Module:
    return build_model(ModelSpec.model_validate(fields), (1, 8, 8), 10)


def counts(model: nn.Module) -> dict[str, int]:
    places = list(gain_places(model).values())
    return {place: places.count(place) for place in dict.fromkeys(places)}


CASES = {
    "resnet-18 layout": ({"blocks": [2, 2, 2, 2], "width": 4}, {"stem": 1, "inner": 8, "last": 8, "down": 3}),
    "resnet-50 layout": ({"blocks": [3, 4, 6, 3], "width": 4, "block": "bottleneck"}, {"stem": 1, "inner": 32, "last": 16, "down": 4}),
    "pre-activation resnet": ({"blocks": [2, 2], "width": 4, "order": "pre"}, {"inner": 7, "stream": 1, "final": 1}),
    "mlp": ({"name": "mlp", "depth": 3}, {"inner": 2, "final": 1}),
    "pre-LN transformer": ({"name": "transformer", "order": "pre", "depth": 2}, {"inner": 4, "final": 1}),
    "post-LN transformer": ({"name": "transformer", "order": "post", "depth": 2}, {"stem": 1, "stream": 4}),
    "resnet with layer norm": ({"blocks": [2, 2], "norm": "layer", "width": 4}, {"stem": 1, "inner": 4, "last": 4, "down": 1}),
    "resnet with group norm": ({"blocks": [2, 2], "norm": "group", "width": 4}, {"stem": 1, "inner": 4, "last": 4, "down": 1}),
    "resnet with rms norm": ({"blocks": [2, 2], "norm": "rms", "width": 4}, {"stem": 1, "inner": 4, "last": 4, "down": 1}),
    "resnet with weight norm": ({"blocks": [2, 2], "norm": "weight", "width": 4}, {"stem": 1, "inner": 4, "last": 4, "down": 1}),
    "no norms": ({"blocks": [2, 2], "norm": "none", "width": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_gains_of_built_in_models_stand_where_they_stand(case: str) -> None:
    fields, expected = CASES[case]
    assert counts(model_of(**fields)) == expected


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_exactly_one_role(case: str) -> None:
    model = model_of(**CASES[case][0])
    assert [role.name for role in parameter_roles(model)] == [name for name, _ in model.named_parameters()]


def test_names_are_no_evidence() -> None:
    class Misleading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn2 = nn.BatchNorm1d(4)
            self.weight = nn.Linear(4, 4, bias=False)
            self.bn1 = nn.BatchNorm1d(4)
            self.downsample = nn.Linear(4, 4, bias=False)
            self.bias = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bias(x + self.bn1(self.downsample(torch.relu(self.bn2(self.weight(x))))))

    assert gain_places(Misleading()) == {"bn2.weight": "inner", "bn1.weight": "last"}


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "rms", "weight"])
@pytest.mark.parametrize("fields", [{"blocks": [1, 1], "width": 4}, {"name": "mlp", "width": 8}], ids=["resnet", "mlp"])
def test_weights_called_scale_invariant_leave_the_output_unchanged_when_scaled(fields: dict[str, object], norm: str) -> None:
    model = model_of(**fields, norm=norm).double().train()
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-18
    images = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    before = model(images)
    invariant = [role for role in parameter_roles(model) if role.scale_invariant]
    assert invariant
    for role in invariant:
        with torch.no_grad():
            parameters[role.name].mul_(3)
        assert (model(images) - before).abs().max() < 1e-9, role.name
        with torch.no_grad():
            parameters[role.name].div_(3)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_weights_not_called_scale_invariant_change_the_output_when_scaled(norm: str) -> None:
    model = model_of(blocks=[1, 1], width=4, norm=norm).double().train()
    images = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    before = model(images)
    for role in parameter_roles(model):
        if role.role is Role.WEIGHT and not role.scale_invariant:
            with torch.no_grad():
                parameters[role.name].mul_(3)
            assert (model(images) - before).abs().max() > 1e-3, role.name
            with torch.no_grad():
                parameters[role.name].div_(3)


def test_transformers_have_no_scale_invariant_weights_by_themselves() -> None:
    for order in ("pre", "post"):
        assert not any(role.scale_invariant for role in parameter_roles(model_of(name="transformer", order=order)))


def test_position_tables_are_embeddings_and_layer_scales_are_scales() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mystery = nn.Parameter(torch.ones(4))
            self.table = nn.Parameter(torch.zeros(4))
            self.norm = nn.LayerNorm(4)
            self.inside = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.table
            return self.head(x + self.mystery * self.inside(self.norm(x)))

    roles = {role.name: role.role for role in parameter_roles(Scaled())}
    assert roles["mystery"] is Role.SCALE
    assert roles["table"] is Role.EMBEDDING
    assert roles["norm.bias"] is Role.SHIFT
    assert gain_places(Scaled()) == {"norm.weight": "inner"}


def test_an_unused_bare_parameter_is_named_in_the_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(3))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    with pytest.raises(UnclaimedParameter, match="'temperature'"):
        parameter_roles(Idle())


class ValueDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(x))) if x.sum() > 0 else x


def test_a_forward_pass_that_cannot_be_read_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UnknownPlace, match=r"could not be read.*norm\.weight.*model\.places"):
        gain_places(ValueDependent())


def test_places_can_be_named_by_pattern() -> None:
    assert gain_places(ValueDependent(), places={"nor*": "final"}) == {"norm.weight": "final"}
    with pytest.raises(ModelError, match="matches no gain"):
        gain_places(ValueDependent(), places={"nor*": "final", "stray*": "last"})
