"""The solo engine is the definition of a trial: its seed fixes its bits, and a snapshot goes on as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from study.engines.engine import Snapshot
from study.engines.solo import SoloEngine
from study.errors import DataError, ModelError
from study.measurement import Measurement, Outcome
from study.trial import TrialSpec

SMALL = {
    "data": {"name": "digits", "batch_size": 64, "label_noise": 0.1, "train_size": 400},
    "model": {"name": "resnet", "width": 4, "blocks": [1, 1]},
    "optimizer": {"lr": 0.1, "weight_decay": 5e-3},
    "schedule": {"epochs": 4, "warmup": 0.1},
    "trace": {"every": 3},
}


def trial(**sections: dict[str, object] | object) -> TrialSpec:
    merged = {name: {**SMALL.get(name, {}), **value} if isinstance(value, dict) else value for name, value in sections.items()}
    return TrialSpec.model_validate({**SMALL, **merged})


def train(
    spec: TrialSpec, *, stop_after: int | None = None, snapshot: Snapshot | None = None
) -> tuple[SoloEngine, list[Measurement], Outcome | None]:
    engine, seen, outcome = SoloEngine(), [], None
    engine.admit("t", spec, snapshot)
    while outcome is None and (stop_after is None or len(seen) < stop_after):
        (progress,) = engine.advance()
        seen.append(progress.measurement)
        outcome = progress.ending.outcome if progress.ending else None
    return engine, seen, outcome


def plain(measurements: list[Measurement]) -> list[tuple[object, ...]]:
    return [(seen.step, seen.epoch, dict(seen.values), seen.samples) for seen in measurements]


def test_a_trial_completes_with_a_measurement_for_every_epoch() -> None:
    _, seen, outcome = train(trial())
    assert outcome is Outcome.COMPLETED
    assert [measurement.epoch for measurement in seen] == [1, 2, 3, 4]
    assert [measurement.step for measurement in seen] == [6, 12, 18, 24]
    wanted = {"train/loss", "train/error", "val/loss", "val/error", "lr", "weight_decay", "intrinsic_lr", "effective_lr/median", "rotation/median"}
    assert wanted | {"gamma_rms/stem", "gamma_rms/inner", "gamma_rms/last", "gamma_rms/down"} <= set(seen[-1].values)
    assert {sample.step for measurement in seen for sample in measurement.samples} == set(range(3, 25, 3))


def test_training_learns() -> None:
    _, seen, _ = train(trial(schedule={"epochs": 8}, data={"train_size": None, "label_noise": 0.0}))
    assert seen[-1].values["val/error"] < 0.1 < seen[0].values["train/error"]


VARIANTS = {
    "plain": {},
    "dropout and augmentation": {"model": {"name": "mlp", "width": 16, "dropout": 0.3}, "data": {"augment": "shift"}},
    "adamw, anchored gains": {"optimizer": {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1, "gamma": "last@1+down"}},
    "decoupled sgd, clipped": {"optimizer": {"decay": "decoupled", "clip": 0.5, "nesterov": True}},
    "transformer in float64": {"model": {"name": "transformer", "width": 8, "dropout": 0.1}, "precision": "float64"},
    "bf16": {"precision": "bf16"},
    "weight norm": {"model": {"norm": "weight"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_seed_fixes_every_bit(variant: str) -> None:
    spec = trial(**VARIANTS[variant])
    first, second = train(spec), train(spec)
    assert plain(first[1]) == plain(second[1])
    for name, value in first[0].weights("t").items():
        assert torch.equal(value, second[0].weights("t")[name]), name


def test_other_random_numbers_in_the_process_change_nothing_and_are_left_alone() -> None:
    spec = trial(model={"name": "mlp", "dropout": 0.3})
    quiet = train(spec, stop_after=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine = SoloEngine()
    engine.admit("t", spec)
    engine.advance()
    assert torch.equal(torch.rand(3), expected)
    engine.advance()
    for name, value in engine.weights("t").items():
        assert torch.equal(value, quiet[0].weights("t")[name])


def test_another_seed_is_another_trial() -> None:
    assert plain(train(trial(), stop_after=1)[1]) != plain(train(trial(seed=1), stop_after=1)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_snapshot_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    spec = trial(**VARIANTS[variant])
    whole_engine, whole, _ = train(spec)
    early_engine, early, _ = train(spec, stop_after=2)
    early_engine.snapshot("t").save(tmp_path / "deep" / "snapshot.pt")
    late_engine, late, outcome = train(spec, snapshot=Snapshot.load(tmp_path / "deep" / "snapshot.pt"))
    assert outcome is Outcome.COMPLETED
    assert plain(early) + plain(late) == plain(whole)
    for name, value in whole_engine.weights("t").items():
        assert torch.equal(value, late_engine.weights("t")[name]), name


def test_a_snapshot_of_another_trial_is_refused() -> None:
    engine, _, _ = train(trial(), stop_after=1)
    with pytest.raises(ValueError, match="another trial"):
        SoloEngine().admit("u", trial(seed=3), engine.snapshot("t"))


def test_a_snapshot_that_holds_code_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"format": 1, "trial": Bomb(), "step": 0, "epoch": 0, "state": {}}, tmp_path / "snapshot.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        Snapshot.load(tmp_path / "snapshot.pt")
    assert not (tmp_path / "boom").exists()


DIVERGING = {
    "nan or inf": {"model": {"name": "mlp", "norm": "none"}, "optimizer": {"lr": 1e4, "weight_decay": 0.0}},
    "exploded": {
        "model": {"name": "mlp", "norm": "none", "depth": 1},
        "optimizer": {"lr": 30.0, "weight_decay": 0.0, "momentum": 0.0},
        "loss": "mse",
    },
    "exploding gains": {"optimizer": {"lr": 1e9, "weight_decay": 1.0}},
}


@pytest.mark.parametrize("case", DIVERGING)
def test_a_trial_that_leaves_the_numbers_ends_as_diverged_and_reports_finite_values_only(case: str) -> None:
    _, seen, outcome = train(trial(**DIVERGING[case]))
    assert outcome is Outcome.DIVERGED
    assert all(torch.isfinite(torch.tensor(value)) for measurement in seen for value in measurement.values.values())


def test_batch_norm_statistics_belong_to_the_present_weights() -> None:
    """After one epoch at a tiny momentum of the statistics, leftovers of the start would dominate them."""
    engine, _, _ = train(trial(), stop_after=1)
    weights = engine.weights("t")
    counted = [value for name, value in weights.items() if name.endswith("num_batches_tracked")]
    assert counted and all(int(count) == 1 for count in counted)


def test_probes_are_measured_at_the_end_only() -> None:
    _, seen, _ = train(trial(probes=["branch_ratio", "class_error"]))
    assert not any(name.startswith("final/") for measurement in seen[:-1] for name in measurement.values)
    final = {name for name in seen[-1].values if name.startswith("final/")}
    assert {"final/branch_ratio/layer1.0", "final/branch_ratio/layer2.0"} <= final
    assert {f"final/class_error/{digit}" for digit in range(10)} <= final


def test_the_users_metrics_are_measured_under_their_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text("def confidence(logits, labels):\n    return logits.softmax(1).amax(1).mean()\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, seen, _ = train(trial(metrics=["import:my_metrics:confidence"], schedule={"epochs": 1}))
    assert 0.1 <= seen[0].values["val/confidence"] <= 1


def test_a_model_that_only_a_run_on_images_explains_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_branching.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.n, self.b = torch.nn.Linear(64, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        if x.abs().max() > 1e9:\n"
        "            x = x / 2\n"
        "        return self.b(torch.relu(self.n(self.a(x))))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = {"name": "import:my_branching:Net", "width": 16, "blocks": [2, 2]}
    engine = SoloEngine()
    engine.admit("t", trial(model=model, optimizer={"gamma": "final"}, schedule={"epochs": 1}))
    (progress,) = engine.advance()
    assert progress.measurement.values["gamma_rms/final"] > 0
    assert {sample.layer for sample in progress.measurement.samples if sample.scale_invariant} == {"a"}


def test_input_that_cannot_work_is_said_at_admission() -> None:
    with pytest.raises(DataError, match="batch"):
        SoloEngine().admit("t", trial(data={"train_size": 20}))
    with pytest.raises(ModelError, match="no gain at down"):
        SoloEngine().admit("t", trial(model={"name": "mlp"}, optimizer={"gamma": "down"}))
