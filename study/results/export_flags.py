"""Exports as settings of other projects' training scripts: timm's `train.py --config`, torchvision's references.

settings ──their rule──> what they would decay ──compared with the plan──> warnings by name, and the lines that repair it
"""

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence

import yaml

from study.optimizer import OptimizerSpec
from study.results.best import BestConfig
from study.results.export_code import lr_factor_code
from study.results.export_plan import Export, ModelPlan, PlanRow, commented, header, not_expressible, refuse_what_cannot_be_said, wrong_sentence
from study.results.export_plan import wrongly_decayed as wrongly

INDENT = "#     "
"""In front of every line of code in a comment."""

EMBEDDINGS = ("class_token", "position_embedding", "relative_position_bias_table")
"""What torchvision's `--transformer-embedding-decay` is for, by the parameter's own name."""

REGROUP = """\
names = {id(parameter): name for name, parameter in model.named_parameters()}
wrong = {}
for group in optimizer.param_groups:
    for parameter in group["params"]:
        if (name := names[id(parameter)]) in RATES:
            wrong.setdefault((RATES[name], ANCHORS.get(name, 0.0)), []).append(parameter)
    group["params"] = [parameter for parameter in group["params"] if names[id(parameter)] not in RATES]
optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
for (rate, anchor), parameters in wrong.items():
    optimizer.add_param_group({"params": parameters, "weight_decay": rate, "anchor": anchor})
"""

PULL = """\
for group in optimizer.param_groups:
    anchor = group.get("anchor", 0.0)
    group["anchors"] = [p.detach().clone() if anchor == "init" else torch.full_like(p, anchor) for p in group["params"]] if anchor else []

@torch.no_grad()
def pull_to_anchors(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter, anchor in zip(group["params"], group["anchors"]):
            if parameter.grad is not None:
                {pull}

optimizer.{register}(pull_to_anchors)
"""


def timm_config(best: BestConfig, plan: ModelPlan) -> Export:
    """A file for timm's `train.py --config`.

    Raises:
        NotExpressible: if timm has no such rule.
    """
    refuse_what_cannot_be_said(best, plan, "timm")
    optimizer = best.optimizer
    settings, warmed = _timm_settings(best, plan)
    wrong = wrongly(plan.rows, [0.0 if "timm" in row.spared_by else optimizer.weight_decay for row in plan.rows])
    warnings, lines = [], [*header(best), "Written for timm 1.0.31: python train.py --config THIS_FILE --data-dir ... --model ..."]
    if wrong:
        warnings.append(wrong_sentence("timm", wrong))
        lines += [f"{warnings[-1]}.", "Put these lines into train.py, after the optimizer is created (model: before it is wrapped):"]
        lines += _code(_repair(wrong, optimizer))
    if not warmed:
        warnings.append("timm warms up over whole epochs, and one step late; the study over its own number of steps")
        lines += [f"{warnings[-1]}.", "Put these lines into train.py, after the scheduler is created:", *_code(_timm_schedule(best, plan))]
    if best.trial.precision == "float64":
        warnings.append("timm's train.py has no float64; the study trained in it")
        lines.append(f"{warnings[-1]}.")
    return Export(_comments(lines) + yaml.safe_dump(settings, sort_keys=False), tuple(warnings))


def _timm_settings(best: BestConfig, plan: ModelPlan) -> tuple[dict[str, object], bool]:
    """The settings, and whether they say the whole schedule."""
    optimizer, schedule, trial = best.optimizer, best.schedule, best.trial
    total = plan.steps_per_epoch * schedule.epochs
    warmup = round(schedule.warmup * total)
    warmup_epochs = min(round(warmup / plan.steps_per_epoch), schedule.epochs - 1)
    prefix = warmup_epochs > 0 and schedule.shape in ("cosine", "linear")
    settings: dict[str, object] = {
        **_timm_rule(optimizer),
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "batch_size": best.data.batch_size,
        "epochs": schedule.epochs - warmup_epochs if prefix else schedule.epochs,
        **_timm_shape(best, plan),
        "sched_on_updates": True,
        "warmup_epochs": warmup_epochs,
        "warmup_lr": optimizer.lr / warmup if warmup else 0.0,
        "warmup_prefix": prefix,
        "cooldown_epochs": 0,
        "seed": trial.seed,
        **({} if optimizer.clip is None else {"clip_grad": optimizer.clip, "clip_mode": "norm"}),
        **({"amp": True, "amp_dtype": "bfloat16"} if trial.precision == "bf16" else {}),
    }
    return settings, warmup == 0


def _timm_rule(optimizer: OptimizerSpec) -> dict[str, object]:
    """timm's name of a rule: its `sgd` and `sgdw` are Nesterov's, its `momentum` is the plain one."""
    adaptive: dict[str, object] = {"opt_betas": [optimizer.beta1, optimizer.beta2], "opt_eps": optimizer.eps}
    match optimizer.rule, optimizer.form:
        case "sgd", "coupled":
            return {"opt": "sgd" if optimizer.nesterov else "momentum", "momentum": optimizer.momentum}
        case "sgd", "decoupled":
            return {"opt": "sgdw", "momentum": optimizer.momentum, "opt_kwargs": {"nesterov": optimizer.nesterov}}
        case (("adam" | "adamw"), form):
            return {"opt": "adam" if form == "coupled" else "adamw", **adaptive}
        case "lion", "decoupled":
            return {"opt": "lion", "opt_betas": [optimizer.beta1, optimizer.beta2]}
    raise not_expressible(f"timm has no {optimizer.form} rule {optimizer.rule!r}", "optimizer.rule")


def _timm_shape(best: BestConfig, plan: ModelPlan) -> dict[str, object]:
    schedule, lr = best.schedule, best.optimizer.lr
    match schedule.shape:
        case "constant":
            return {"sched": "constant"}
        case "cosine":
            return {"sched": "cosine", "min_lr": schedule.end * lr}
        case "linear":
            return {"sched": "poly", "decay_rate": 1.0, "min_lr": schedule.end * lr}
        case "step":
            # timm drops lr one step before a milestone.
            drops = [round(share * plan.steps_per_epoch * schedule.epochs) + 1 for share in schedule.milestones]
            return {"sched": "multistep", "decay_rate": schedule.factor, "decay_milestones": [step / plan.steps_per_epoch for step in drops]}


def _timm_schedule(best: BestConfig, plan: ModelPlan) -> str:
    factor = lr_factor_code(best.schedule, plan.steps_per_epoch * best.schedule.epochs)
    set_lr = "lr_scheduler._get_lr = lambda step: [peak * lr_factor(step) for peak in lr_scheduler.base_values]"
    return f"{_import_math(best)}{factor}\n{set_lr}\nlr_scheduler.update_groups(lr_scheduler._get_lr(0))\nnum_epochs = {best.schedule.epochs}\n"


def torchvision_flags(best: BestConfig, plan: ModelPlan) -> Export:
    """The command line of torchvision's references/classification/train.py.

    Raises:
        NotExpressible: if the references have no such rule.
    """
    refuse_what_cannot_be_said(best, plan, "torchvision's references")
    optimizer = best.optimizer
    decay, wrong = _decay_flags(plan.rows, optimizer.weight_decay)
    flags = {"opt": _torchvision_rule(optimizer), "lr": optimizer.lr, "momentum": optimizer.momentum, "weight-decay": optimizer.weight_decay, **decay}
    if optimizer.rule != "sgd":
        del flags["momentum"]
    flags |= {"batch-size": best.data.batch_size, "epochs": best.schedule.epochs, **_schedule_flags(best, plan)}
    flags |= {} if optimizer.clip is None else {"clip-grad-norm": optimizer.clip}
    warnings, lines = [], [*header(best), "Written for torchvision 0.28, references/classification."]
    if wrong:
        warnings.append(wrong_sentence("torchvision's references", wrong))
    repair = _repair(wrong, optimizer) if wrong else ""
    if optimizer.rule != "sgd" and (optimizer.beta1, optimizer.beta2, optimizer.eps) != (0.9, 0.999, 1e-8):
        warnings.append(f"torchvision's references have no flag for betas ({optimizer.beta1:g}, {optimizer.beta2:g}) and eps {optimizer.eps:g}")
        repair += f"for group in optimizer.param_groups:\n    group.update(betas=({optimizer.beta1!r}, {optimizer.beta2!r}), eps={optimizer.eps!r})\n"
    lines += [f"{warning}." for warning in warnings]
    if repair:
        lines += ["Put these lines into train.py, after the optimizer is created:", *_code(repair)]
    if best.schedule.shape != "constant" or best.schedule.warmup:
        warnings.append("torchvision's references change lr once per epoch; the study changes it at every step")
        lines += [f"{warnings[-1]}.", "Put these lines into train.py in place of its lr_scheduler, and call lr_scheduler.step() after every"]
        lines += ["optimizer.step() instead of after every epoch:", *_code(_torchvision_schedule(best, plan))]
    if best.trial.precision != "float32":
        warnings.append(f"torchvision's references have no {best.trial.precision}; the study trained in it")
        lines.append(f"{warnings[-1]}.")
    command = " \\\n    ".join(["torchrun train.py", *(f"--{name} {shlex.quote(_said(value))}" for name, value in flags.items())])
    return Export(_comments(lines) + command + "\n", tuple(warnings))


def _said(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _torchvision_rule(optimizer: OptimizerSpec) -> str:
    match optimizer.rule, optimizer.form:
        case "sgd", "coupled":
            return "sgd_nesterov" if optimizer.nesterov else "sgd"
        case (("adam" | "adamw"), "decoupled"):
            return "adamw"
    raise not_expressible(
        f"torchvision's references have sgd, rmsprop and adamw with torch's own decay (got {optimizer.form} {optimizer.rule})", "optimizer.rule"
    )


def _decay_flags(rows: Sequence[PlanRow], decay: float) -> tuple[dict[str, object], list[PlanRow]]:
    """The flags that leave the fewest parameters wrongly decayed, and those parameters; of equals, the fewest flags."""
    rates = [None, *dict.fromkeys((0.0, *(row.rate for row in rows)))]
    tried = []
    for given in itertools.product(rates, repeat=3):
        flags = dict(zip(("norm-weight-decay", "bias-weight-decay", "transformer-embedding-decay"), given, strict=True))
        wrong = wrongly(rows, [_torchvision_rate(row, flags, decay) for row in rows])
        tried.append((len(wrong), sum(rate is not None for rate in given), flags, wrong))
    _, _, flags, wrong = min(tried, key=lambda one: one[:2])
    return {name: rate for name, rate in flags.items() if rate is not None}, wrong


def _torchvision_rate(row: PlanRow, flags: Mapping[str, float | None], decay: float) -> float:
    """What the references decay a parameter with: its own name goes before the type of its layer.

    Source: torchvision's references/classification/utils.py, set_weight_decay, and train.py, custom_keys_weight_decay, torchvision 0.28.
    """
    bias, embedding, norm = flags["bias-weight-decay"], flags["transformer-embedding-decay"], flags["norm-weight-decay"]
    if bias is not None and row.own_name == "bias":
        return bias
    if embedding is not None and row.own_name in EMBEDDINGS:
        return embedding
    return norm if norm is not None and "torchvision-recipe" in row.spared_by else decay


def _schedule_flags(best: BestConfig, plan: ModelPlan) -> dict[str, object]:
    schedule = best.schedule
    warmup = min(round(schedule.warmup * schedule.epochs), schedule.epochs - 1)
    flags: dict[str, object] = {"lr-scheduler": "steplr", "lr-step-size": schedule.epochs + 1}
    if schedule.shape == "cosine":
        flags = {"lr-scheduler": "cosineannealinglr", "lr-min": schedule.end * best.optimizer.lr}
    if warmup:
        steps = max(1, round(schedule.warmup * schedule.epochs * plan.steps_per_epoch))
        flags |= {"lr-warmup-epochs": warmup, "lr-warmup-method": "linear", "lr-warmup-decay": 1 / steps}
    return flags


def _torchvision_schedule(best: BestConfig, plan: ModelPlan) -> str:
    factor = lr_factor_code(best.schedule, plan.steps_per_epoch * best.schedule.epochs)
    return f"{_import_math(best)}{factor}\nlr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)\n"


def _repair(wrong: Sequence[PlanRow], optimizer: OptimizerSpec) -> str:
    """Code that gives the wrongly decayed parameters groups of their own, and pulls to anchors other than 0."""
    anchors = {row.name: row.anchor for row in wrong if row.rate and row.anchor}
    rates = json.dumps({row.name: row.rate for row in wrong}, indent=4)
    lines = f"import torch\n\nRATES = {rates}\nANCHORS = {json.dumps(anchors, indent=4)}\n{REGROUP}"
    if not anchors:
        return lines
    if optimizer.form == "coupled":
        return lines + PULL.format(pull='parameter.grad.sub_(anchor, alpha=group["weight_decay"])', register="register_step_pre_hook")
    return lines + PULL.format(pull='parameter.add_(anchor, alpha=group["lr"] * group["weight_decay"])', register="register_step_post_hook")


def _import_math(best: BestConfig) -> str:
    return "import math\n\n" if best.schedule.shape == "cosine" else ""


def _code(text: str) -> list[str]:
    return [f"\0{line}" for line in text.splitlines()]


def _comments(lines: Sequence[str]) -> str:
    """Sentences and code as comments, code set in."""
    return "".join(f"{INDENT}{line[1:]}".rstrip() + "\n" if line.startswith("\0") else commented([line]) for line in lines)
