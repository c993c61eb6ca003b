"""Updates: every rule, form and constraint against a loop that a reader can check by hand, and the identities that theory demands."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from study.errors import ModelError
from study.optimizer import OptimizerSpec
from study.training.decay import build_optimizer, decay_plan, optimizer_for
from study.training.effective_lr import EffectiveLR
from study.training.models import build_model
from study.training.roles import parameter_roles
from study.training.schedules import build_scheduler
from study.training.updates import boxed, rescaled, scheduled_norm
from study.trial import ModelSpec, ScheduleSpec

STEPS = 8


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(width=4, blocks=(1, 1)), (1, 8, 8), 10).double()


def gradients(model: nn.Module) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    names = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    return [{name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in names} for _ in range(STEPS)]


def run(model: nn.Module, spec: OptimizerSpec) -> dict[str, Tensor]:
    optimizer = build_optimizer(model, spec)
    for step in gradients(model):
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def torch_loop(w: Tensor, grads: list[Tensor], spec: OptimizerSpec, rate: float) -> Tensor:
    """Torch's own arithmetic, in its own order: coupled sgd and adam, decoupled adamw, towards zero."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step, grad in enumerate(grads, 1):
        g = grad
        if spec.form == "coupled" and rate:
            g = g.add(w, alpha=rate)
        if spec.rule == "sgd":
            m = g.clone() if step == 1 else m.mul(spec.momentum).add(g)
            w = w.add(g.add(m, alpha=spec.momentum) if spec.nesterov else m, alpha=-spec.lr)
            continue
        if spec.form == "decoupled":
            w = w.mul(1 - spec.lr * rate)
        m = m.lerp(g, 1 - spec.beta1)
        v = v.mul(spec.beta2).addcmul(g, g, value=1 - spec.beta2)
        root = (v.sqrt() / (1 - spec.beta2**step) ** 0.5).add(spec.eps)
        w = w.addcdiv(m, root, value=-spec.lr / (1 - spec.beta1**step))
    return w


def planned_loop(w: Tensor, grads: list[Tensor], spec: OptimizerSpec, rate: float, anchor: Tensor | float) -> Tensor:
    """Everything that torch has not, written out."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step, grad in enumerate(grads, 1):
        pull = rate * (w - anchor) if rate else None
        g = grad + pull if spec.form == "coupled" and pull is not None else grad
        if spec.rule == "sgd":
            m = g.clone() if step == 1 else spec.momentum * m + g
            update = g + spec.momentum * m if spec.nesterov else m
        elif spec.rule == "lion":
            update = torch.sign(spec.beta1 * m + (1 - spec.beta1) * g)
            m = spec.beta2 * m + (1 - spec.beta2) * g
        else:
            m = spec.beta1 * m + (1 - spec.beta1) * g
            v = spec.beta2 * v + (1 - spec.beta2) * g**2
            update = m / (1 - spec.beta1**step) / ((v / (1 - spec.beta2**step)).sqrt() + spec.eps)
        if spec.form == "decoupled" and pull is not None:
            update = update + pull
        w = w - spec.lr * update
    return w


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "lion"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("policy", ["none", "all", "all@1", "last@1+down", "inner+last"])
@pytest.mark.parametrize("target", ["zero", "init"])
def test_every_rule_policy_and_form_is_the_plain_loop_bit_for_bit(rule: str, decay: str, policy: str, target: str) -> None:
    spec = OptimizerSpec.model_validate(
        {"rule": rule, "lr": 0.05, "weight_decay": 0.1, "gamma": policy, "decay": decay, "target": target, "shift": "decayed"}
    )
    model = resnet()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = {planned.parameter.name: planned for planned in decay_plan(parameter_roles(model), spec)}
    by_torch = type(build_optimizer(model, spec)).__module__.startswith("torch.")
    assert by_torch == (
        (rule, decay) in {("sgd", "coupled"), ("adam", "coupled"), ("adam", "decoupled"), ("adamw", "coupled"), ("adamw", "decoupled")}
        and target == "zero"
        and "@" not in policy
    )
    after, steps = run(model, spec), gradients(model)
    for name, value in after.items():
        grads, planned = [step[name] for step in steps], plan[name]
        if by_torch:
            expected = torch_loop(start[name], grads, spec, planned.rate)
        else:
            anchor = start[name] if planned.anchor == "init" else planned.anchor
            expected = planned_loop(start[name], grads, spec, planned.rate, anchor)
        assert torch.equal(value, expected), name


def test_nesterov_is_torchs() -> None:
    coupled = OptimizerSpec(nesterov=True, weight_decay=0.1)
    model = resnet()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rates = {planned.parameter.name: planned.rate for planned in decay_plan(parameter_roles(model), coupled)}
    for name, value in run(model, coupled).items():
        assert torch.equal(value, torch_loop(start[name], [step[name] for step in gradients(model)], coupled, rates[name]))


def test_sgd_with_twice_lambda_is_lambda_times_the_squared_norm_in_the_loss() -> None:
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)
    decayed, penalized = (nn.Linear(5, 1, bias=False).double() for _ in range(2))
    penalized.load_state_dict(decayed.state_dict())
    ours = build_optimizer(decayed, OptimizerSpec(lr=0.05, weight_decay=2 * 0.03))
    plain = torch.optim.SGD(penalized.parameters(), lr=0.05, momentum=0.9)
    for _ in range(50):
        ours.zero_grad()
        (decayed(x) - y).square().mean().backward()
        ours.step()
        plain.zero_grad()
        ((penalized(x) - y).square().mean() + 0.03 * penalized.weight.square().sum()).backward()
        plain.step()
    assert torch.allclose(decayed.weight, penalized.weight, rtol=1e-6)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


def net(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8, eps=1e-16),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.BatchNorm1d(8, eps=1e-16),
        nn.Linear(8, 3),
    )
    model = model.double().train()
    with torch.no_grad():
        for index in (0, 3):
            model[index].weight.mul_(scale)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 60, each: Callable[[int], None] = lambda step: None) -> list[float]:
    losses = []
    for step in range(steps):
        each(step)
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def split_groups(model: nn.Sequential, lr: float, decay: float, momentum: float, rest_lr: float = 0.1) -> torch.optim.SGD:
    invariant = [model[0].weight, model[3].weight]
    rest = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in invariant)]
    return torch.optim.SGD(
        [{"params": invariant, "lr": lr, "weight_decay": decay}, {"params": rest, "lr": rest_lr, "weight_decay": 0.0}], momentum=momentum
    )


def furthest(left: list[float], right: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_gauge_of_lr_decay_and_scale_leaves_the_loss_curve_unchanged(momentum: float) -> None:
    """(lr, decay, w) and (c^2 lr, decay / c^2, c w) are one run; without the c^2 they are two. Source: Li and Arora, arXiv:1910.07454."""
    c = 3.0
    plain, gauged, control = net(), net(c), net(c)
    base = train(plain, split_groups(plain, 0.1, 5e-3, momentum))
    same = train(gauged, split_groups(gauged, c**2 * 0.1, 5e-3 / c**2, momentum))
    other = train(control, split_groups(control, 0.1, 5e-3, momentum))
    assert furthest(base, same) < 1e-8
    assert furthest(base, other) > 1e-2


def test_constant_lr_with_decay_is_an_exponential_lr_without() -> None:
    """Source: Li and Arora, An Exponential Learning Rate Schedule for Deep Learning, theorem 2.7 without momentum, arXiv:1910.07454."""
    lr, decay = 0.1, 5e-2
    decayed, exponential, control = net(), net(), net()
    growing = split_groups(exponential, lr, 0.0, 0.0)

    def grow(step: int) -> None:
        growing.param_groups[0]["lr"] = lr * (1 - lr * decay) ** (-2 * step - 1)

    base = train(decayed, split_groups(decayed, lr, decay, 0.0), 50)
    assert furthest(base, train(exponential, growing, 50, grow)) < 1e-8
    assert furthest(base, train(control, split_groups(control, lr, 0.0, 0.0), 50)) > 1e-3


def constrained(model: nn.Module, lr: float, momentum: float, **constraint: Any) -> torch.optim.Optimizer:
    roles = parameter_roles(model)
    spec = OptimizerSpec.model_validate({"lr": lr, "weight_decay": 0.0, "momentum": momentum, "constraint": constraint})
    optimizer = optimizer_for(model, decay_plan(roles, spec), spec)
    for group in optimizer.param_groups:
        group["lr"] = lr if group["constraint"] else 0.1
    return optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rescaling_to_a_norm_is_rescaling_to_one_at_lr_over_the_norm_squared(momentum: float) -> None:
    """Source: Liu et al., Weight Rescaling, arXiv:2102.03497."""
    norm = 2.5
    left, right = net(), net()
    with torch.no_grad():
        for index in (0, 3):
            left[index].weight.copy_(rescaled(left[index].weight, norm, "tensor"))
            right[index].weight.copy_(rescaled(right[index].weight, 1.0, "tensor"))
    base = train(left, constrained(left, 0.5, momentum, name="rescale", norm=norm))
    same = train(right, constrained(right, 0.5 / norm**2, momentum, name="projection"))
    assert furthest(base, same) < 1e-8
    assert float(left[0].weight.detach().norm()) == pytest.approx(norm) and float(right[0].weight.detach().norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
def test_rescaled_weights_keep_their_effective_lr_exactly_and_others_keep_decaying(granularity: str) -> None:
    model = net()
    spec = OptimizerSpec.model_validate({"lr": 0.2, "weight_decay": 0.1, "constraint": {"name": "rescale", "granularity": granularity, "period": 3}})
    optimizer = build_optimizer(model, spec)
    rates = {planned.parameter.name: (planned.rate, planned.constrained) for planned in decay_plan(parameter_roles(model), spec)}
    assert rates["0.weight"] == (0.0, True) and rates["5.weight"] == (0.1, False)
    tracer = EffectiveLR(model, optimizer, every=4)
    seen: list[float] = []
    for step in range(24):
        train(model, optimizer, 1)
        if (step + 1) % 4 == 0 and (sample := tracer.sample()) and (step % 3 == 0):
            seen.append(sample["0"].effective_lr or 0.0)
    assert len(seen) >= 2 and max(seen) / min(seen) - 1 < 1e-6


def box_of_nothing(model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    """Volumization with V = 0 and alpha = 1 - lr decay."""
    constraint = {"name": "volumization", "bound": 0.0, "strength": 1 - lr * decay}
    spec = OptimizerSpec.model_validate({"lr": lr, "momentum": 0.0, "constraint": constraint})
    return optimizer_for(model, decay_plan(parameter_roles(model), spec), spec)


def test_volumization_with_a_box_of_nothing_is_decoupled_decay_after_the_step() -> None:
    """Every coordinate shrinks by lr wd once it has moved: exactly. Source: Ziyin et al., arXiv:2003.11243."""
    lr, decay = 0.05, 0.1
    left, right = net(), net()
    weights = [right[index].weight for index in (0, 3, 5)]
    plain = torch.optim.SGD(right.parameters(), lr=lr)

    def shrink(step: int) -> None:
        if step:
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1 - lr * decay)

    curve = train(right, plain, 60, shrink)
    assert furthest(train(left, box_of_nothing(left, lr, decay), 60), curve) < 1e-12


def test_it_is_decoupled_decay_before_the_step_up_to_the_square_of_the_learning_rate() -> None:
    """Decay before the step spares the step itself: lr^2 wd g is what they differ by."""
    lr, decay = 0.05, 1e-4
    left, right = net(), net()
    decoupled = build_optimizer(right, OptimizerSpec(lr=lr, momentum=0.0, weight_decay=decay, decay="decoupled"))
    assert furthest(train(left, box_of_nothing(left, lr, decay), 100), train(right, decoupled, 100)) < 1e-5
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("strength", "expected"), [(1.0, [-3.0, -0.5, 2.0]), (0.0, [-1.0, -0.5, 1.0]), (-1.0, [1.0, -0.5, 0.0]), (0.5, [-2.0, -0.5, 1.5])]
)
def test_the_box_leaves_clips_or_reflects(strength: float, expected: list[float]) -> None:
    weight, outside = boxed(torch.tensor([-3.0, -0.5, 2.0]), 1.0, strength)
    assert weight.tolist() == expected and outside.tolist() == [True, False, True]


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
@pytest.mark.parametrize("fields", [{"rule": "sgd"}, {"rule": "adamw"}, {"rule": "lion", "beta2": 0.99}, {"rule": "sgd", "decay": "decoupled"}])
def test_rotational_weights_turn_by_the_expected_angle_from_the_start_and_keep_their_norm(fields: dict[str, Any], granularity: str) -> None:
    """Source: Kosson et al., Rotational Equilibrium, arXiv:2305.17212."""
    model = net()
    spec = OptimizerSpec.model_validate({"lr": 0.01, "weight_decay": 0.1, "constraint": {"name": "rotational", "granularity": granularity}, **fields})
    optimizer = build_optimizer(model, spec)
    tracer = EffectiveLR(model, optimizer, every=1)
    before = float(model[0].weight.detach().norm())
    train(model, optimizer, 1)
    first = (tracer.sample() or {})["0"]
    assert first.rotation_expected is not None
    assert first.rotation / first.rotation_expected == pytest.approx(1, abs=0.1)
    squares: list[float] = []
    train(model, optimizer, 200, lambda step: squares.append((tracer.sample() or {})["0"].rotation ** 2))
    assert math.sqrt(sum(squares) / len(squares)) / first.rotation_expected == pytest.approx(1, abs=0.1)
    assert float(model[0].weight.detach().norm()) == pytest.approx(before, rel=1e-9)


def test_a_trial_can_be_given_the_norms_of_another(tmp_path: Path) -> None:
    """Source: Hoffer et al., Norm matters, arXiv:1803.01814."""
    rows = [{"step": step, "layer": layer, "weight_norm": norm} for layer in ("0", "3") for step, norm in ((1, 2.0), (11, 4.0))]
    pd.DataFrame(rows).to_parquet(tmp_path / "trace.parquet")
    model = net()
    spec = OptimizerSpec.model_validate({"lr": 0.1, "constraint": {"name": "norm_schedule", "trace": str(tmp_path / "trace.parquet")}})
    optimizer = build_optimizer(model, spec)
    train(model, optimizer, 5)
    assert float(model[0].weight.detach().norm()) == pytest.approx(3.0)
    train(model, optimizer, 30)
    assert float(model[3].weight.detach().norm()) == pytest.approx(4.0)
    with pytest.raises(ModelError, match="no layer"):
        build_optimizer(nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), spec)
    missing = spec.model_copy(update={"constraint": spec.constraint.model_copy(update={"trace": "nowhere.parquet"})})
    with pytest.raises(ModelError, match=r"does not exist \(got 'nowhere.parquet'\)"):
        build_optimizer(net(), missing)


def test_recorded_norms_are_linear_between_steps_and_level_beyond() -> None:
    assert [scheduled_norm(step, [2, 4], [1.0, 3.0]) for step in (0, 2, 3, 4, 9)] == [1.0, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("name", ["rescale", "volumization", "rotational"])
def test_a_constrained_optimizer_goes_on_bit_for_bit_from_its_state(name: str) -> None:
    spec = OptimizerSpec.model_validate({"weight_decay": 0.1, "gamma": "all@1", "target": "init", "constraint": {"name": name}})
    whole = net()
    optimizer = build_optimizer(whole, spec)
    train(whole, optimizer, 10)
    model_state, optimizer_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 10)
    half = net()
    half_optimizer = build_optimizer(half, spec)
    half.load_state_dict(model_state)
    half_optimizer.load_state_dict(optimizer_state)
    train(half, half_optimizer, 10)
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other)


SHAPES = ["constant", "linear_down", "linear_up", "with_lr", "inverse_lr"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [[0.0, 1.0], [0.0, 0.4], [0.25, 0.75]])
def test_decay_acts_inside_its_window_and_keeps_its_mean(shape: str, window: list[float]) -> None:
    schedule = ScheduleSpec.model_validate({"shape": "cosine", "warmup": 0.1, "decay": {"shape": shape, "window": window}})
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, weight_decay=0.3)
    scheduler = build_scheduler(optimizer, schedule, total_steps=40)
    strengths = []
    for _ in range(40):
        strengths.append(optimizer.param_groups[0]["weight_decay"])
        parameter.grad = torch.zeros(2)
        optimizer.step()
        scheduler.step()
    first, end = round(window[0] * 40), round(window[1] * 40)
    assert all(strength == 0 for strength in strengths[:first] + strengths[end:])
    assert sum(strengths[first:end]) / (end - first) == pytest.approx(0.3)
    middle = strengths[first:end]
    if shape == "linear_down":
        assert middle == sorted(middle, reverse=True)
    if shape == "linear_up":
        assert middle == sorted(middle)
