"""Traces equal what saved weights say, in every kind of training loop, and change nothing of it."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

from study.measurement import LayerSample
from study.training.effective_lr import EffectiveLR
from study.training.gains import by_place
from study.training.updates import PlannedOptimizer

EVERY = 3

Parameters = list[nn.Parameter]


def planned(parameters: Parameters, rule: str, **options: object) -> PlannedOptimizer:
    defaults = {"rule": rule, "form": "decoupled", "anchor": 0.0, "constraint": None, "lr": 0.01, "weight_decay": 0.1}
    return PlannedOptimizer([{"params": parameters, **defaults, **options}])


def matrices(parameters: Parameters) -> Parameters:
    return [parameter for parameter in parameters if parameter.ndim == 2]


RULES: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw, fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw, foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "muon": lambda p: Muon(matrices(p), lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01),
    "decoupled sgd": lambda p: planned(p, "sgd", momentum=0.9, nesterov=False),
    "lion": lambda p: planned(p, "lion", betas=(0.9, 0.99)),
}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)
    ).to(dtype)


def examples(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    while True:
        yield torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def train(model: nn.Module, optimizer: Optimizer, steps: int, way: str = "plain", after: Callable[[], object] = lambda: None) -> None:
    """A user's loop: plain, with clipping, with accumulation over two batches, or under autocast."""
    batches = examples(model)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2 if way == "accumulation" else 1):
            x, y = next(batches)
            with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        if way == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        after()


def kahan(before: Tensor, after: Tensor) -> float:
    """The angle by another formula than the tracer's: half of it has the tangent |u - v| / |u + v|."""
    u, v = before.double().flatten(), after.double().flatten()
    u, v = u / u.norm(), v / v.norm()
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["plain", "clipping", "accumulation", "autocast"])
@pytest.mark.parametrize("rule", RULES)
def test_a_sample_is_what_the_saved_weights_say(rule: str, way: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = RULES[rule](list(model.parameters()))
    tracer = EffectiveLR(model, optimizer, every=EVERY)
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    saved: dict[str, Tensor] = {}
    seen: list[tuple[LayerSample, Tensor, Tensor, float]] = []
    gradients: dict[str, float] = {}

    def remember(*_: object) -> None:
        saved.update({names[id(p)]: p.detach().clone() for p in model.parameters() if p.ndim == 2})
        gradients.update({names[id(p)]: float(p.grad.double().norm()) for p in model.parameters() if p.ndim == 2 and p.grad is not None})

    def look() -> None:
        for layer, row in (tracer.sample() or {}).items():
            seen.append((row, saved[layer], model.get_parameter(f"{layer}.weight").detach().clone(), gradients[layer]))

    optimizer.register_step_pre_hook(remember)
    train(model, optimizer, 4 * EVERY, way, look)
    assert [row.step for row, *_ in seen] == [step for step in (3, 6, 9, 12) for _ in range(3)]
    for row, before, after, gradient in seen:
        assert row.source == "weights"
        assert row.rotation == pytest.approx(kahan(before, after), rel=1e-6, abs=1e-7 if dtype == torch.float32 else 1e-12)
        assert row.weight_norm == pytest.approx(float(before.double().norm()), rel=1e-12)
        assert row.grad_norm == pytest.approx(gradient, rel=1e-12)
        assert row.unit_gradient == pytest.approx(gradient * float(before.double().norm()), rel=1e-12)
        power = None if rule == "rmsprop" else 2 if "sgd" in rule or rule in ("momentum", "nesterov") else 1
        assert row.effective_lr == (None if power is None else pytest.approx(row.lr / float(before.double().norm()) ** power, rel=1e-12))


@pytest.mark.parametrize("rule", RULES)
def test_tracing_changes_no_bit_of_the_training(rule: str) -> None:
    plain, traced = net(), net()
    train(plain, RULES[rule](list(plain.parameters())), 25)
    optimizer = RULES[rule](list(traced.parameters()))
    tracer = EffectiveLR(traced, optimizer, every=EVERY, filters=True)
    train(traced, optimizer, 25)
    assert tracer.step == 25
    for left, right in zip(plain.state_dict().values(), traced.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_expected_rotation_is_of_scale_invariant_weights_under_known_rules_only() -> None:
    expected = {"sgd": True, "adam": False, "adamw": True, "muon": False, "rmsprop": False, "lion": True}
    for rule, known in expected.items():
        model = net()
        optimizer = RULES[rule](list(model.parameters()))
        tracer = EffectiveLR(model, optimizer, every=1)
        train(model, optimizer, 1)
        rows = tracer.sample() or {}
        assert rows["0"].scale_invariant and (rows["0"].rotation_expected is not None) == known
        assert not rows["5"].scale_invariant and rows["5"].rotation_expected is None and rows["5"].rotation_ratio is None
        assert (rows["0"].relaxation_time is not None) == (rule not in ("adam", "rmsprop"))


def test_somebody_elses_optimizer_is_what_its_user_says_it_is() -> None:
    class Signs(Optimizer):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(0.01 * parameter.grad.sign())

    model = net()
    optimizer = Signs(model.parameters(), {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)})
    tracer = EffectiveLR(model, optimizer, every=1, rule={"rule": "lion", "form": "decoupled"})
    reference = planned(list(model.parameters()), "lion", betas=(0.9, 0.99))
    other = EffectiveLR(model, reference, every=1)
    train(model, optimizer, 1)
    train(model, reference, 1)
    assert (tracer.sample() or {})["0"].rotation_expected == (other.sample() or {})["0"].rotation_expected is not None


def test_adams_mean_rate_per_coordinate_is_that_of_its_second_moments() -> None:
    for build in (lambda p: AdamW(p, lr=0.01), lambda p: planned(p, "adamw", betas=(0.9, 0.999), eps=1e-8)):
        model = net()
        optimizer = build(list(model.parameters()))
        tracer = EffectiveLR(model, optimizer, every=4)
        train(model, optimizer, 4)
        state = optimizer.state[model.get_parameter("0.weight")]
        moment = state.get("exp_avg_sq", state.get("v")).double() / (1 - 0.999**4)
        assert (tracer.sample() or {})["0"].coordinate_rate == pytest.approx(float((0.01 / (moment.sqrt() + 1e-8)).mean()), rel=1e-6)
    model = net()
    optimizer = RULES["sgd"](list(model.parameters()))
    tracer = EffectiveLR(model, optimizer, every=1)
    train(model, optimizer, 1)
    assert (tracer.sample() or {})["0"].coordinate_rate is None


def test_filters_are_the_rows_of_a_weight() -> None:
    model = net(torch.float64)
    optimizer = RULES["momentum"](list(model.parameters()))
    tracer = EffectiveLR(model, optimizer, every=2, filters=True)
    train(model, optimizer, 1)
    assert tracer.filters() is None
    before = model.get_parameter("0.weight").detach().clone()
    train(model, optimizer, 1)
    found = (tracer.filters() or {})["0"]
    after = model.get_parameter("0.weight").detach()
    for channel in range(5):
        assert float(found.rotation[channel]) == pytest.approx(kahan(before[channel], after[channel]), rel=1e-6)
        assert found.effective_lr is not None
        assert float(found.effective_lr[channel]) == pytest.approx(0.1 / float(before[channel].norm()) ** 2)
    assert float(found.weight_norm.square().sum().sqrt()) == pytest.approx((tracer.sample() or {})["0"].weight_norm)
    assert float(found.grad_norm.square().sum().sqrt()) == pytest.approx((tracer.sample() or {})["0"].grad_norm)


def test_gains_say_their_size_their_distance_to_one_and_their_dead_channels() -> None:
    model = net()
    tracer = EffectiveLR(model, RULES["sgd"](list(model.parameters())))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([1.0, 2.0, 0.0, -1.0, 1e-4]))
    first, second = tracer.gains()["1.weight"], tracer.gains()["4.weight"]
    assert (first.place, second.place) == ("inner", "final")
    assert first.rms == pytest.approx(math.sqrt(6 / 5), rel=1e-6)
    assert first.distance == pytest.approx(math.sqrt((0 + 1 + 1 + 4 + 0.9999**2) / 5), rel=1e-6)
    assert (first.dead, first.channels) == (2, 5)
    assert by_place([first, first]) == {"gamma_rms/inner": first.rms, "gamma_distance/inner": first.distance, "gamma_dead/inner": 0.4}


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_divided_out_and_its_skipped_steps_leave_no_sample(fused: bool) -> None:
    plain, scaled = net(), net()
    reference = AdamW(plain.parameters(), lr=0.01, fused=fused)
    optimizer = AdamW(scaled.parameters(), lr=0.01, fused=fused)
    plain_tracer, tracer = EffectiveLR(plain, reference, every=1), EffectiveLR(scaled, optimizer, every=1)
    train(plain, reference, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = next(examples(scaled))

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(scaled(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    ours, theirs = tracer.sample() or {}, plain_tracer.sample() or {}
    assert ours["0"].grad_norm == pytest.approx(theirs["0"].grad_norm, rel=1e-5)
    assert ours["0"].rotation == pytest.approx(theirs["0"].rotation, rel=1e-4)
    before = copy.deepcopy(scaled.state_dict())
    step(math.inf)
    assert torch.equal(scaled.get_parameter("0.weight"), before["0.weight"])
    assert tracer.sample() is None or tracer.step == 1


def test_schedulers_that_change_lr_and_decay_are_followed() -> None:
    model = net()
    optimizer = AdamW([{"params": [model.get_parameter("0.weight")], "lr": 0.01}, {"params": [model.get_parameter("3.weight")], "lr": 0.02}])
    tracer = EffectiveLR(model, optimizer, every=1)
    for lr, decay in ((0.01, 0.1), (0.005, 0.1), (0.005, 0.3)):
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        train(model, optimizer, 1)
        rows = tracer.sample() or {}
        assert (rows["0"].lr, rows["0"].weight_decay, rows["3"].lr) == (lr, decay, 0.02)
        assert rows["0"].rotation_expected == pytest.approx(math.sqrt(2 * lr * decay * 0.1 / 1.9))


def test_the_weight_under_a_weight_norm_is_its_direction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    tracer = EffectiveLR(model, optimizer, every=1)
    direction = model.get_parameter("0.parametrizations.weight.original1")
    before = direction.detach().clone()
    train(model, optimizer, 1)
    row = (tracer.sample() or {})["0"]
    assert row.scale_invariant and row.weight_norm == pytest.approx(float(before.norm()))
    assert row.rotation == pytest.approx(kahan(before, direction.detach()), rel=1e-5)


def test_a_compiled_model_is_traced_as_what_it_was_compiled_from() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = RULES["momentum"](list(compiled.parameters()))
    tracer = EffectiveLR(compiled, optimizer, every=1)
    train(compiled, optimizer, 1)
    assert list(tracer.sample() or {}) == ["0", "3", "5"]


def test_an_optimizer_inside_a_wrapper_is_found() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    wrapped = accelerate.Accelerator(cpu=True).prepare(RULES["momentum"](list(model.parameters())))
    assert not isinstance(wrapped, SGD)
    tracer = EffectiveLR(model, wrapped, every=1)
    train(model, wrapped, 1)
    assert (tracer.sample() or {})["0"].rotation_expected is not None


class Branching(nn.Module):
    """What no symbolic trace can read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return self.last(hidden if float(hidden.detach().sum()) > -1e9 else -hidden)  # type: ignore[no-any-return]


def test_a_computation_that_cannot_be_read_is_said_and_an_example_helps() -> None:
    model = Branching()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    with pytest.warns(UserWarning, match=r"could not be read .*give EffectiveLR an example"):
        blind = EffectiveLR(model, optimizer, every=1)
    seeing = EffectiveLR(model, optimizer, every=1, example=(torch.randn(4, 6),))
    train(model, optimizer, 1)
    assert not (blind.sample() or {})["first"].scale_invariant
    assert (seeing.sample() or {})["first"].scale_invariant
