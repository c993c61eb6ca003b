"""What `import study` offers, and what it does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import study
from study.errors import InputError
from study.trial import TrialSpec

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "optuna", "mlflow", "pandas", "pydantic")
PROMISED = {
    "EffectiveLR",
    "TraceFile",
    "build_optimizer",
    "build_scheduler",
    "check_scale_invariance",
    "gain_places",
    "load_best",
    "load_spec",
    "param_groups",
    "run",
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def test_every_public_name_can_be_had() -> None:
    assert set(study.__all__) >= PROMISED
    for name in study.__all__:
        assert getattr(study, name) is not None


def test_public_names_are_sorted_and_listed() -> None:
    assert study.__all__ == sorted(study.__all__)
    assert set(study.__all__) <= set(dir(study))


def test_type_checkers_see_the_names_that_programs_get() -> None:
    tree = ast.parse((ROOT / "study" / "__init__.py").read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert typed | ({"load_best"} & defined) == set(study.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'study' has no attribute 'nonsense'"):
        _ = study.nonsense


def test_importing_the_package_loads_no_library() -> None:
    assert python(f"import study, sys; print(sorted(set({HEAVY}) & sys.modules.keys()))") == "[]"


def test_reading_specs_loads_pydantic_only() -> None:
    assert (
        python(f"import study, sys; study.load_spec, study.load_best, study.BestConfig; print(sorted(set({HEAVY}) & sys.modules.keys()))")
        == "['pydantic']"
    )


def test_model_functions_load_torch_and_nothing_of_the_service() -> None:
    names = ["gain_places", "param_groups", "build_optimizer", "build_scheduler", "EffectiveLR"]
    code = (
        f"import study, sys; [getattr(study, name) for name in {names}]; print(sorted({{'torch', 'ray', 'optuna', 'mlflow'}} & sys.modules.keys()))"
    )
    assert python(code) == "['torch']"


@pytest.mark.parametrize(
    ("use", "missing", "message"),
    [
        ("study.run", "ray", "study.run needs the [service] extra: pip install 'effective-lr-study[service]'"),
        ("study.run", "optuna", "study.run needs the [service] extra"),
        ("study.StudyResult", "mlflow", "study.StudyResult needs the [service] extra"),
        ("study.TraceFile", "mlflow", "study.TraceFile needs the [service] extra"),
        ("study.gain_places", "torch", "study.gain_places needs the [torch] extra: pip install 'effective-lr-study[torch]'"),
        ("study.load_best('0' * 32)", "mlflow", "study.load_best of a run needs the [service] extra"),
    ],
)
def test_a_missing_library_names_the_extra_to_install(use: str, missing: str, message: str) -> None:
    hidden = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {missing!r} else find(name, package)
import study
try:
    {use}
except ImportError as error:
    print(error)
"""
    assert python(hidden).startswith(message)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "study", "--help"], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "validate" in done.stdout


def test_the_processes_of_fused_trials_load_what_they_need() -> None:
    """A study starts many of them; torch takes as long as all the rest of a proxy, and the pool needs nothing of Tune."""
    loaded = "print(sorted({'torch', 'ray.tune', 'pandas', 'optuna', 'mlflow', 'sklearn'} & sys.modules.keys()))"
    pool, proxy = python(f"import sys, study.tuning.actor; {loaded}; import study.tuning.trainables; {loaded}").splitlines()
    assert pool == "[]"
    assert proxy == "['pandas', 'ray.tune']"


def test_functions_that_are_given_something_else_say_what_they_take() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"build_optimizer: takes the optimizer's part of a config \(got TrialSpec\); .*give best.optimizer"):
        study.build_optimizer(model, TrialSpec())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least one step \(got 0\)"):
        study.build_scheduler(plain, TrialSpec().schedule, total_steps=0)
    with pytest.raises(InputError, match=r"must be at least 1 \(got 0\)"):
        study.EffectiveLR(model, plain, every=0)
