"""Searches learning rate, decay strength and gamma-decay policy, and measures the effective learning rates behind the answer.

spec = study.load_spec("search_spaces/quickstart.yaml")
done = study.run(spec)
best = study.load_best("best.yaml")
optimizer = study.build_optimizer(model, best.optimizer)

Importing this package loads none of torch, Ray, Optuna and MLflow: a name brings its library when it is first used.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study import errors
    from study.results.best import BestConfig
    from study.spec import StudySpec, load_spec
    from study.traces import TraceFile
    from study.training.decay import build_optimizer, param_groups
    from study.training.effective_lr import EffectiveLR
    from study.training.invariance import check_scale_invariance
    from study.training.roles import gain_places
    from study.training.schedules import build_scheduler
    from study.trial import TrialSpec
    from study.tuning.driver import StudyResult, run

__all__ = [
    "BestConfig",
    "EffectiveLR",
    "StudyResult",
    "StudySpec",
    "TraceFile",
    "TrialSpec",
    "build_optimizer",
    "build_scheduler",
    "check_scale_invariance",
    "errors",
    "gain_places",
    "load_best",
    "load_spec",
    "param_groups",
    "run",
]

_HOME = {
    "BestConfig": ("study.results.best", ""),
    "EffectiveLR": ("study.training.effective_lr", "torch"),
    "StudyResult": ("study.tuning.driver", "service"),
    "StudySpec": ("study.spec", ""),
    "TraceFile": ("study.traces", "service"),
    "TrialSpec": ("study.trial", ""),
    "build_optimizer": ("study.training.decay", "torch"),
    "build_scheduler": ("study.training.schedules", "torch"),
    "check_scale_invariance": ("study.training.invariance", "torch"),
    "gain_places": ("study.training.roles", "torch"),
    "load_spec": ("study.spec", ""),
    "param_groups": ("study.training.decay", "torch"),
    "run": ("study.tuning.driver", "service"),
}
"""Where each public name lives, and the extra that it needs."""

_NEEDS = {"": (), "torch": ("torch",), "service": ("mlflow", "optuna", "ray")}
"""The libraries by which an extra is known to be there."""


def load_best(source: str | Path, *, home: str | Path | None = None, tracking_uri: str | None = None) -> "BestConfig":
    """The best config of a file, of a study in the home, or of an MLflow run.

    Args:
        source: A best.yaml, the name of a study, or the id (32 hexadecimal digits) of a trial's or a study's MLflow run.
        home: The study home. Default: `$STUDY_HOME`, else `./studies`.
        tracking_uri: The MLflow store of the run. Default: `$MLFLOW_TRACKING_URI`, else SQLite in the home.

    Raises:
        NotFound: if there is no such file, study or run.
        SpecError: if the file is not a best.yaml, or the run has no value.
        ImportError: if the source is a run and the [service] extra is not installed.
    """
    from study.home import home_path, tracking_uri_for
    from study.problems import validated
    from study.results.best import BestConfig, is_file
    from study.results.best import load_best as of_file_or_study

    if is_file(source) or re.fullmatch(r"[0-9a-f]{32}", str(source)) is None:
        return of_file_or_study(source, home)
    archive = _module("study.tracking.archive", "study.load_best of a run", "service")
    found = archive.best_of_run(str(source), tracking_uri_for(home_path(home), tracking_uri))
    return validated(BestConfig, found, f"run {source}")


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("study.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'study' has no attribute {name!r}")
    module, extra = _HOME[name]
    return getattr(_module(module, f"study.{name}", extra), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _module(path: str, what: str, extra: str) -> Any:
    """A module of this package, or an ImportError that names the extra to install."""
    if any(find_spec(library) is None for library in _NEEDS[extra]):
        raise ImportError(f"{what} needs the [{extra}] extra: pip install 'effective-lr-study[{extra}]'")
    return import_module(path)
