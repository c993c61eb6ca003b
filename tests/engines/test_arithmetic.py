"""A model over slots computes in each what the plain module computes alone: outputs, gradients, statistics; models as other people write them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from study.engines.arithmetic import Arithmetic, Looped, Mode, Pass
from study.engines.conversion import Converted
from study.engines.stack import Stack
from tests.training import families

SLOTS, BATCH = 3, 4
ARITHMETICS: dict[str, Callable[[nn.Module], Arithmetic]] = {"converted": Converted, "looped": Looped}


class Calls(nn.Module):
    """A module of the given parts and function."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """What the function makes of parts and input."""
        found: Tensor = self.function(self, x)
        return found


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def se_block(m: Any, x: Tensor) -> Any:
    out = m.conv(x)
    gate = torch.sigmoid(m.excite(F.relu(m.squeeze(out.mean((2, 3))))))
    return m.head((out * gate[:, :, None, None]).flatten(1).mean(1, keepdim=True))


def attention(m: Any, x: Tensor) -> Any:
    q, k, v = m.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
    weights = torch.softmax(torch.einsum("bqd,bkd->bqk", q, k) / q.shape[-1] ** 0.5, dim=-1)
    return m.head(torch.einsum("bqk,bkd->bqd", weights, v).mean(1))


def split(m: Any, x: Tensor) -> Any:
    first, second = torch.split(m.conv(x), [1, 3], dim=1)
    return m.head(torch.cat((second, first.relu()), dim=1).mean((2, 3)))


def in_place(m: Any, x: Tensor) -> Any:
    out = m.norm(m.first(x))
    out += m.second(x)
    return m.head(F.relu(out, inplace=True).mean((2, 3)))


def kept_beside_its_relu(m: Any, x: Tensor) -> Any:
    out = m.conv(x)
    return m.head((m.relu(out) - out).mean((2, 3)))


def context_first(m: Any, x: Tensor) -> Any:
    out = m.conv(x)
    return m.head((m.context(m.pool(out)) + out).mean((2, 3)))


def spatial_gate(m: Any, x: Tensor) -> Any:
    out = m.conv(x)
    return m.head((out * torch.sigmoid(m.gate(out))).mean((2, 3)))


def twice(m: Any, x: Tensor) -> Any:
    return m.head(m.norm(F.relu(m.shared(F.relu(m.norm(m.shared(x)))))).mean((2, 3)))


MAPS: dict[str, Callable[[], nn.Module]] = {
    "view": lambda: Calls(lambda m, x: m.head(F.relu(m.conv(x)).view(x.size(0), -1)), conv=conv(3, 4), head=nn.Linear(144, 5)),
    "reshape": lambda: Calls(lambda m, x: m.head(m.conv(x).reshape(x.shape[0], -1)), conv=conv(3, 4), head=nn.Linear(144, 5)),
    "mean": lambda: Calls(lambda m, x: m.head(m.conv(x).mean((2, 3))), conv=conv(3, 4), head=nn.Linear(4, 5)),
    "dense": lambda: Calls(lambda m, x: m.head(torch.cat([x, m.conv(x)], 1).mean(dim=(-2, -1))), conv=conv(3, 4), head=nn.Linear(7, 5)),
    "split": lambda: Calls(split, conv=conv(3, 4), head=nn.Linear(4, 5)),
    "se block": lambda: Calls(se_block, conv=conv(3, 4), squeeze=nn.Linear(4, 2), excite=nn.Linear(2, 4), head=nn.Linear(1, 5)),
    "se block of maps": lambda: nn.Sequential(conv(3, 4), families.Gate(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    "context first": lambda: Calls(context_first, conv=conv(3, 4), pool=nn.AdaptiveAvgPool2d(1), context=conv(4, 4, 1), head=nn.Linear(4, 5)),
    "spatial gate": lambda: Calls(spatial_gate, conv=conv(3, 4), gate=conv(4, 1, 3), head=nn.Linear(4, 5)),
    "in place": lambda: Calls(in_place, first=conv(3, 4), second=conv(3, 4), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 5)),
    "kept beside its relu": lambda: Calls(kept_beside_its_relu, conv=conv(3, 4), relu=nn.ReLU(), head=nn.Linear(4, 5)),
    "shared": lambda: Calls(twice, shared=conv(3, 3), norm=nn.BatchNorm2d(3), head=nn.Linear(3, 5)),
    "max pools": lambda: Calls(
        lambda m, x: m.head(F.max_pool2d(m.pool(m.conv(x)), 2, stride=1).flatten(1)), conv=conv(3, 4), pool=nn.MaxPool2d(2), head=nn.Linear(16, 5)
    ),
    "transposed": lambda: nn.Sequential(conv(3, 4, stride=2), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(72, 5)),
    "depthwise": lambda: nn.Sequential(conv(3, 6, groups=3), nn.GELU(), conv(6, 6, groups=6), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5)),
    "reflecting": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(144, 5)),
    "group norms": lambda: nn.Sequential(
        conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.GroupNorm(4, 144), nn.Linear(144, 5)
    ),
    "instance norm": lambda: nn.Sequential(conv(3, 4), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)),
    "batch norm without statistics": lambda: nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ),
    "batch norm of tokens": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(108, 5)),
    "attention": lambda: Calls(attention, qkv=nn.Linear(3, 12), head=nn.Linear(4, 5)),
    "multi-head attention": lambda: Calls(
        lambda m, x: m.head(m.mix(x.flatten(2).transpose(1, 2)).mean(1)), mix=families.Attend(4), head=nn.Linear(4, 5)
    ),
    "a scalar": lambda: nn.Sequential(Scaled(), nn.Flatten(), nn.Linear(108, 5)),
    "a constant": lambda: nn.Sequential(Scaled(buffer=True), nn.Flatten(), nn.Linear(108, 5)),
    "prelu": lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), nn.Flatten(), nn.Linear(144, 5)),
    "resnet": lambda: families.resnet(families.basic, (1, 1), (4, 6)),
    "pre-activation": families.preactivation_resnet,
    "densenet": families.densenet,
    "mobilenet": families.mobilenet,
    "darknet": families.darknet,
}


class Scaled(nn.Module):
    """A single number times the input: learned, or a buffer."""

    def __init__(self, buffer: bool = False) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("scale", torch.tensor(0.5))
        else:
            self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def images(name: str) -> Tensor:
    size = {"multi-head attention": (4, 6, 6), "densenet": (3, 8, 8), "convnext": (3, 16, 16)}.get(name, (3, 6, 6))
    return torch.randn(SLOTS, BATCH, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def slots_of(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """The same network, drawn anew for each slot."""
    found = []
    for slot in range(SLOTS):
        torch.manual_seed(slot)
        found.append(make().double())
    return found


def rows_of(models: list[nn.Module]) -> dict[str, Tensor]:
    """All slots' parameters and buffers, as an engine holds them."""
    stack = Stack(models[0].state_dict(), SLOTS)
    for slot, model in enumerate(models):
        stack.load(slot, model.state_dict())
    return stack.tensors


def alone(model: nn.Module, given: Tensor, mode: Mode) -> Tensor:
    """What the plain module makes of one slot's images."""
    model.train(mode is Mode.TRAIN)
    if mode is Mode.ESTIMATE:
        for norm in model.modules():
            if isinstance(norm, _NormBase) and norm.track_running_stats:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None
    found: Tensor = model(given)
    return found


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", MAPS)
def test_outputs_gradients_and_statistics_are_those_of_the_plain_module(name: str, arithmetic: str, mode: Mode) -> None:
    models, given = slots_of(MAPS[name]), images(name)
    assert_same_as_alone(models, given, ARITHMETICS[arithmetic](copy.deepcopy(models[0])), mode)


def assert_same_as_alone(models: list[nn.Module], given: Tensor, arithmetic: Arithmetic, mode: Mode) -> None:
    rows = rows_of(models)
    trained = [name for name, _ in models[0].named_parameters()]
    weights = {name: rows[name].detach().requires_grad_() for name in trained}
    found = arithmetic(given, Pass({**rows, **weights}, mode))
    gradients = dict(zip(trained, torch.autograd.grad(found.square().sum(), list(weights.values())), strict=True))
    for slot, model in enumerate(models):
        expected = alone(model, given[slot], mode)
        expected.square().sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found[slot], expected, rtol=1e-11, atol=1e-11)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name][slot], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)
        if mode is not Mode.TRAIN:
            for name, buffer in model.named_buffers():
                torch.testing.assert_close(rows[name][slot], buffer, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_integers_are_looked_up_in_each_slots_own_table(arithmetic: str) -> None:
    models = slots_of(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5)))
    given = torch.randint(7, (SLOTS, BATCH, 3), generator=torch.Generator().manual_seed(1))
    assert_same_as_alone(models, given, ARITHMETICS[arithmetic](copy.deepcopy(models[0])), Mode.TRAIN)


DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(144, 5)),
    "function": lambda: Calls(
        lambda m, x: m.head(F.dropout(m.first(x.flatten(1)).relu(), 0.3, m.training)), first=nn.Linear(108, 8), head=nn.Linear(8, 5)
    ),
    "before and after": lambda: nn.Sequential(
        nn.Dropout(0.2), conv(3, 4), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.1), nn.Linear(36, 5)
    ),
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_every_slot_drops_what_its_own_seed_draws(name: str, arithmetic: str) -> None:
    models, given = slots_of(DROPOUTS[name]), images(name)
    generators = [torch.Generator().manual_seed(50 + slot) for slot in range(SLOTS)]
    run = ARITHMETICS[arithmetic](copy.deepcopy(models[0]))
    before = torch.get_rng_state()
    rows = rows_of(models)
    found = [run(given, Pass(rows, Mode.TRAIN, generators)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    evaluated = run(given, Pass(rows, Mode.EVALUATE))
    for slot, model in enumerate(models):
        torch.manual_seed(50 + slot)
        model.train()
        for out in found:
            torch.testing.assert_close(out[slot], model(given[slot]), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(evaluated[slot], model.eval()(given[slot]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_slot_of_nan_leaves_the_others_their_bits(arithmetic: str) -> None:
    models, given = slots_of(MAPS["resnet"]), images("resnet")
    run, rows = ARITHMETICS[arithmetic](copy.deepcopy(models[0])), rows_of(models)
    clean = run(given, Pass(rows, Mode.TRAIN))
    for value in rows.values():
        if value.is_floating_point():
            value[1] = float("nan")
    poisoned = run(given, Pass(rows, Mode.TRAIN))
    assert poisoned[1].isnan().all()
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[2], poisoned[2])


def test_a_model_that_looks_at_its_values_cannot_be_converted_and_is_looped() -> None:
    def curious(m: Any, x: Tensor) -> Any:
        return m.head(x.flatten(1) if x.sum() > 0 else -x.flatten(1))

    models = slots_of(lambda: Calls(curious, head=nn.Linear(108, 5)))
    with pytest.raises(Exception, match="control flow"):
        Converted(models[0])
    assert_same_as_alone(models, images(""), Looped(copy.deepcopy(models[0])), Mode.TRAIN)
