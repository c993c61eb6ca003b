"""No model that fails the self-test is ever fused; what passes is trained as a trial by itself trains it."""

from pathlib import Path
from typing import Any

import pytest

from study.engines import admission
from study.engines.admission import examine, self_test
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.errors import InputError
from study.spec import StudySpec, check
from study.trial import TrialSpec
from study.tuning.choosing import choose
from tests.engines.conformance import MODELS, SMALL, trial

NORMS = ("batch", "layer", "group", "rms", "weight", "none")
DIFFERS = "is not the one that a trial by itself has"

REFUSED = {
    "Remembering": DIFFERS,
    "Counting": DIFFERS,
    "Rolling": DIFFERS,
    "Raising": "ArithmeticError: too many images",
}
"""Models that must not be fused, and why."""

LOOPED = ("Branching", "Averaging", "Unreadable")
"""Models that torch.fx cannot read, or reads wrongly, and that are trained right slot after slot."""


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MEASURED_STEPS", 3)


def strange(name: str, **sections: Any) -> TrialSpec:
    return trial(model={"name": f"import:tests.engines.strange:{name}", "width": 8, "blocks": [1, 1]}, **sections)


def study(name: str, engine: str) -> StudySpec:
    """A study long enough for any gain to pay."""
    model = {"name": f"import:tests.engines.strange:{name}"}
    return check(
        {
            "name": "strange",
            "trial": {**SMALL, "model": model, "schedule": {"epochs": 1000}},
            "space": {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
            "search": {"trials": 100_000},
            "resources": {"engine": engine, "slots": 3},
        }
    )


@pytest.mark.parametrize("arithmetic", ["converted", "looped"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_our_own_models_pass(model: str, rule: str, arithmetic: str) -> None:
    norm = NORMS[(list(MODELS).index(model) * 2 + (rule == "sgd")) % len(NORMS)]
    if MODELS[model].get("name") == "transformer" and norm not in ("layer", "rms"):
        norm = "layer"
    assert self_test(trial(model={**MODELS[model], "norm": norm}, optimizer={"rule": rule, "lr": 1e-3}), arithmetic) == ""


@pytest.mark.parametrize("norm", NORMS)
def test_they_pass_with_every_norm(norm: str) -> None:
    assert self_test(trial(model={"norm": norm}), "converted") == ""


def test_what_passes_is_measured_too() -> None:
    found = examine(strange("Plain"), slots=[3])
    assert (found.arithmetic, found.why) == ("converted", "")
    assert found.gain > 0


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_a_model_that_fails_is_never_fused(name: str, why: str, tmp_path: Path) -> None:
    found = examine(strange(name), slots=[3])
    assert (found.arithmetic, found.gain) == ("", 0.0)
    assert why in found.why
    chosen = choose(study(name, "auto"), tmp_path)
    assert (chosen.engine, chosen.slots) == ("solo", 1)
    assert why in chosen.why and "\n" not in chosen.why
    with pytest.raises(InputError, match="these trials cannot be fused: its model cannot be fused") as refused:
        choose(study(name, "fused"), tmp_path)
    (problem,) = refused.value.problems
    assert (problem.where, problem.remedy) == ("resources.engine", "use auto or solo")
    assert why in problem.message


@pytest.mark.parametrize("name", LOOPED)
def test_what_cannot_be_converted_is_looped_and_trained_right(name: str, tmp_path: Path) -> None:
    assert self_test(strange(name), "converted") != ""
    assert examine(strange(name), slots=[3]).arithmetic == "looped"
    chosen = choose(study(name, "fused"), tmp_path)
    assert (chosen.engine, chosen.slots, chosen.arithmetic) == ("fused", 3, "looped")
    trials = {str(seed): strange(name, seed=seed, optimizer={"lr": 0.1 / (1 + seed)}) for seed in range(3)}
    together = FusedEngine(3, arithmetic=chosen.arithmetic)
    for trial_id, one in trials.items():
        together.admit(trial_id, one)
    found = [{progress.trial_id: progress.measurement.values for progress in together.advance()} for _ in range(3)]
    for trial_id, one in trials.items():
        alone = SoloEngine()
        alone.admit(trial_id, one)
        for values in found:
            assert dict(values[trial_id]) == pytest.approx(dict(alone.advance()[0].measurement.values), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("validation", "why"), [(0.04, ""), (0.2, f"its val/loss {DIFFERS}")])
def test_a_model_that_sees_its_neighbours_passes_where_all_are_evaluated_at_once(validation: float, why: str) -> None:
    """Engines evaluate in batches of their own sizes, which such a model notices."""
    assert self_test(strange("Mixing", data={"validation": validation}), "looped") == why
