"""Export: the best config in another project's terms.

    yaml, json    the whole config, as `study.load_best` reads it
    torch         code: param groups by name, optimizer, schedule; needs torch alone
    hf            code: TrainingArguments, and the optimizer and schedule that Trainer takes in their place
    timm          a file for `train.py --config`
    torchvision   the command line of references/classification/train.py

Where the target has no words for the policy, the text names every parameter that would decay wrongly and gives the lines that
repair it; where no lines can, `NotExpressible` says so.
"""

import json
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from study.results.best import BestConfig
from study.results.export_code import hf_code, torch_code
from study.results.export_flags import timm_config, torchvision_flags
from study.results.export_plan import Export, ModelPlan, commented, header

Target: TypeAlias = Literal["yaml", "json", "torch", "timm", "hf", "torchvision"]
"""In whose terms."""

TARGETS: tuple[Target, ...] = get_args(Target)

WITH_A_MODEL = {"torch": torch_code, "timm": timm_config, "hf": hf_code, "torchvision": torchvision_flags}
"""Targets that speak of the parameters of a model."""


def export(best: BestConfig, to: Target, plan: ModelPlan | None = None) -> Export:
    """The best config as text, with warnings about what the text does not say by itself.

    Args:
        plan: What decay does to each parameter of the model; every target but yaml and json needs it (`study.tuning.preflight.model_plan`).

    Raises:
        NotExpressible: if the target cannot do what the config says, whatever lines are added.
    """
    if to == "yaml":
        return Export(commented(header(best)) + best.to_yaml(), best.warnings)
    if to == "json":
        return Export(json.dumps(best.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", best.warnings)
    assert plan is not None, f"an export to {to} needs the model's plan"
    exported = WITH_A_MODEL[to](best, plan)
    return replace(exported, warnings=(*best.warnings, *exported.warnings))
