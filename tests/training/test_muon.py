"""Muon: which weights it moves and how, against torch.optim.Muon, and what it leaves to adamw."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from study.errors import ModelError
from study.optimizer import AUX_LR, OptimizerSpec
from study.training.decay import build_optimizer
from study.training.effective_lr import EffectiveLR
from study.training.models import build_model
from study.training.roles import parameter_roles
from study.training.schedules import build_scheduler
from study.training.updates import PlannedOptimizer, muon, orthogonalized
from study.trial import ModelSpec, ScheduleSpec

STEPS = 6
BFLOAT16 = 0.05
"""Relative error of an update that torch orthogonalizes in bfloat16."""

BAND = (0.68, 1.21)
"""Where the iteration takes singular values that are not small."""

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 8},
    "resnet": {"width": 4, "blocks": (1, 1)},
    "weight norm": {"width": 4, "blocks": (1, 1), "norm": "weight"},
    "transformer": {"name": "transformer", "width": 8, "heads": 2},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec.model_validate(MODELS[name]), (1, 8, 8), 10).double()


def spec(**fields: Any) -> OptimizerSpec:
    return OptimizerSpec.model_validate({"rule": "muon", "lr": 0.02, "weight_decay": 0.0, **fields})


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = STEPS) -> dict[str, Tensor]:
    """The parameters after steps on gradients that depend on names and numbers only."""
    for number in range(steps):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = drawn(tuple(parameter.shape), 100 * number + index) if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def hidden(model: nn.Module) -> list[str]:
    return [role.name for role in parameter_roles(model) if role.hidden]


class Misleading(nn.Module):
    """Names and order say the opposite of the computation; `both` is hidden and the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.both, self.stem, self.aside = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.both(torch.relu(self.head(x))))
        return self.stem(x), self.aside(x), self.both(x)


def test_hidden_weights_are_those_that_another_weight_layer_follows() -> None:
    assert hidden(Misleading()) == ["head.weight"]
    assert hidden(network("mlp")) == ["layer1.linear.weight", "layer2.linear.weight"]
    resnet = network("resnet")
    assert hidden(resnet) == [name for name, parameter in resnet.named_parameters() if parameter.ndim == 4]
    assert all(name.endswith("original1") for name in hidden(network("weight norm"))) and "head.weight" not in hidden(network("weight norm"))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("exact", [False, True], ids=["bfloat16", "float64"])
def test_an_mlp_moves_as_under_torchs_muon_and_adamw(exact: bool, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the rounding of its iteration; exactly, where torch is kept from rounding there."""
    if exact:
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    ours, theirs = network("mlp"), network("mlp")
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizer = spec(weight_decay=0.1, momentum=0.8, nesterov=nesterov, aux_lr=1e-3, gamma="all", shift="decayed")
    mine = walk(ours, build_optimizer(ours, optimizer))
    named = dict(theirs.named_parameters())
    matrices = [named.pop(name) for name in hidden(theirs)]
    its = walk(theirs, Muon(matrices, 0.02, 0.1, 0.8, nesterov), AdamW(named.values(), 1e-3, weight_decay=0.1))
    for name, value in mine.items():
        limit = 1e-12 if exact or name in named else BFLOAT16
        assert (value - its[name]).norm() <= limit * (its[name] - start[name]).norm(), name


@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (32, 5), (3, 7, 12), (9, 1)])
def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_singular_vectors(shape: tuple[int, ...]) -> None:
    matrix = drawn(shape) * 1e3
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    after = left.mT @ orthogonalized(matrix) @ right.mT
    kept = values > 0.05 * torch.linalg.vector_norm(matrix, dim=(-2, -1))[..., None]
    found = after.diagonal(dim1=-2, dim2=-1)
    assert ((found > BAND[0]) & (found < BAND[1]))[kept].all() and kept.double().mean() > 0.8
    torch.testing.assert_close(after, torch.diag_embed(found), rtol=0, atol=1e-10)


def test_nothing_is_orthogonalized_into_nothing() -> None:
    assert not orthogonalized(torch.zeros(3, 4)).any()


def test_kernels_move_as_the_matrices_of_their_output_channels() -> None:
    kernel, group = drawn((8, 3, 2, 2)), {"momentum": 0.9, "nesterov": True}
    update = muon(kernel, {}, group)
    torch.testing.assert_close(update.flatten(1), muon(kernel.flatten(1), {}, group), rtol=1e-12, atol=1e-12)
    values = torch.linalg.svdvals(update.flatten(1))
    assert BAND[0] < float(values.min()) and float(values.max()) < BAND[1]
    tall = torch.linalg.svdvals(muon(drawn((8, 2)), {}, group))
    assert BAND[0] < float(tall.min()) / 2 and float(tall.max()) / 2 < BAND[1]


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_claimed_once_by_the_rule_that_its_role_asks_for(model: str) -> None:
    built = network(model)
    optimizer = build_optimizer(built, spec(weight_decay=0.1, gamma="all@1", shift="decayed", target="init"))
    assert isinstance(optimizer, PlannedOptimizer)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    claimed = [(names[id(parameter)], group["rule"], group["lr"]) for group in optimizer.param_groups for parameter in group["params"]]
    expected = [(name, "muon", 0.02) if name in hidden(built) else (name, "adamw", AUX_LR) for name in names.values()]
    assert sorted(claimed) == sorted(expected)
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_frozen_parameters_stay_where_they_are_and_the_others_move() -> None:
    model = network("resnet")
    frozen = {"layer1.0.conv1.weight", "layer1.0.norm1.weight", "head.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = walk(model, build_optimizer(model, spec(weight_decay=0.1)))
    assert {name for name, value in after.items() if torch.equal(value, before[name])} == frozen


def test_decay_shrinks_beside_the_step_by_each_rules_own_lr() -> None:
    model = network("resnet")
    optimizer = build_optimizer(model, spec(weight_decay=0.3, lr=0.1, aux_lr=0.01, gamma="last", gamma_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, shrink in {"stem.conv.weight": 0.97, "head.weight": 0.997, "layer1.0.norm2.weight": 0.995, "layer1.0.norm1.weight": 1.0}.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), shrink * before[name])


def test_the_schedule_scales_both_rates_and_samples_say_which_one_moved_a_layer() -> None:
    model = network("mlp")
    optimizer = build_optimizer(model, spec(aux_lr=1e-3, weight_decay=0.1))
    scheduler = build_scheduler(optimizer, ScheduleSpec(shape="linear"), 10)
    tracer = EffectiveLR(model, optimizer, every=5)
    for _ in range(5):
        walk(model, optimizer, steps=1)
        scheduler.step()
    rows = tracer.sample()
    assert rows is not None
    assert {layer: row.lr for layer, row in rows.items()} == pytest.approx({"layer1.linear": 0.012, "layer2.linear": 0.012, "head": 6e-4})
    assert (rows["head"].coordinate_rate is None, rows["layer1.linear"].coordinate_rate is None) == (False, True)
    for row in rows.values():
        assert row.effective_lr == pytest.approx(row.lr / row.weight_norm, rel=1e-12)
        assert row.relaxation_time == pytest.approx(1 / (2 * row.lr * 0.1))
        assert row.rotation_expected is None


def test_muon_without_a_hidden_weight_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"no weight of the model is known to be hidden.*use adamw"):
        build_optimizer(nn.Linear(3, 2), spec())
