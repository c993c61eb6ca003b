"""The loader of best.yaml lives in an environment with pydantic, PyYAML and this package, and nothing else."""

import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from study.results.best import BestConfig, ObjectiveResult
from study.trial import TrialSpec

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "study")
ABSENT = ("torch", "numpy", "ray", "optuna", "mlflow", "pandas", "typer", "rich")

LOAD = """
import sys, study
best = study.load_best(sys.argv[1])
print(best.optimizer.gamma, best.optimizer.weight_decay, best.schedule.epochs, best.name)
"""


def needed(name: str, found: dict[str, None]) -> dict[str, None]:
    """A distribution and all that it requires here, in order of discovery."""
    if name not in found:
        found[name] = None
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


def copy_installed(name: str, site: Path) -> None:
    """Copies a distribution's files from this environment: the same bytes as an installation, without a network."""
    for file in distribution(name).files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the core installation only."""
    folder = tmp_path_factory.mktemp("light")
    source, environment = folder / "source", folder / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    [site] = environment.glob("lib/python*/site-packages")
    for name in (*needed("pydantic", {}), "PyYAML"):
        copy_installed(name, site)
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, cwd=folder)
    return environment / "bin" / "python"


@pytest.fixture(scope="module")
def best_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "best.yaml"
    BestConfig(
        study_id="tiny-5f3a",
        name="tiny",
        trial_id="tiny-0007",
        run_id="",
        arm="all",
        objective=ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.04),
        spec_hash="a" * 64,
        git_commit="",
        versions={},
        date="2026-03-01T12:00:00+00:00",
        trial=TrialSpec.model_validate({"optimizer": {"weight_decay": 0.125, "gamma": "last+inner"}, "schedule": {"epochs": 3}}),
    ).save(path)
    return path


def ran(python: Path, code: str, *arguments: str) -> str:
    done = subprocess.run([python, "-I", "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("library", ABSENT)
def test_the_light_environment_holds_no_heavy_library(light: Path, library: str) -> None:
    assert ran(light, f"import importlib.util; print(importlib.util.find_spec({library!r}))") == "None"


def test_a_best_config_loads_without_any_heavy_library(light: Path, best_yaml: Path) -> None:
    assert ran(light, LOAD, str(best_yaml)) == "inner+last 0.125 3 tiny"


def test_a_spec_loads_without_any_heavy_library(light: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: tiny\nspace: {optimizer.lr: {low: 1e-3, high: 1}}\nsearch: {trials: 2}\n")
    assert ran(light, "import sys, study; print(study.load_spec(sys.argv[1]).name)", str(tmp_path / "s.yaml")) == "tiny"


@pytest.mark.parametrize(("name", "extra"), [("build_optimizer", "torch"), ("run", "service")])
def test_what_needs_more_says_which_extra_to_install(light: Path, name: str, extra: str) -> None:
    code = f"import study\ntry:\n    study.{name}\nexcept ImportError as error:\n    print(error)"
    assert ran(light, code) == f"study.{name} needs the [{extra}] extra: pip install 'effective-lr-study[{extra}]'"


def test_the_package_says_that_it_is_typed(light: Path) -> None:
    assert ran(light, "import pathlib, study; print((pathlib.Path(study.__file__).parent / 'py.typed').exists())") == "True"
