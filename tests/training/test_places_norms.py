"""Norms are found by what they compute, and reading a model changes nothing about it."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study.errors import ModelError, UnclaimedParameter, UnknownPlace
from study.training.roles import Role, gain_places, parameter_roles

VECTORS = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)


class Written(nn.Module):
    """Linear, a norm that is written out, linear; the norm's parameters have misleading names."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.inside, self.head, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.inside(x), self.bias, self.weight)))


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.layer_norm": lambda x, g, b: F.layer_norm(x, (6,), g, b, 1e-6),
    "F.batch_norm": lambda x, g, b: F.batch_norm(x, None, None, weight=g, bias=b, training=True),
    "F.group_norm": lambda x, g, b: F.group_norm(x, 2, weight=g, bias=b),
    "F.rms_norm and a shift": lambda x, g, b: F.rms_norm(x, (6,), g) + b,
    "torch.layer_norm": lambda x, g, b: torch.layer_norm(x, (6,), g, b),
    "F.layer_norm, gain and shift outside": lambda x, g, b: torch.add(b, g * F.layer_norm(x, (6,))),
    "layer norm by var and sqrt": lambda x, g, b: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * g + b,
    "layer norm by std": lambda x, g, b: g * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5) + b,
    "rms norm by rsqrt": lambda x, g, b: g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) + b,
    "rms norm by x * x": lambda x, g, b: b + x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * g,
    "rms norm by a power": lambda x, g, b: x * (x**2).mean(-1, keepdim=True).add(1e-6).pow(-0.5) * g + b,
    "rms norm by a vector norm": lambda x, g, b: x / (x.norm(dim=-1, keepdim=True) * 6**-0.5 + 1e-8) * g + b,
    "F.normalize": lambda x, g, b: F.normalize(x, dim=-1) * g + b,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("example", [None, VECTORS], ids=["symbolic", "example"])
def test_a_norm_is_what_divides_the_scale_of_its_input_out(norm: str, example: tuple[Tensor, ...] | None) -> None:
    roles = {role.name: role for role in parameter_roles(Written(NORMS[norm]), example=example)}
    assert (roles["bias"].role, roles["bias"].place) == (Role.GAIN, "final")
    assert (roles["weight"].role, roles["weight"].place) == (Role.SHIFT, "final")
    assert (roles["inside.weight"].role, roles["inside.weight"].place) == (Role.WEIGHT, "final")


NO_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no division": lambda x, g, b: x * g + b,
    "softmax": lambda x, g, b: torch.softmax(x, -1) * g + b,
    "half the power": lambda x, g, b: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6) * g + b,
    "a constant as large as the variance": lambda x, g, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0) * g + b,
    "the scale of something else": lambda x, g, b: x * torch.rsqrt(b.pow(2).mean() + 1e-6) * g + b,
    "swish": lambda x, g, b: x * torch.sigmoid(x) * g + b,
}


@pytest.mark.parametrize("kind", NO_NORMS)
@pytest.mark.parametrize("example", [None, VECTORS], ids=["symbolic", "example"])
def test_what_sees_the_scale_of_its_input_is_no_norm(kind: str, example: tuple[Tensor, ...] | None) -> None:
    assert gain_places(Written(NO_NORMS[kind]), example) == {}


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(6, 6, 1)], ids=["linear", "conv"])
def test_the_gain_of_a_normalized_weight_is_read_from_a_run_too(layer: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.utils.parametrizations.weight_norm(copy.deepcopy(layer)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x if isinstance(layer, nn.Linear) else x[:, :, None]
            return self.head(F.relu(self.first(x)).flatten(1))

    model = Net()
    roles = {role.name.removeprefix("first.parametrizations."): role for role in parameter_roles(model, example=VECTORS)}
    assert (roles["weight.original0"].role, roles["weight.original0"].place) == (Role.GAIN, "final")
    assert roles["weight.original1"].scale_invariant
    assert parameter_roles(model) == parameter_roles(model, example=VECTORS)


class OwnBatchNorm(nn.Module):
    """Normalizes by the batch in train mode and by what it remembers in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)
        self.register_buffer("variance", torch.ones(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if not self.training:
            return self.head(x / (self.variance + 1e-5).sqrt() * self.gain)
        variance = x.var(0)
        with torch.no_grad():
            self.variance.lerp_(variance, 0.1)
        return self.head((x - x.mean(0)) / (variance + 1e-5).sqrt() * self.gain)


def test_hand_written_batch_norms_are_norms_though_eval_mode_hides_it() -> None:
    assert gain_places(OwnBatchNorm(), VECTORS) == {"gain": "final"}


def test_reading_a_run_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), OwnBatchNorm())
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(6)
    state = copy.deepcopy(model.state_dict())
    example = (VECTORS[0].clone(),)
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(3)
    random.seed(3)
    gain_places(model, example)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert not model[0].weight.requires_grad and torch.equal(model[0].bias.grad, torch.ones(6))
    assert model[0].weight.grad is None and model[3].gain.grad is None
    assert torch.equal(example[0], VECTORS[0]) and not example[0].requires_grad


class Twice(nn.Module):
    """One norm used in two places."""

    def __init__(self, disagree: bool) -> None:
        super().__init__()
        self.norm, self.inside, self.head, self.disagree = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2), disagree

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inside(self.norm(x))
        x = x + self.inside(self.norm(x))
        return self.head(self.norm(x) if self.disagree else x)


@pytest.mark.parametrize("example", [None, VECTORS], ids=["symbolic", "example"])
def test_a_norm_used_twice_has_a_place_only_if_its_uses_agree(example: tuple[Tensor, ...] | None) -> None:
    assert gain_places(Twice(False), example) == {"norm.weight": "inner"}
    with pytest.raises(UnknownPlace, match=r"in several places: norm\.weight"):
        gain_places(Twice(True), example)
    assert gain_places(Twice(True), example, places={"norm*": "final"}) == {"norm.weight": "final"}


class Branching(nn.Module):
    """Control flow that only an example decides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inside, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, deep: bool = True) -> Tensor:
        if x.abs().sum() > 0 and deep:
            x = x + self.inside(self.norm(x))
        return self.head(x)


def test_control_flow_needs_an_example_and_an_example_is_enough() -> None:
    with pytest.raises(UnknownPlace, match=r"could not be read.*give an example of its inputs"):
        gain_places(Branching())
    assert gain_places(Branching(), VECTORS) == {"norm.weight": "inner"}
    assert gain_places(Branching(), {"x": VECTORS[0], "deep": True}) == {"norm.weight": "inner"}


def test_torch_s_own_transformer_layers_are_read_from_an_example() -> None:
    for first, expected in ((True, {"inner"}), (False, {"stream"})):
        layer = nn.TransformerEncoderLayer(6, 2, 8, norm_first=first, batch_first=True)
        model = nn.Sequential(nn.LayerNorm(6), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 2))
        places = gain_places(model, (torch.randn(2, 3, 6),))
        assert {place for name, place in places.items() if name != "0.weight"} == expected and places["0.weight"] == "stem"
        with pytest.raises(UnknownPlace, match="give an example"):
            gain_places(model)


def test_an_example_that_does_not_fit_is_an_error_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"example.*does not run on it: RuntimeError.*tuple"):
        gain_places(Branching(), (torch.randn(4, 5),))
    with pytest.raises(ModelError, match="must be a tuple of inputs"):
        gain_places(Branching(), VECTORS[0])  # type: ignore[arg-type]


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def hidden(x: Tensor) -> Tensor:
    """What compiled code looks like from outside: a result without a seen origin."""
    with torch._C.DisableTorchFunction():
        return x * 2


class Around(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inside, self.gain, self.norm, self.head, self.step = nn.Linear(6, 6), nn.Parameter(torch.ones(6)), nn.LayerNorm(6), nn.Linear(6, 2), step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(F.relu(self.gain * self.step(self.inside(x)))))


def test_custom_autograd_functions_are_read_from_the_inside() -> None:
    assert gain_places(Around(Custom.apply), VECTORS) == {"gain": "inner", "norm.weight": "final"}


@pytest.mark.parametrize("frozen", [False, True])
def test_an_operation_that_cannot_be_seen_is_an_error_and_not_a_guess(frozen: bool) -> None:
    with pytest.raises(UnclaimedParameter, match=r"'gain'.*was not seen"):
        gain_places(Around(hidden).requires_grad_(not frozen), VECTORS)


def test_frozen_parameters_have_their_roles() -> None:
    model = Branching()
    before = parameter_roles(model, example=VECTORS)
    assert parameter_roles(model.requires_grad_(False), example=VECTORS) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_weight_is_claimed_once_under_its_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.table(ids)))

    for example in (None, (torch.arange(4),)):
        roles = parameter_roles(Tied(), example=example)
        assert [(role.name, role.role) for role in roles] == [
            ("table.weight", Role.EMBEDDING),
            ("norm.weight", Role.GAIN),
            ("norm.bias", Role.SHIFT),
        ]
        assert not any(role.scale_invariant for role in roles)


def test_lazy_parameters_are_an_error_until_the_model_has_run() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 2))
    with pytest.raises(ModelError, match=r"'0\.weight' has no shape yet.*run the model once"):
        gain_places(model)
    model(*VECTORS)
    assert gain_places(model) == {"1.weight": "final"}


def test_a_parameter_nobody_claims_is_named_whatever_the_reading() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature, self.head = nn.Parameter(torch.ones(3)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    for example in (None, VECTORS):
        with pytest.raises(UnclaimedParameter, match=r"'temperature'.*of a Idle.*hold it in a torch\.nn layer"):
            parameter_roles(Idle(), example=example)


def test_bare_weights_and_their_biases_are_what_they_do() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.offset = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
            self.other, self.recurrent, self.head = nn.Parameter(torch.randn(6, 6)), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.addmm(self.offset, x, self.matrix) @ self.other.t()
            return self.head(self.recurrent(x[:, None])[0][:, 0])

    for example in (None, VECTORS):
        roles = {role.name: role.role for role in parameter_roles(Bare(), example=example)}
        assert roles["matrix"] is roles["other"] is roles["recurrent.weight_ih_l0"] is Role.WEIGHT
        assert roles["offset"] is roles["recurrent.bias_hh_l0"] is Role.BIAS
