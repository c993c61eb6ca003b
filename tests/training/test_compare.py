"""What other libraries decay by default, held against their own functions."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from study.errors import InputError
from study.optimizer import OptimizerSpec
from study.training.compare import FASTAI_NORMS, LIBRARIES, TORCHVISION_NORMS, compare, exempt_in_hf, exempt_in_timm
from study.training.decay import decay_plan
from study.training.models import build_model
from study.training.roles import ParameterRole, Role, parameter_roles
from study.trial import ModelSpec
from tests.libraries import library


class Block(nn.Module):
    """A basic block with torchvision's names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


def resnet18() -> nn.Module:
    """ResNet-18, narrow, with torchvision's names of parameters."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 4, 7, bias=False))
    model.add_module("bn1", nn.BatchNorm2d(4))
    model.add_module("relu", nn.ReLU())
    for stage, (inputs, outputs) in enumerate(((4, 4), (4, 8), (8, 16), (16, 32)), start=1):
        model.add_module(f"layer{stage}", nn.Sequential(Block(inputs, outputs), Block(outputs, outputs)))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(32, 10))
    return model


def bert() -> nn.Module:
    transformers = library("transformers")
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    return transformers.BertModel(config)  # type: ignore[no-any-return]


def ours() -> nn.Module:
    return build_model(ModelSpec(width=4, blocks=(1, 1)), (1, 8, 8), 10)


def various() -> nn.Module:
    """A class of modules on which the libraries disagree."""
    model = nn.Module()
    model.norm = nn.GroupNorm(2, 4)
    model.rms = nn.RMSNorm(4)
    model.input_norm = nn.RMSNorm(4)
    model.attention = nn.MultiheadAttention(4, 2)
    model.instance = nn.InstanceNorm2d(4, affine=True)
    model.normal = nn.Linear(4, 4)
    model.shared = model.normal
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.frozen = nn.Linear(2, 2)
    model.frozen.requires_grad_(False)
    return model


MODELS = {"resnet-18": resnet18, "bert": bert, "ours": ours, "various": various}


def names_of(model: nn.Module, parameters: Any) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in parameters}


def trainable(model: nn.Module, names: frozenset[str]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and name in names}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_timms_rule_is_timms(build: Any) -> None:
    optim, model = library("timm.optim"), build()
    exempt = {
        name for group in optim.param_groups_weight_decay(model, 0.1) if group["weight_decay"] == 0 for name in names_of(model, group["params"])
    }
    assert trainable(model, exempt_in_timm(model)) == exempt


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_timms_rule_is_what_timm_documents(build: Any) -> None:
    """One-dimensional parameters and biases are exempt; told again here, for timm needs a torchvision that not every torch has."""
    documented = {name for name, parameter in build().named_parameters() if parameter.ndim <= 1 or name.endswith(".bias")}
    assert trainable(build(), exempt_in_timm(build())) == documented & trainable(build(), frozenset(documented))


def test_timm_leaves_out_what_the_model_itself_names() -> None:
    optim, model = library("timm.optim"), nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    model.no_weight_decay = lambda: {"0.*"}  # type: ignore[assignment]
    built = optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    exempt = {name for group in built.param_groups if group["weight_decay"] == 0 for name in names_of(model, group["params"])}
    assert exempt_in_timm(model) == exempt == {"0.weight", "1.bias"}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_trainers_rule_is_the_trainers(build: Any) -> None:
    trainer, model = library("transformers.trainer").Trainer, build()
    decayed = set(trainer.get_decay_parameter_names(None, model))
    assert set(dict(model.named_parameters())) - exempt_in_hf(model) == decayed & set(dict(model.named_parameters()))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_torchvisions_recipe_is_torchvisions(build: Any) -> None:
    model = build()
    found = LIBRARIES["torchvision-recipe"](model)
    reference = {
        f"{path}.{name}" for path, module in model.named_modules() if isinstance(module, TORCHVISION_NORMS) for name, _ in module.named_parameters()
    }
    assert found == reference
    norms, others = torchvisions_own_split()(model)
    assert names_of(model, norms) == trainable(model, found)
    assert names_of(model, others) == trainable(model, frozenset(dict(model.named_parameters())) - found)


def torchvisions_own_split() -> Any:
    """torchvision.ops._utils.split_normalization_params, from its file: importing the package needs the torch that it was built for."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed: pip install torchvision")
    file = importlib.util.spec_from_file_location("torchvision_ops_utils", Path(spec.origin).parent / "ops" / "_utils.py")
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module.split_normalization_params


def norm_bias_params(module: nn.Module) -> list[nn.Parameter]:
    """fastai's documented walk: all of a norm, and the bias of everything else."""
    if isinstance(module, FASTAI_NORMS):
        return list(module.parameters())
    found = [parameter for child in module.children() for parameter in norm_bias_params(child)]
    bias = getattr(module, "bias", None)
    return found if bias is None else [*found, bias]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_fastais_rule_is_the_walk_that_it_documents(build: Any) -> None:
    model = build()
    assert LIBRARIES["fastai"](model) == names_of(model, norm_bias_params(model))


def test_on_a_resnet_18_the_trainer_decays_gains_that_timm_spares() -> None:
    model = resnet18()
    plan = decay_plan(parameter_roles(model), OptimizerSpec(gamma="last"))
    found = compare(model, plan, 5.0e-4)
    assert {library: (each.gains_decayed, len(each.differences_on_gains), len(each.differences)) for library, each in found.items()} == {
        "torch": (20, 12, 33),
        "timm": (0, 8, 8),
        "hf": (20, 12, 12),
        "torchvision": (20, 12, 33),
        "torchvision-recipe": (0, 8, 9),
        "fastai": (0, 8, 8),
    }
    assert found["timm"].differences == tuple(f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1))


def test_on_a_bert_only_torch_and_torchvision_decay_gains() -> None:
    model = bert()
    plan = decay_plan([role_by_owner(name, model) for name, _ in model.named_parameters()], OptimizerSpec())
    found = compare(model, plan, 5.0e-4)
    gains = 2 * 3 + 1
    assert {library: (each.gains_decayed, len(each.differences_on_gains)) for library, each in found.items()} == {
        "torch": (gains, gains),
        "timm": (0, 0),
        "hf": (0, 0),
        "torchvision": (gains, gains),
        "torchvision-recipe": (0, 0),
        "fastai": (0, 0),
    }
    assert found["hf"].differences == ()


def role_by_owner(name: str, model: nn.Module) -> ParameterRole:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, nn.LayerNorm):
        return ParameterRole(name, Role.GAIN if own == "weight" else Role.SHIFT, path, "stream")
    return ParameterRole(name, Role.EMBEDDING if isinstance(owner, nn.Embedding) else Role.BIAS if own == "bias" else Role.WEIGHT, path)


def test_another_rate_and_another_anchor_are_differences() -> None:
    model = ours()
    roles = parameter_roles(model)
    gains = tuple(role.name for role in roles if role.role is Role.GAIN)
    for policy in ({"gamma": "all@1", "shift": "decayed"}, {"gamma": "all", "gamma_decay": 0.1, "shift": "decayed"}):
        assert compare(model, decay_plan(roles, OptimizerSpec.model_validate(policy)), 5.0e-4, ["torch"])["torch"].differences == gains
    same = OptimizerSpec(gamma="all", shift="decayed")
    assert compare(model, decay_plan(roles, same), 5.0e-4, ["torch"])["torch"].differences == ()


def test_where_nothing_decays_nothing_differs() -> None:
    model = ours()
    plan = decay_plan(parameter_roles(model), OptimizerSpec(weight_decay=0))
    assert {each.differences for each in compare(model, plan, 0.0).values()} == {()}


def test_every_trainable_parameter_is_decayed_or_exempt_and_frozen_ones_are_neither() -> None:
    model = ours()
    model.get_submodule("head").requires_grad_(False)
    plan = decay_plan(parameter_roles(model), OptimizerSpec())
    for each in compare(model, plan, 5.0e-4).values():
        assert sorted((*each.decayed, *each.exempt)) == sorted(name for name, _ in model.named_parameters() if not name.startswith("head"))


def test_an_unknown_library_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'keras'.*torch, timm, hf, torchvision"):
        compare(ours(), [], 0.1, ["timm", "keras"])
