"""Exports as Python code: plain torch, and Hugging Face's Trainer. The code needs nothing of this package.

ModelPlan ──> GROUPS ──> param_groups(model) ──> build_optimizer(model) ──> build_scheduler(optimizer)
"""

import json
from collections.abc import Sequence

from study.optimizer import OptimizerSpec
from study.results.best import BestConfig
from study.results.export_plan import Export, ModelPlan, PlanRow, commented, header, not_expressible, refuse_what_cannot_be_said, wrong_sentence
from study.results.export_plan import wrongly_decayed as wrongly
from study.trial import ScheduleSpec

PARAM_GROUPS = '''
def param_groups(model):
    """The parameters of the study's model in groups of equal decay, each parameter exactly once."""
    parameters = dict(model.named_parameters())
    claimed = [name for group in GROUPS for name in group["names"]]
    if unclaimed := [name for name in parameters if name not in claimed]:
        raise ValueError(f"the study's model has no such parameters: {unclaimed}")
    if absent := [name for name in claimed if name not in parameters]:
        raise ValueError(f"this model lacks parameters of the study's: {absent}")
    groups = []
    for group in GROUPS:
        options = {key: value for key, value in group.items() if key != "names"}
        groups.append({"params": [parameters[name] for name in group["names"]], **options})
    return groups
'''

ANCHORS = '''
def set_anchors(optimizer):
    """Where each parameter is pulled to: a number, or the value that it has now."""
    for group in optimizer.param_groups:
        values = group["params"] if group.get("anchor", 0.0) else []
        group["anchors"] = [value.detach().clone() if group["anchor"] == "init" else torch.full_like(value, group["anchor"]) for value in values]
'''

PULL_GRADIENTS = '''
@torch.no_grad()
def pull_to_anchors(optimizer, args, kwargs):
    """torch adds weight_decay x p to the gradient; without weight_decay x anchor it pulls to the anchor."""
    for group in optimizer.param_groups:
        for parameter, anchor in zip(group["params"], group["anchors"]):
            if parameter.grad is not None:
                parameter.grad.sub_(anchor, alpha=group["weight_decay"])
'''

PULL_PARAMETERS = '''
@torch.no_grad()
def pull_to_anchors(optimizer, args, kwargs):
    """torch shrinks by lr x weight_decay x p; adding lr x weight_decay x anchor makes it pull to the anchor."""
    for group in optimizer.param_groups:
        for parameter, anchor in zip(group["params"], group["anchors"]):
            if parameter.grad is not None:
                parameter.add_(anchor, alpha=group["lr"] * group["weight_decay"])
'''

SHRINK = '''
@torch.no_grad()
def shrink(optimizer, args, kwargs):
    """p <- p - lr x decay x (p - anchor): decay beside the step, out of the momentum; torch's own decay is 0."""
    for group in optimizer.param_groups:
        anchors = group["anchors"] or [None] * len(group["params"])
        for parameter, anchor in zip(group["params"], anchors):
            if parameter.grad is not None:
                parameter.mul_(1 - group["lr"] * group["decay"])
                if anchor is not None:
                    parameter.add_(anchor, alpha=group["lr"] * group["decay"])
'''

LION = '''
class Lion(torch.optim.Optimizer):
    """p <- p - lr x sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g; weight decay is {form}. torch has no such rule.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, algorithm 2, arXiv:2302.06675.
    """

    def __init__(self, params, lr, betas):
        super().__init__(params, {{"lr": lr, "betas": betas, "weight_decay": 0.0}})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (first, second), decay = group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                gradient = {gradient}
                update = torch.sign(first * moment + (1 - first) * gradient)
                moment.mul_(second).add_(gradient, alpha=1 - second)
                parameter.mul_({kept}).sub_(update, alpha=group["lr"])
        return loss
'''

SCHEDULER = '''

def build_scheduler(optimizer, total_steps=TOTAL_STEPS):
    """To be stepped once after every optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total_steps))
'''

OTHER_MODEL = [
    "The groups name the parameters of the study's own model. For another one, let the places of its gains be found:",
    'optimizer = study.build_optimizer(model, study.load_best("best.yaml").optimizer)',
]


def torch_code(best: BestConfig, plan: ModelPlan) -> Export:
    """Code that builds the same param groups, optimizer and schedule with torch alone.

    Raises:
        NotExpressible: if torch has no such rule, and no few lines make up for it.
    """
    refuse_what_cannot_be_said(best, plan, "plain torch")
    loop = ["Use: optimizer = build_optimizer(model); scheduler = build_scheduler(optimizer); then for every batch:", *_loop(best.optimizer)]
    top = commented([*header(best), "", *loop, "", *OTHER_MODEL])
    return Export(f"{top}\n{_imports(best)}\n{_definitions(best, plan)}")


def _imports(best: BestConfig) -> str:
    return "import math\n\nimport torch" if best.schedule.shape == "cosine" else "import torch"


def _loop(optimizer: OptimizerSpec) -> list[str]:
    clip = [] if optimizer.clip is None else [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {optimizer.clip!r})"]
    return [f"    {'; '.join(['loss.backward()', *clip, 'optimizer.step()', 'scheduler.step()', 'optimizer.zero_grad()'])}"]


def hf_code(best: BestConfig, plan: ModelPlan) -> Export:
    """Code that builds TrainingArguments, and the optimizer and schedule that Trainer takes in their place.

    Raises:
        NotExpressible: as `torch_code`.
    """
    refuse_what_cannot_be_said(best, plan, "Hugging Face's Trainer")
    decay = best.optimizer.weight_decay
    wrong = wrongly(plan.rows, [0.0 if "hf" in row.spared_by else decay for row in plan.rows])
    notes = [f"Without optimizers=, {wrong_sentence('Trainer', wrong)}."] if wrong else []
    use = [
        "Use: Trainer(model, training_arguments(), train_dataset=..., optimizers=optimizers(model, total_steps)), where total_steps is the",
        "number of optimizer steps of the whole training. Given optimizers, Trainer takes lr, decay and schedule from them alone.",
    ]
    warnings = (
        [] if best.trial.precision != "float64" else ["Trainer has no float64; the study trained in it: model.double() before it is handed over"]
    )
    top = commented([*header(best), *notes, *warnings, "", *use, "", *OTHER_MODEL])
    imports = f"{_imports(best)}\nfrom transformers import TrainingArguments"
    return Export(f"{top}\n{imports}\n{_definitions(best, plan)}{_training_arguments(best)}", tuple(warnings))


def _training_arguments(best: BestConfig) -> str:
    arguments = {
        "num_train_epochs": best.schedule.epochs,
        "per_device_train_batch_size": best.data.batch_size,
        "dataloader_drop_last": True,
        "learning_rate": best.optimizer.lr,
        "weight_decay": best.optimizer.weight_decay,
        "max_grad_norm": best.optimizer.clip or 0.0,
        "seed": best.trial.seed,
        **({"bf16": True} if best.trial.precision == "bf16" else {}),
    }
    given = "".join(f'        "{name}": {value!r},\n' for name, value in arguments.items())
    return f'''

def training_arguments(output_dir="out", **more):
    """The best trial's settings; `more` adds to them or replaces them. max_grad_norm 0 does not clip, where Trainer's default is 1."""
    settings = {{
{given}    }}
    return TrainingArguments(output_dir=output_dir, **{{**settings, **more}})


def optimizers(model, total_steps=TOTAL_STEPS):
    """What Trainer takes as optimizers=: the policy, exactly."""
    optimizer = build_optimizer(model)
    return optimizer, build_scheduler(optimizer, total_steps)
'''


def _definitions(best: BestConfig, plan: ModelPlan) -> str:
    """GROUPS, TOTAL_STEPS and the functions that use them."""
    optimizer = best.optimizer
    own_form = optimizer.rule == "sgd" and optimizer.form == "decoupled"
    anchored = any(row.rate and row.anchor for row in plan.rows)
    parts = [_groups(plan.rows, "decay" if own_form else "weight_decay"), PARAM_GROUPS]
    hooks = []
    if anchored or own_form:
        parts.append(ANCHORS)
        hooks.append("    set_anchors(optimizer)\n")
    if own_form:
        parts.append(SHRINK)
        hooks.append("    optimizer.register_step_pre_hook(shrink)\n")
    elif anchored and optimizer.form == "coupled":
        parts.append(PULL_GRADIENTS)
        hooks.append("    optimizer.register_step_pre_hook(pull_to_anchors)\n")
    elif anchored:
        parts.append(PULL_PARAMETERS)
        hooks.append("    optimizer.register_step_post_hook(pull_to_anchors)\n")
    if optimizer.rule == "lion":
        parts.append(_lion(optimizer.form))
    parts.append(
        f'\ndef build_optimizer(model):\n    """{optimizer.rule} under the study\'s decay policy."""\n'
        f"    optimizer = {_constructor(optimizer)}\n{''.join(hooks)}    return optimizer\n"
    )
    total = plan.steps_per_epoch * best.schedule.epochs
    parts.append("\n" + lr_factor_code(best.schedule, total))
    return "\n".join(parts) + SCHEDULER


def _constructor(optimizer: OptimizerSpec) -> str:
    match optimizer.rule, optimizer.form:
        case "sgd", _:
            return f"torch.optim.SGD(param_groups(model), lr={optimizer.lr!r}, momentum={optimizer.momentum!r}, nesterov={optimizer.nesterov!r})"
        case (("adam" | "adamw"), form):
            name = "Adam" if form == "coupled" else "AdamW"
            betas = f"betas=({optimizer.beta1!r}, {optimizer.beta2!r}), eps={optimizer.eps!r}"
            return f"torch.optim.{name}(param_groups(model), lr={optimizer.lr!r}, {betas})"
        case "lion", _:
            return f"Lion(param_groups(model), lr={optimizer.lr!r}, betas=({optimizer.beta1!r}, {optimizer.beta2!r}))"
    raise not_expressible(f"torch.optim has no such rule (got {optimizer.rule!r})", "optimizer.rule")


def _lion(form: str) -> str:
    if form == "coupled":
        return LION.format(form=form, gradient="parameter.grad + decay * parameter", kept="1")
    return LION.format(form=form, gradient="parameter.grad", kept='1 - group["lr"] * decay')


def _groups(rows: Sequence[PlanRow], rate_key: str) -> str:
    names: dict[tuple[float, float | str], list[str]] = {}
    for row in rows:
        names.setdefault((row.rate, row.anchor if row.rate else 0.0), []).append(row.name)
    text = "GROUPS = [\n"
    for (rate, anchor), members in names.items():
        listed = "".join(f"            {json.dumps(name)},\n" for name in members)
        pulled = f'        "anchor": {json.dumps(anchor)},\n' if anchor else ""
        text += f'    {{\n        "{rate_key}": {rate!r},\n{pulled}        "names": [\n{listed}        ],\n    }},\n'
    return f'\n{text}]\n"""What decay does to which parameters."""\n'


def lr_factor_code(schedule: ScheduleSpec, total_steps: int) -> str:
    """The schedule as a function of the step, for code and for repairs."""
    lines = [f"TOTAL_STEPS = {total_steps}", "", "", "def lr_factor(step, total_steps=TOTAL_STEPS):"]
    lines.append('    """The learning rate of the (step + 1)-th update over its peak."""')
    if schedule.warmup:
        lines += [f"    warmup = round({schedule.warmup!r} * total_steps)", "    if step < warmup:", "        return (step + 1) / warmup"]
    elif schedule.shape in ("cosine", "linear"):
        lines.append("    warmup = 0")
    if schedule.shape in ("cosine", "linear"):
        lines.append("    progress = (min(step, total_steps) - warmup) / max(1, total_steps - warmup)")
    lines.append(f"    return {_after_warmup(schedule)}")
    return "\n".join(lines) + "\n"


def _after_warmup(schedule: ScheduleSpec) -> str:
    scaled = "{}" if schedule.end == 0 else f"{schedule.end!r} + (1 - {schedule.end!r}) * {{}}"
    match schedule.shape:
        case "constant":
            return "1.0"
        case "cosine":
            return scaled.format("(1 + math.cos(math.pi * progress)) / 2")
        case "linear":
            return scaled.format("(1 - progress)")
        case "step":
            return f"{schedule.factor!r} ** sum(min(step, total_steps) >= round(share * total_steps) for share in {schedule.milestones!r})"
