"""Exports as settings: the scripts' own functions read them, and with the repair in the comments train the same weights as this package."""

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from study.results.export_plan import Export
from study.training.compare import TORCHVISION_NORMS
from study.training.schedules import lr_factor
from tests.libraries import library
from tests.results.exporting import POLICIES, RULES, SCHEDULES, best, executed, exported, network, same, total_steps, trained, trained_here


def repairs(text: str) -> list[str]:
    """The blocks of code among the comments."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("#     "):
            blocks[-1].append(line[6:])
        elif line == "#" and blocks[-1]:
            blocks[-1].append("")
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_timms_optimizer_with_the_repair_trains_the_same_weights(policy: dict[str, Any], rule: dict[str, Any]) -> None:
    optim, config = library("timm.optim"), best({**policy, **rule}, {"shape": "constant"})
    done, model = exported(config, "timm"), network(config)
    optimizer = timms_optimizer(optim, model, done)
    blocks = repairs(done.text)
    assert len(blocks) == len(done.warnings) == bool(policy)
    for block in blocks:
        executed(block, model=model, optimizer=optimizer)
    same(trained(model, optimizer), trained_here(config))


def timms_optimizer(optim: Any, model: nn.Module, done: Export) -> torch.optim.Optimizer:
    arguments = type("Arguments", (), {"momentum": 0.9, "opt_kwargs": {}, **yaml.safe_load(done.text)})
    return optim.create_optimizer_v2(model, **optim.optimizer_kwargs(arguments), **arguments.opt_kwargs)  # type: ignore[no-any-return, attr-defined]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_timms_schedule_is_the_studys_with_the_repair_where_there_is_a_warmup(schedule: dict[str, Any]) -> None:
    timm_scheduler, config = library("timm.scheduler"), best({"gamma": "none"}, schedule)
    done, total = exported(config, "timm"), total_steps(config)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    arguments = type("Arguments", (), yaml.safe_load(done.text))
    scheduler, epochs = timm_scheduler.create_scheduler(arguments, optimizer, updates_per_epoch=total // 3)
    assert epochs == 3
    assert isinstance(epochs, int)
    assert bool(schedule.get("warmup")) == any("warms up" in warning for warning in done.warnings)
    for block in repairs(done.text):
        executed(block, lr_scheduler=scheduler)
    found = []
    for step in range(1, total):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)
    assert found == pytest.approx([0.1 * lr_factor(config.schedule, step, total) for step in range(total - 1)], rel=1e-12, abs=1e-15)


def test_a_warning_names_exactly_what_would_decay_wrongly() -> None:
    (warning,) = exported(best({"gamma": "last"}, {"shape": "constant"}), "timm").warnings
    assert warning == "timm would decay 2 parameters wrongly, 2 of them gains: layer1.0.norm2.weight, layer2.0.norm2.weight"


def half_frozen() -> nn.Module:
    """A user's model whose first norm is not trained."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    model[2].requires_grad_(False)
    return model


def test_what_is_frozen_decays_nowhere() -> None:
    config = best({"gamma": "all"}, {"shape": "constant"}, model={"name": f"import:{__name__}:half_frozen"})
    assert exported(config, "timm").warnings == ("timm would decay 1 parameter wrongly, 1 of them gains: 4.weight",)
    assert '"2.weight",' in exported(config, "torch").text


def torchvisions_groups(model: nn.Module, flags: dict[str, str]) -> list[dict[str, Any]]:
    """What the documented set_weight_decay makes of its flags: names first, then types of norm layers, then the rest."""
    own = {"bias": flags.get("bias-weight-decay")}
    own |= dict.fromkeys(("class_token", "position_embedding", "relative_position_bias_table"), flags.get("transformer-embedding-decay"))
    groups: dict[str, list[nn.Parameter]] = {}
    for module in model.modules():
        norm = flags.get("norm-weight-decay") if isinstance(module, TORCHVISION_NORMS) else None
        for name, parameter in module.named_parameters(recurse=False):
            groups.setdefault(own.get(name) or norm or flags["weight-decay"], []).append(parameter)
    return [{"params": parameters, "weight_decay": float(rate)} for rate, parameters in groups.items()]


def flags_of(text: str) -> dict[str, str]:
    command = "".join(line.rstrip("\\") for line in text.splitlines() if not line.startswith("#"))
    words = command.split()
    assert words[:2] == ["torchrun", "train.py"]
    return {flag.removeprefix("--"): value for flag, value in zip(words[2::2], words[3::2], strict=True)}


@pytest.mark.parametrize("rule", [name for name in RULES if name in ("sgd", "nesterov", "adamw")])
@pytest.mark.parametrize("policy", POLICIES)
def test_torchvisions_optimizer_with_the_repair_trains_the_same_weights(policy: str, rule: str) -> None:
    config = best({**POLICIES[policy], **RULES[rule]}, {"warmup": 0.1})
    done, model = exported(config, "torchvision"), network(config)
    flags = flags_of(done.text)
    groups, lr = torchvisions_groups(model, flags), float(flags["lr"])
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr)
    if flags["opt"].startswith("sgd"):
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=float(flags["momentum"]), nesterov="nesterov" in flags["opt"])
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "torch": torch}
    for block in repairs(done.text):
        names = executed(block, **names)
    same(trained(model, optimizer, names["lr_scheduler"]), trained_here(config, total_steps(config)))


def test_torchvision_says_simple_policies_with_flags_alone() -> None:
    constant = {"shape": "constant"}
    none = exported(best({"gamma": "none"}, constant), "torchvision")
    assert none.warnings == ()
    assert {name: rate for name, rate in flags_of(none.text).items() if "decay" in name} == {
        "weight-decay": "0.01",
        "norm-weight-decay": "0.0",
        "bias-weight-decay": "0.0",
    }
    everything = exported(best({"gamma": "all", "shift": "decayed"}, constant), "torchvision")
    assert everything.warnings == ()
    assert [name for name in flags_of(everything.text) if "decay" in name] == ["weight-decay"]
    last = exported(best({"gamma": "last"}, constant), "torchvision").warnings
    assert last == ("torchvision's references would decay 2 parameters wrongly, 2 of them gains: layer1.0.norm2.weight, layer2.0.norm2.weight",)
