"""Commands on a spec, before anything runs: written, checked, looked through."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from study import views
from study.cli.answers import answer, at_its_line, prints_on_stderr
from study.cli.arguments import Home, Json, Sets, SpecFile
from study.home import home_path
from study.space import arm_label
from study.spec import StudySpec, load_spec

Compare: TypeAlias = Annotated[
    str, typer.Option(metavar="LIBRARIES", help="Set their defaults beside it: torch,timm,hf,torchvision,torchvision-recipe,fastai, or all.")
]


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="A new file.", show_default=True)] = Path("my-study.yaml"),
    model: Annotated[str, typer.Option(help="mlp, resnet, transformer, or import:package.module:function.")] = "resnet",
    data: Annotated[str, typer.Option(help="digits, mnist5k, npz, or import:package.module:function.")] = "digits",
    rule: Annotated[str, typer.Option(help="sgd, adam, adamw, lion or muon.")] = "sgd",
    scientific: Annotated[
        list[str] | None, typer.Option(metavar="PATH[=VALUES]", help="A field whose values are compared. Repeatable. Default: optimizer.gamma.")
    ] = None,
    question: Annotated[str, typer.Option(help="What the study is to find out.")] = "Which norm gains should weight decay touch?",
) -> None:
    """Write a commented spec for your case: a valid one, to be edited. An existing file is left as it is."""
    from study.starter import Start, spec_text, write_spec

    start = Start(file.stem.lower().replace("_", "-"), question, model, data, rule, tuple(scientific or ("optimizer.gamma",)))
    write_spec(spec_text(start), file)
    print(f"written to {file}; look at it, then: study plan {shlex.quote(str(file))}", file=sys.stderr)


def schema() -> None:
    """Print the JSON Schema of a spec, with the documentation of every field."""
    answer(True, {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudySpec.model_json_schema()})


def validate(spec_file: SpecFile, overrides: Sets = None, as_json: Json = False) -> None:
    """Check a spec: prints `ok` and a summary, or every error at once."""
    spec = load_spec(spec_file, overrides or ())
    search = spec.search
    summary = {
        "ok": True,
        "name": spec.name,
        "trials": search.trials,
        "arms": [arm_label(arm) for arm in spec.arms],
        "axes": list(spec.space),
        "sampler": search.sampler,
        "epochs": None if "schedule.epochs" in spec.space else spec.trial.schedule.epochs,
    }
    answer(as_json, summary, "ok", views.summary_line(summary))


def plan(spec_file: SpecFile, overrides: Sets = None, compare: Compare = "", home: Home = None, as_json: Json = False) -> None:
    """Dry run: trials, arms, steps, the engine with its measured gain, and what decay does to each parameter."""
    spec = load_spec(spec_file, overrides or ())
    libraries = [word.strip() for word in compare.split(",") if word.strip()]
    with prints_on_stderr(), at_its_line(spec, spec_file, overrides or ()):
        from study.tuning.choosing import choose, pilot_seconds
        from study.tuning.forecast import forecast
        from study.tuning.preflight import audit

        audited = audit(spec, None if libraries == ["all"] else libraries).document()
        choice = choose(spec, home_path(home))
        ahead = forecast(spec, None if spec.resources.gpus_per_trial else pilot_seconds(spec), choice, os.cpu_count() or 1)
        planned = {**audited, "forecast": {**audited["forecast"], **ahead}, "engine": choice.document()}
    answer(as_json, planned, views.plan_view(planned, spec.trial.optimizer))
