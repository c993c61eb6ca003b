"""Comparison: what each library's default weight decay would do to the same model, beside this study's policy.

    library             exempt by default                                               goes by
    torch               nothing                                                         -
    timm                tensors of at most one axis, `.bias`, `no_weight_decay()`       shape and name
    hf                  LayerNorms, names with `bias`, `layernorm`, `norm` as a part    type and name
    torchvision         nothing (`--norm-weight-decay` not given)                       -
    torchvision-recipe  norm layers (`--norm-weight-decay 0`, as its recent recipes)    type
    fastai              BatchNorm, InstanceNorm, LayerNorm, attributes called `bias`    type and name

The rules are written anew from the libraries' documented behaviour; the tests hold them against the libraries' own functions.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

from study.errors import InputError
from study.training.decay import Planned
from study.training.roles import Role

HF_PATTERNS = tuple(map(re.compile, (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")))
"""Names that Hugging Face's Trainer exempts, looked for in the lower-case name."""

TORCHVISION_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)
"""What torchvision's references take for a norm layer; RMSNorm is none."""

FASTAI_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm)
"""fastai's `norm_types`; GroupNorm and RMSNorm are none."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one library's default would do to each trainable parameter of a model, and where that is not what the study's policy does."""

    library: str
    decayed: tuple[str, ...]
    """The parameters that it decays, to 0 and with the one weight decay that it is given."""
    exempt: tuple[str, ...]
    gains_decayed: int
    """How many of `decayed` are gains."""
    differences: tuple[str, ...]
    """The parameters that the study's policy treats otherwise: exempt against decayed, another rate, another anchor, or a constraint."""
    differences_on_gains: tuple[str, ...]
    """Those of `differences` that are gains."""

    def document(self) -> dict[str, object]:
        """What `study plan --json` says under `compare`, beside the library's name."""
        return {
            "decayed": list(self.decayed),
            "exempt": list(self.exempt),
            "gains_decayed": self.gains_decayed,
            "differs": len(self.differences),
            "differs_on_gains": len(self.differences_on_gains),
            "differences": list(self.differences),
        }


def compare(model: nn.Module, plan: Sequence[Planned], weight_decay: float, libraries: Iterable[str] | None = None) -> dict[str, Comparison]:
    """What each library's default would do to a model, beside a plan for the same model.

    Args:
        plan: What the study's policy does to each of the model's parameters, from `decay_plan`.
        weight_decay: The strength that the libraries would be given; at 0 nothing decays anywhere.
        libraries: Out of `LIBRARIES`. Default: all of them.

    Raises:
        InputError: if a library is not known.
    """
    wanted = tuple(dict.fromkeys(LIBRARIES if libraries is None else libraries))
    if strangers := [library for library in wanted if library not in LIBRARIES]:
        raise InputError(f"unknown library (got {', '.join(map(repr, strangers))})", where="--compare", remedy=f"use {', '.join(LIBRARIES)}, or all")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = [planned for planned in plan if planned.parameter.name in trainable]
    return {library: _compared(library, LIBRARIES[library](model), rows, weight_decay) for library in wanted}


def _compared(library: str, exempt: frozenset[str], plan: Sequence[Planned], weight_decay: float) -> Comparison:
    decayed = tuple(planned.parameter.name for planned in plan if planned.parameter.name not in exempt)
    gains = {planned.parameter.name for planned in plan if planned.parameter.role is Role.GAIN}
    differences = tuple(planned.parameter.name for planned in plan if _differs(planned, 0.0 if planned.parameter.name in exempt else weight_decay))
    return Comparison(
        library,
        decayed,
        tuple(planned.parameter.name for planned in plan if planned.parameter.name in exempt),
        len(gains.intersection(decayed)),
        differences,
        tuple(name for name in differences if name in gains),
    )


def _differs(planned: Planned, rate: float) -> bool:
    return planned.constrained or planned.rate != rate or (rate > 0 and planned.anchor != 0)


def exempt_in_torch(model: nn.Module) -> frozenset[str]:
    """Nothing: an optimizer over `model.parameters()` has one param group, and every parameter in it decays.

    Source: torch.optim, "Per-parameter options", torch 2.13.
    """
    del model
    return frozenset()


def exempt_in_timm(model: nn.Module) -> frozenset[str]:
    """Tensors of at most one axis, names that end in `.bias`, and what the model's own `no_weight_decay()` names, wildcards included.

    Source: timm.optim.param_groups_weight_decay and create_optimizer_v2 with filter_bias_and_bn=True, its default, timm 1.0.31.
    """
    own = getattr(model, "no_weight_decay", None)
    patterns = own() if callable(own) else ()
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, pattern) for pattern in patterns)
    )


def exempt_in_hf(model: nn.Module) -> frozenset[str]:
    """What lies inside a torch LayerNorm, and names that match one of `HF_PATTERNS`: a BatchNorm called `bn1` or `norm1` is decayed.

    Source: transformers.Trainer.get_decay_parameter_names and trainer_pt_utils.get_parameter_names, transformers 5.23.0.
    """
    inside = tuple(f"{path}." for path, module in model.named_modules() if path and isinstance(module, nn.LayerNorm))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(inside) or any(map(_searched_in(name.lower()), HF_PATTERNS)))


def _searched_in(name: str) -> Callable[[re.Pattern[str]], bool]:
    return lambda pattern: pattern.search(name) is not None


def exempt_in_torchvision(model: nn.Module) -> frozenset[str]:
    """Nothing: without `--norm-weight-decay` and `--bias-weight-decay` every parameter is in the group that decays.

    Source: torchvision's references/classification/utils.py, set_weight_decay with norm_weight_decay=None, its default, torchvision 0.28.
    """
    del model
    return frozenset()


def exempt_in_torchvision_recipe(model: nn.Module) -> frozenset[str]:
    """The own parameters of norm layers, by type; biases of other layers decay.

    Source: torchvision's references/classification/utils.py, set_weight_decay with norm_weight_decay=0, as the recipes of its newer
    weights say, torchvision 0.28.
    """
    return _own_parameters(model, lambda module, own: isinstance(module, TORCHVISION_NORMS))


def exempt_in_fastai(model: nn.Module) -> frozenset[str]:
    """What lies inside a layer of `FASTAI_NORMS`, and every parameter that its module calls `bias`.

    Source: fastai.torch_core.norm_bias_params and Learner.create_opt with wd_bn_bias=False, its default, fastai 2.8.12.
    """
    return _own_parameters(model, lambda module, own: isinstance(module, FASTAI_NORMS) or own == "bias")


def _own_parameters(model: nn.Module, chosen: Callable[[nn.Module, str], bool]) -> frozenset[str]:
    """Names of the parameters that a rule chooses by the module that holds them and by their name in it."""
    return frozenset(
        f"{path}.{own}".removeprefix(".")
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if chosen(module, own)
    )


LIBRARIES: dict[str, Callable[[nn.Module], frozenset[str]]] = {
    "torch": exempt_in_torch,
    "timm": exempt_in_timm,
    "hf": exempt_in_hf,
    "torchvision": exempt_in_torchvision,
    "torchvision-recipe": exempt_in_torchvision_recipe,
    "fastai": exempt_in_fastai,
}
"""The rule of each library: which parameters of a model it exempts from weight decay by default."""
