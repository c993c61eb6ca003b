"""Exports are executed: the code they hold trains the same weights as this package, and the scripts' own functions read the settings."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from study.errors import NotExpressible
from study.results.best import BestConfig, ObjectiveResult
from study.results.export import TARGETS, Target, export
from study.results.export_plan import Export
from study.training.decay import build_optimizer, plan_for
from study.training.models import build_model
from study.training.schedules import build_scheduler, lr_factor
from study.trial import TrialSpec
from study.tuning.preflight import model_plan
from tests.libraries import library

STEPS = 6
"""Optimizer steps after which weights are compared; warmup and the first milestone lie in them where a schedule has them."""

POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "all, shifts too": {"gamma": "all", "shift": "decayed"},
    "all to 1": {"gamma": "all@1"},
    "inner and last, each its own way": {"gamma": "inner+last@1", "gamma_decay": 0.02, "shift": "decayed", "shift_decay": 0.003},
    "back to the start": {"gamma": "last", "target": "init", "shift": "decayed"},
}

RULES: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd", "momentum": 0.8},
    "nesterov": {"rule": "sgd", "nesterov": True},
    "decoupled sgd": {"rule": "sgd", "decay": "decoupled"},
    "decoupled nesterov": {"rule": "sgd", "decay": "decoupled", "nesterov": True},
    "adam": {"rule": "adam", "lr": 0.01, "eps": 1e-6},
    "adamw": {"rule": "adamw", "lr": 0.01, "beta1": 0.8, "beta2": 0.95},
    "lion": {"rule": "lion", "lr": 0.01},
}

OWN_RULES: dict[str, dict[str, Any]] = {
    **RULES,
    "decoupled adam": {"rule": "adam", "decay": "decoupled"},
    "coupled lion": {"rule": "lion", "decay": "coupled"},
}
"""Those that code can bring along where a script has none."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"shape": "constant"},
    "cosine": {"shape": "cosine", "end": 0.1},
    "linear": {"shape": "linear", "end": 0.01},
    "step": {"shape": "step", "milestones": [0.1, 0.75], "factor": 0.2},
    "cosine after a warmup": {"shape": "cosine", "warmup": 0.1},
    "step after a warmup": {"shape": "step", "warmup": 0.34},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Several threads on shared cores are a hundred times slower on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best(optimizer: dict[str, Any], schedule: dict[str, Any] | None = None, **more: Any) -> BestConfig:
    trial = {
        "data": {"name": "digits", "batch_size": 128},
        "model": {"width": 4, "blocks": [1, 1]},
        "optimizer": {"lr": 0.1, "weight_decay": 0.01, **optimizer},
        "schedule": {"epochs": 3, **(schedule or {})},
        **more,
    }
    return BestConfig(
        study_id="gains-0123",
        name="gains",
        trial_id="gains-0007",
        run_id="",
        arm="all",
        objective=ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.0625),
        spec_hash="0" * 64,
        git_commit="",
        versions={},
        date="2026-11-21T05:00:00+00:00",
        trial=TrialSpec.model_validate(trial),
    )


def exported(config: BestConfig, to: Target) -> Export:
    return export(config, to, model_plan(config.trial))


def executed(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "exported", "exec"), names)
    return names


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


def network(config: BestConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model, (1, 8, 8), 10).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=generator), torch.randint(10, (8,), generator=generator)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> dict[str, torch.Tensor]:
    for images, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_here(config: BestConfig, total_steps: int | None = None) -> dict[str, torch.Tensor]:
    model = network(config)
    optimizer = build_optimizer(model, config.optimizer)
    return trained(model, optimizer, build_scheduler(optimizer, config.schedule, total_steps) if total_steps else None)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")


def total_steps(config: BestConfig) -> int:
    return model_plan(config.trial).steps_per_epoch * config.schedule.epochs


@pytest.mark.parametrize("rule", OWN_RULES.values(), ids=OWN_RULES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_torch_code_trains_the_same_weights(policy: dict[str, Any], rule: dict[str, Any]) -> None:
    config = best({**policy, **rule}, {"warmup": 0.1})
    code, model = executed(exported(config, "torch").text), network(config)
    optimizer = code["build_optimizer"](model)
    same(trained(model, optimizer, code["build_scheduler"](optimizer)), trained_here(config, total_steps(config)))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_torch_code_has_the_groups_of_the_decay_plan(policy: dict[str, Any]) -> None:
    config = best(policy)
    model = network(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = executed(exported(config, "torch").text)["param_groups"](model)
    found = {names[parameter]: (group["weight_decay"], group.get("anchor", 0.0)) for group in groups for parameter in group["params"]}
    assert found == {planned.parameter.name: (planned.rate, planned.anchor) for planned in plan_for(model, config.optimizer)}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_torch_code_has_the_schedule(schedule: dict[str, Any]) -> None:
    config = best({}, schedule)
    factor, total = executed(exported(config, "torch").text)["lr_factor"], total_steps(config)
    assert [factor(step) for step in range(total + 2)] == [lr_factor(config.schedule, step, total) for step in range(total + 2)]


def test_torch_code_refuses_a_model_that_is_not_the_studys() -> None:
    code = executed(exported(best({}), "torch").text)
    with pytest.raises(ValueError, match=r"no such parameters: .*layer2\.1\.conv1\.weight"):
        code["param_groups"](network(best({}, model={"width": 4, "blocks": [1, 2]})))
    with pytest.raises(ValueError, match=r"lacks parameters of the study's: .*layer2\.0\.conv1\.weight"):
        code["param_groups"](network(best({}, model={"width": 4, "blocks": [1]})))


def test_torch_code_says_how_to_clip() -> None:
    assert "clip_grad_norm_(model.parameters(), 0.5)" in exported(best({"clip": 0.5}), "torch").text
    assert "clip_grad_norm_" not in exported(best({}), "torch").text


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_hf_code_makes_training_arguments_and_the_same_optimizer(rule: dict[str, Any], tmp_path: Any) -> None:
    library("transformers")
    library("accelerate")
    config = best({**rule, "gamma": "inner+last@1"}, {"warmup": 0.1}, seed=7)
    code, model = executed(exported(config, "hf").text), network(config)
    arguments = code["training_arguments"](str(tmp_path), use_cpu=True, report_to="none")
    assert (arguments.learning_rate, arguments.weight_decay) == (config.optimizer.lr, config.optimizer.weight_decay)
    assert (arguments.max_grad_norm, arguments.num_train_epochs, arguments.per_device_train_batch_size, arguments.seed) == (0.0, 3, 128, 7)
    same(trained(model, *code["optimizers"](model)), trained_here(config, total_steps(config)))


def test_hf_code_names_what_trainer_alone_would_decay_wrongly() -> None:
    text = exported(best({"gamma": "none"}), "hf").text
    (sentence,) = [line for line in text.splitlines() if "Without optimizers=" in line]
    assert "3 of them gains" not in sentence
    trainer, model = library("transformers.trainer").Trainer, network(best({}))
    decayed = set(trainer.get_decay_parameter_names(None, model))
    wrong = {planned.parameter.name for planned in plan_for(model, best({}).optimizer) if (planned.rate > 0) != (planned.parameter.name in decayed)}
    assert wrong
    assert set(sentence.rpartition(": ")[2].rstrip(".").split(", ")) == wrong


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
    settings = yaml.safe_load(done.text)
    options = {key: settings[key] for key in ("opt", "lr", "weight_decay", "momentum") if key in settings}
    options |= {own: settings[key] for own, key in (("eps", "opt_eps"), ("betas", "opt_betas")) if key in settings}
    return optim.create_optimizer_v2(model, **options, **settings.get("opt_kwargs", {}))  # type: ignore[no-any-return]


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


def torchvisions_groups(model: nn.Module, flags: dict[str, str]) -> list[dict[str, Any]]:
    """What the documented set_weight_decay makes of its flags: names first, then types of norm layers, then the rest."""
    from study.training.compare import TORCHVISION_NORMS

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


@pytest.mark.parametrize("to", TARGETS)
def test_every_export_says_where_it_comes_from(to: Target) -> None:
    text = exported(best({}), to).text
    if to == "json":
        assert json.loads(text)["trial_id"] == "gains-0007"
        return
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert "study gains (gains-0123): gains-0007, val/error 0.0625 (minimized)" in comment[0]
    assert "digits" in comment[1]
    assert "resnet, width 4, blocks [1, 1]" in comment[1]
    assert "batches of 128, 3 epochs, seed 0" in comment[2]


REFUSED: dict[str, tuple[Target, dict[str, Any], dict[str, Any], str]] = {
    "a constraint": ("torch", {"constraint": {"name": "projection"}}, {}, r"optimizer\.constraint: .*for 6 parameters: .*layer1\.0\.conv1\.weight"),
    "a window of decay": ("hf", {}, {"decay": {"window": [0.0, 0.4]}}, r"schedule\.decay: "),
    "coupled lion in timm": ("timm", {"rule": "lion", "decay": "coupled"}, {}, r"optimizer\.rule: timm has no coupled rule 'lion'"),
    "adam in torchvision": ("torchvision", {"rule": "adam"}, {}, r"optimizer\.rule: .*got coupled adam"),
    "decoupled sgd in torchvision": ("torchvision", {"decay": "decoupled"}, {}, r"optimizer\.rule: .*got decoupled sgd"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_lines_can_repair_is_refused(case: str) -> None:
    to, optimizer, schedule, message = REFUSED[case]
    with pytest.raises(NotExpressible, match=message) as refused:
        exported(best(optimizer, schedule), to)
    assert "study.build_optimizer" in str(refused.value)
