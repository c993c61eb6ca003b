"""Networks of a trial: each of them trains, is traceable, and is built from what its norm asks for."""

import copy
import sys
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from study.errors import ImportFailed, ModelError
from study.training.models import RMSNorm2d, build_model
from study.trial import ModelSpec

NORMS = ("batch", "layer", "group", "rms", "weight", "none")
ORDERS = ("post", "pre")

EVERY = [
    *({"name": "mlp", "norm": norm, "width": 12, "depth": 2} for norm in NORMS),
    *(
        {"name": "resnet", "norm": norm, "order": order, "block": block, "width": 4, "blocks": (1, 2)}
        for norm, order, block in product(NORMS, ORDERS, ("basic", "bottleneck"))
    ),
    *(
        {"name": "transformer", "norm": norm, "order": order, "width": 8, "heads": 2, "depth": 2}
        for norm, order in product(("layer", "rms", "weight", "none"), ORDERS)
    ),
]


def name_of(fields):
    return "-".join(str(fields[key]) for key in ("name", "norm", "order", "block") if key in fields)


def built(shape=(1, 8, 8), classes=5, seed=0, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(ModelSpec(**fields), shape, classes)


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


every = pytest.mark.parametrize("fields", EVERY, ids=name_of)


@every
def test_every_network_trains(fields):
    model = built(**fields, dropout=0.1)
    logits = model(images(6, 1, 8, 8))
    assert logits.shape == (6, 5)
    nn.functional.cross_entropy(logits, torch.arange(6) % 5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every
def test_every_network_is_traceable(fields):
    model = built(**fields).eval()
    batch = images(3, 1, 8, 8)
    torch.testing.assert_close(fx.symbolic_trace(model)(batch), model(batch))


@every
def test_every_network_is_drawn_from_the_global_generator_alone(fields):
    first, second, other = (built(**fields, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every
def test_every_network_can_be_copied_and_computes_in_float64(fields):
    model = copy.deepcopy(built(**fields)).double()
    assert model(images(4, 1, 8, 8).double()).dtype == torch.float64


@every
def test_learnable_parameters_live_in_layers_of_torch(fields):
    bare = {
        name
        for path, module in built(**fields).named_modules()
        for name, _ in module.named_parameters(prefix=path, recurse=False)
        if not type(module).__module__.startswith("torch.nn") and not isinstance(module, RMSNorm2d)
    }
    assert bare == ({"positions"} if fields["name"] == "transformer" else set())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_resnet_takes_images_of_any_size(shape, order, block):
    model = built(shape, name="resnet", width=4, blocks=(1, 1, 1, 1, 1), order=order, block=block)
    assert model(images(2, *shape)).isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (1, 8, 8)])
def test_an_mlp_takes_vectors_and_images(shape):
    assert built(shape, name="mlp", width=6)(images(3, *shape)).shape == (3, 5)


COUNTS = [
    ("resnet-20 with projections, as published", {"name": "resnet", "width": 16, "blocks": (3, 3, 3)}, (3, 32, 32), 10, 272_474),
    ("batch: 2 x width of gains and shifts", {"name": "mlp", "norm": "batch", "width": 10, "depth": 1}, (7,), 3, 7 * 10 + 20 + 33),
    ("rms: no shifts", {"name": "mlp", "norm": "rms", "width": 10, "depth": 1}, (7,), 3, 7 * 10 + 10 + 33),
    ("weight: one gain for each output, and biases", {"name": "mlp", "norm": "weight", "width": 10, "depth": 1}, (7,), 3, 7 * 10 + 10 + 10 + 33),
    ("none: biases", {"name": "mlp", "norm": "none", "width": 10, "depth": 2}, (7,), 3, 80 + 110 + 33),
    (
        "transformer: 12 width^2 + 13 width in a block",
        {"name": "transformer", "width": 8, "depth": 3, "heads": 2, "order": "pre", "patch": 4},
        (1, 8, 8),
        5,
        (16 * 8 + 8) + 4 * 8 + 3 * (12 * 64 + 13 * 8) + 16 + 45,
    ),
]


@pytest.mark.parametrize(("fields", "shape", "classes", "expected"), [pytest.param(*case, id=name) for name, *case in COUNTS])
def test_known_numbers_of_parameters(fields, shape, classes, expected):
    assert count(built(shape, classes, **fields)) == expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_convolutions_have_a_bias_only_where_nothing_normalizes_maps(norm, order):
    model = built(name="resnet", norm=norm, order=order, width=4)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {module.bias is not None for module in convolutions} == {norm in ("weight", "none")}
    assert {parametrize.is_parametrized(module, "weight") for module in convolutions} == {norm == "weight"}


def parts(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_a_post_activation_resnet_is_laid_out_as_in_its_paper():
    found = parts(built(name="resnet", width=4, blocks=(1, 1)))
    assert found["stem.norm"] == found["layer1.0.norm1"] == found["layer1.0.norm2"] == found["layer2.0.shortcut.norm"] == "BatchNorm2d"
    assert found["layer1.0.shortcut"] == "Identity"
    assert "final" not in found


def test_a_pre_activation_resnet_is_laid_out_as_in_its_paper():
    found = parts(built(name="resnet", width=4, blocks=(1, 1), order="pre"))
    assert found["layer1.0.norm1"] == found["layer2.0.norm2"] == found["final.norm"] == "BatchNorm2d"
    assert found["layer2.0.shortcut"] == "Conv2d"
    assert "stem.norm" not in found


@pytest.mark.parametrize(("order", "source"), [("post", "layer1"), ("pre", "layer2.0.relu1")])
def test_a_projection_shortcut_takes_the_stream_or_its_activation(order, source):
    model = built(name="resnet", width=4, blocks=(1, 1), order=order)
    taken, given = [], []
    model.get_submodule("layer2.0.shortcut").register_forward_hook(lambda _, inputs, __: taken.append(inputs[0]))
    model.get_submodule(source).register_forward_hook(lambda _, __, output: given.append(output))
    model(images(4, 1, 8, 8))
    assert torch.equal(taken[0], given[0])


def test_a_bottleneck_ends_in_four_times_its_width():
    model = built(name="resnet", width=4, blocks=(1, 1), block="bottleneck")
    kernels = [tuple(model.get_submodule(f"layer2.0.conv{index}").weight.shape) for index in (1, 2, 3)]
    assert kernels == [(8, 16, 1, 1), (8, 8, 3, 3), (32, 8, 1, 1)]
    assert model.get_submodule("layer2.0.conv2").stride == (2, 2)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (4, 2), (8, 4), (12, 6), (16, 8), (20, 5), (64, 8)])
def test_groups_hold_two_channels_or_more(channels, groups):
    norm = next(module for module in built(name="mlp", norm="group", width=channels).modules() if isinstance(module, nn.GroupNorm))
    assert norm.num_groups == groups


def test_rms_norm_of_maps_is_that_of_their_flattened_values():
    norm, maps = RMSNorm2d(3), images(4, 3, 5, 6)
    expected = nn.functional.rms_norm(maps.flatten(1), (90,), eps=norm.eps).view_as(maps)
    torch.testing.assert_close(norm(maps), expected)
    gains = torch.tensor([1.0, 0.0, 2.0])
    norm.load_state_dict({"weight": gains})
    torch.testing.assert_close(norm(maps), expected * gains[:, None, None])


@every
def test_dropout_exists_only_where_it_is_asked_for(fields):
    assert not any(isinstance(module, nn.Dropout) for module in built(**fields).modules())
    assert any(isinstance(module, nn.Dropout) for module in built(**fields, dropout=0.5).modules())


REFUSED = [
    ({"name": "resnet"}, (64,), "model.name: a resnet takes images with channels, height and width (got vectors of shape (64,)); use mlp"),
    ({"name": "transformer"}, (64,), "model.name: a transformer takes images"),
    (
        {"name": "transformer", "patch": 3},
        (1, 8, 8),
        "model.patch: images of 8x8 pixels do not divide into patches (got side 3); use one of 1, 2, 4, 8",
    ),
    ({"name": "transformer", "patch": 2}, (1, 8, 7), "do not divide into patches (got side 2); use one of 1"),
]


@pytest.mark.parametrize(("fields", "shape", "message"), REFUSED)
def test_a_network_that_does_not_fit_the_images_says_so(fields, shape, message):
    with pytest.raises(ModelError) as caught:
        built(shape, **fields)
    assert message in str(caught.value)


@pytest.fixture
def users(monkeypatch):
    """Makes a function importable as `import:users_models:net`."""

    def users(function):
        module = ModuleType("users_models")
        module.net = function
        monkeypatch.setitem(sys.modules, "users_models", module)

    return users


def test_a_network_may_be_the_users_own(users):
    users(lambda width: nn.Linear(2, width))
    assert built(name="import:users_models:net", args={"width": 3}).out_features == 3


def test_a_function_that_returns_no_network_is_refused(users):
    users(lambda: 3)
    with pytest.raises(ModelError, match=r"import:users_models:net: must return a torch\.nn\.Module \(got int\); return the network"):
        built(name="import:users_models:net")


def test_an_error_inside_the_users_network_shows_its_line(users):
    users(lambda width: nn.Linear(2, width))
    with pytest.raises(ImportFailed, match=r"raised TypeError: .* at .*test_models\.py:\d+ `users\(lambda width"):
        built(name="import:users_models:net", args={"width": "wide"})
