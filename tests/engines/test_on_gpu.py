"""On a GPU: the fused engine, its recorded steps included, against the solo engine on the CPU and on the GPU. Skipped where there is none."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from study.engines.engine import Snapshot
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from tests.engines.conformance import MODELS, Life, advanced, assert_agree, live, solo, trial, trials

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that torch can use")

TOLERANCE = 1e-9
"""Of float64 after 50 steps: another library, which rounds in another order."""

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"model": MODELS["mlp"]},
    "resnet": {"model": {"norm": "batch"}},
    "adamw": {"optimizer": {"rule": "adamw"}, "model": {"norm": "group", "width": 8}},
    "weight norm": {"model": {"norm": "weight"}},
    "transformer": {"model": MODELS["transformer pre"]},
    "rescale": {"optimizer": {"constraint": {"name": "rescale", "period": 3, "norm": 2.0}}},
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_train_every_trial_as_alone_on_a_cpu(case: str, caplog: pytest.LogCaptureFixture) -> None:
    sections = CASES[case]
    specs = trials(range(0, 16, 2), rule=sections.get("optimizer", {}).get("rule", "sgd"), **sections)
    with caplog.at_level(logging.WARNING):
        found = live(FusedEngine(4, "cuda"), specs, 4)
    for name, spec in specs.items():
        assert_agree(found[name], solo(spec), TOLERANCE)
    assert "one operation after the other" not in caplog.text


def test_looped_models_with_dropout_draw_what_they_draw_alone() -> None:
    specs = trials(range(3), model={**MODELS["mlp"], "dropout": 0.5})
    together = live(FusedEngine(3, "cuda", "looped"), specs, 3)
    for name, spec in specs.items():
        alone = live(SoloEngine("cuda"), {name: spec}, 1)[name]
        assert_agree(together[name], alone, TOLERANCE)


@pytest.mark.parametrize("engines", ["solo to fused", "fused to solo"])
def test_a_snapshot_goes_on_in_the_other_engine(engines: str, tmp_path: Path) -> None:
    spec = trial(model={**MODELS["mlp"]}, seed=3)
    whole = live(SoloEngine("cuda"), {"": spec}, 1)[""]
    first, second = (SoloEngine("cuda"), FusedEngine(2, "cuda")) if engines.startswith("solo") else (FusedEngine(2, "cuda"), SoloEngine("cuda"))
    life = Life()
    first.admit("", spec)
    for _ in range(2):
        advanced(first, {"": life})
    first.snapshot("").save(tmp_path / "snapshot")
    second.admit("", spec, Snapshot.load(tmp_path / "snapshot"))
    while not life.progress[-1].ending:
        advanced(second, {"": life})
    for mine, its in zip(life.weights[-1].values(), whole.weights[-1].values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_trials_in_bfloat16_learn(model: str) -> None:
    specs = trials(range(4), precision="bf16", model={} if model == "resnet" else MODELS[model], optimizer={"lr": 0.05}, schedule={"epochs": 5})
    for life in live(FusedEngine(4, "cuda"), specs, 4).values():
        first, last = (life.progress[index].measurement.values["train/loss"] for index in (0, -1))
        assert last < first
