"""Exports as code are executed, and train the same weights as this package; no export hides where it comes from."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from study.errors import NotExpressible
from study.results.export import TARGETS, WITH_A_MODEL, Target
from study.training.decay import build_optimizer, plan_for
from study.training.schedules import build_scheduler, lr_factor
from tests.libraries import library
from tests.results.exporting import (
    OWN_RULES,
    POLICIES,
    RULES,
    SCHEDULES,
    STEPS,
    batches,
    best,
    executed,
    exported,
    network,
    one_thread,
    same,
    total_steps,
    trained,
    trained_here,
)


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


class WithLoss(nn.Module):
    """A model as Trainer wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.network(images), labels)}


def test_the_trainer_itself_trains_the_same_weights_with_hf_code(tmp_path: Any) -> None:
    transformers = library("transformers")
    library("accelerate")
    config = best({"rule": "adamw", "lr": 0.01, "gamma": "inner+last@1"}, {"warmup": 0.5, "epochs": STEPS})
    code, model = executed(exported(config, "hf").text), network(config)
    images, labels = next(batches())
    arguments = code["training_arguments"](
        str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no"
    )
    dataset = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    optimizers = code["optimizers"](model, total_steps=STEPS)
    with one_thread():
        transformers.Trainer(WithLoss(model), arguments, train_dataset=dataset, optimizers=optimizers).train()

    reference = network(config)
    optimizer = build_optimizer(reference, config.optimizer)
    scheduler = build_scheduler(optimizer, config.schedule, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(images), labels).backward()
        optimizer.step()
        scheduler.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-9)


def test_hf_code_names_what_trainer_alone_would_decay_wrongly() -> None:
    text = exported(best({"gamma": "none"}), "hf").text
    (sentence,) = [line for line in text.splitlines() if "Without optimizers=" in line]
    assert "3 of them gains" not in sentence
    trainer, model = library("transformers.trainer").Trainer, network(best({}))
    decayed = set(trainer.get_decay_parameter_names(None, model))
    wrong = {planned.parameter.name for planned in plan_for(model, best({}).optimizer) if (planned.rate > 0) != (planned.parameter.name in decayed)}
    assert wrong
    assert set(sentence.rpartition(": ")[2].rstrip(".").split(", ")) == wrong


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
    **{f"muon in {to}": (to, {"rule": "muon", "aux_lr": 1e-3}, {}, r"optimizer\.rule: .*by muon and all else by adamw") for to in WITH_A_MODEL},
    "decoupled sgd in torchvision": ("torchvision", {"decay": "decoupled"}, {}, r"optimizer\.rule: .*got decoupled sgd"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_lines_can_repair_is_refused(case: str) -> None:
    to, optimizer, schedule, message = REFUSED[case]
    with pytest.raises(NotExpressible, match=message) as refused:
        exported(best(optimizer, schedule), to)
    assert "study.build_optimizer" in str(refused.value)
