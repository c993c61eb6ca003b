"""Layers turn as theory expects, on real data: short trials of docs/equilibrium.md, seen as its table sees them.

The seed is the default one; a layer outside the band is a finding, not a reason for another seed.
"""

import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from docs.equilibrium import LAYER_BANDS, MEDIAN_BAND, TAIL, layers_at_the_end, outside
from study.engines.solo import SoloEngine
from study.home import StudyFolder
from study.measurement import LayerSample, Outcome
from study.optimizer import OptimizerSpec
from study.spec import StudySpec, load_spec
from study.traces import write_trace
from study.training.data import load_data
from study.training.decay import build_optimizer
from study.training.effective_lr import EffectiveLR
from study.training.models import build_model
from tests.conftest import ROOT, own_environment

EPOCHS = 24
"""528 steps; at the largest lr x weight decay of each study five relaxation times are 157."""

STEPS = 1_000
"""Of the trial whose steps are looked at one by one; five relaxation times are 625."""

LAYERS = {
    "stem.conv",
    *(f"layer{stage}.{block}.conv{which}" for stage, block in ((1, 0), (2, 0), (2, 1)) for which in (1, 2)),
    "layer2.0.shortcut.conv",
}


def spec(rule: str) -> StudySpec:
    """The shipped study, cut to its fastest pair."""
    cut = (f"trial.schedule.epochs={EPOCHS}", "trial.trace.every=2", "search.trials=1")
    product, lr = {"sgd": (1.6e-3, 0.05), "adamw": (1.6e-2, 0.01)}[rule]
    axes = (f"space.optimizer.intrinsic_lr={{choices: [{product}]}}", f"space.optimizer.lr={{choices: [{lr}]}}")
    return load_spec(ROOT / "search_spaces" / f"equilibrium_{rule}.yaml", (*cut, *axes))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small convolutions are slower on several threads, much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(engine: SoloEngine) -> tuple[list[LayerSample], Outcome]:
    """All samples of the admitted trial, and how it ended."""
    samples: list[LayerSample] = []
    while True:
        (progress,) = engine.advance()
        samples += progress.measurement.samples
        if progress.ending:
            return samples, progress.ending.outcome


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study home with both studies, each of one trial."""
    home = tmp_path_factory.mktemp("equilibrium")
    for rule in LAYER_BANDS:
        study, engine = spec(rule), SoloEngine()
        trial = study.trial_for({path: axis.endpoints()[0] for path, axis in study.space.items()})
        folder = StudyFolder.prepare(home, study)
        engine.admit("trial", trial)
        samples, outcome = trained(engine)
        (folder.path / "trials" / "trial").mkdir()
        write_trace(folder.path / "trials" / "trial" / "trace.parquet", samples)
        optimizer = {path: value for path, value in trial.dotted().items() if path.startswith("optimizer.") and isinstance(value, float | str)}
        pd.DataFrame([{"trial_id": "trial", "outcome": str(outcome), **optimizer}]).to_parquet(folder.table)
    return home


def trace(home: Path, rule: str) -> pd.DataFrame:
    return pd.read_parquet(home / f"equilibrium-{rule}" / "trials" / "trial" / "trace.parquet")


@pytest.mark.parametrize("rule", LAYER_BANDS)
def test_every_equilibrated_layer_turns_as_theory_expects(rule: str, home: Path) -> None:
    layers = layers_at_the_end(trace(home, rule))
    assert set(layers.index) == LAYERS
    assert layers["equilibrated"].all()
    assert layers["ratio"].median() == pytest.approx(1, abs=MEDIAN_BAND)
    assert outside(layers, rule)["ratio"].to_dict() == {}


@pytest.mark.parametrize("rule", LAYER_BANDS)
def test_the_band_tells_apart(rule: str, home: Path) -> None:
    slow = trace(home, rule)
    slow["rotation"] *= 0.85
    assert set(outside(layers_at_the_end(slow), rule).index) == LAYERS


@pytest.mark.parametrize("rule", LAYER_BANDS)
def test_the_shipped_studies_are_long_enough(rule: str) -> None:
    study = load_spec(ROOT / "search_spaces" / f"equilibrium_{rule}.yaml")
    schedule, rate = study.trial.schedule, 2 * min(study.space["optimizer.intrinsic_lr"].choices or ())
    if rule == "sgd":
        rate /= 1 - study.trial.optimizer.momentum
    steps = schedule.epochs * 22
    assert (schedule.shape, schedule.warmup) == ("constant", 0)
    assert (1 - TAIL) * steps * rate >= 5


def test_the_script_prints_a_row_for_each_trial_and_what_holds(home: Path) -> None:
    names = [f"equilibrium-{rule}" for rule in LAYER_BANDS]
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "equilibrium.py", *names, "--home", home], env=own_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    table, _, verdicts = done.stdout.partition("\n\n")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| sgd, momentum 0.9", "| adamw"]
    assert [line.count("|") for line in table.splitlines()] == [11] * 4
    assert "2 of 2 trials" in verdicts and "sgd: 8 of 8 layers" in verdicts and "adamw: 8 of 8 layers" in verdicts


@pytest.mark.usefixtures("one_thread")
def test_what_adamw_lacks_is_what_its_steps_add_to_the_norm() -> None:
    """Adam's scaling by coordinate tilts gradients out of the sphere; where this undoes a share D of decay, layers turn by sqrt(1 - D) of theory's angle."""
    trial = load_spec(ROOT / "search_spaces" / "equilibrium_adamw.yaml").trial_for({"optimizer.intrinsic_lr": 4e-3, "optimizer.lr": 0.04})
    data = load_data(trial.data)
    torch.manual_seed(0)
    model = build_model(trial.model, data.shape, data.num_classes)
    optimizer = build_optimizer(model, trial.optimizer)
    tracer = EffectiveLR(model, optimizer, every=1)
    kernels = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters() if weight.ndim == 4}
    samples: list[LayerSample] = []
    undone: dict[str, list[float]] = {layer: [] for layer in kernels}
    for step in range(STEPS):
        chosen = torch.randint(len(data.train_images), (trial.data.batch_size,))
        optimizer.zero_grad()
        cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        if step >= (1 - TAIL) * STEPS:
            for layer, weight in kernels.items():
                undone[layer].append(share_undone(weight, optimizer, trial.optimizer))
        optimizer.step()
        samples += (tracer.sample() or {}).values()
    ratio = layers_at_the_end(pd.DataFrame([asdict(sample) for sample in samples]))["ratio"]
    explained = pd.Series({layer: math.sqrt(1 - statistics.fmean(shares)) for layer, shares in undone.items()})
    assert (ratio - explained).abs().max() < 0.06
    assert ratio.corr(explained) > 0.7


def share_undone(weight: torch.Tensor, optimizer: torch.optim.Optimizer, spec: OptimizerSpec) -> float:
    """The outward part of Adam's present gradient, scaled by coordinate, over what decay takes from the norm."""
    state = optimizer.state[weight]
    scale = (state["exp_avg_sq"] / (1 - spec.beta2 ** float(state["step"]))).sqrt() + spec.eps
    assert weight.grad is not None
    w = weight.detach()
    return -float((w * weight.grad / scale).sum() / (spec.weight_decay * (w * w).sum()))
