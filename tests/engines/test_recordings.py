"""Recorded steps do what steps do, whoever comes and goes, and are given up where they do not."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor, nn

from study.engines.bank import Bank
from study.engines.fused import FusedEngine
from study.engines.recordings import Recordings
from study.engines.steps import Taken
from tests.engines.conformance import MODELS, TRANSFORMER_TOLERANCE, assert_same_bits, fused, hold, live, trial, trials
from tests.engines.tape import Tape

CASES: dict[str, dict[str, Any]] = {
    "sgd, mlp": {"model": MODELS["mlp"]},
    "sgd, decoupled": {"optimizer": {"decay": "decoupled", "nesterov": True}},
    "adam": {"optimizer": {"rule": "adam"}, "model": {**MODELS["mlp"], "norm": "rms"}},
    "adamw, weight norm": {"optimizer": {"rule": "adamw"}, "model": {"norm": "weight"}},
    "lion": {"optimizer": {"rule": "lion"}, "model": {"norm": "group", "width": 8}},
    "muon": {"optimizer": {"rule": "muon"}, "model": {"norm": "batch"}},
    "mse": {"loss": "mse", "model": {"norm": "group"}},
    "transformer": {"model": MODELS["transformer pre"]},
    "shift": {"data": {"augment": "shift", "pool": 1}, "model": MODELS["mlp"]},
    "rescale": {"optimizer": {"constraint": {"name": "rescale", "period": 3, "norm": 2.0}}},
    "volumization": {"optimizer": {"constraint": {"name": "volumization", "bound": 0.6, "strength": 0.5}}},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_train_every_trial_as_alone(case: str) -> None:
    """Nine trials in turn on four rows: they come with other rates, anchors, schedules and clips than those that the recording saw."""
    sections, tape = CASES[case], Tape()
    rule = sections.get("optimizer", {}).get("rule", "sgd")
    hold(trials(range(0, 16, 2), rule=rule, **sections), 4, tolerance=TRANSFORMER_TOLERANCE if case == "transformer" else 1e-12, recorder=tape)
    assert tape.replayed > 5 * tape.recorded > 0


def test_the_rotational_constraint_replayed() -> None:
    """Where every trial begins is a part of it, and is another trial's in the next."""
    tape = Tape()
    specs = {
        str(number): trial(seed=number, optimizer={"lr": 0.02, "weight_decay": 0.01 / (1 + number), "constraint": {"name": "rotational"}})
        for number in range(5)
    }
    hold(specs, 2, recorder=tape)
    assert tape.replayed > 5 * tape.recorded > 0


def test_replayed_steps_in_bfloat16_have_the_bits_of_others() -> None:
    specs = trials(range(4), precision="bf16", model={"norm": "batch"})
    tape = Tape()
    replayed, others = fused(specs, 4, recorder=tape), fused(specs, 4)
    for name in specs:
        assert_same_bits(replayed[name], others[name])
    assert tape.replayed


def test_a_neighbour_that_diverges_harms_nobody_in_a_replay() -> None:
    specs = trials(range(3), model=MODELS["mlp"])
    wild = trial(model=MODELS["mlp"], seed=9, optimizer={"lr": 1e200, "clip": None})
    tape = Tape()
    engine = FusedEngine(4, recorder=tape)
    lives = live(engine, {**specs, "wild": wild}, 4)
    ending = lives["wild"].progress[-1].ending
    assert ending is not None and ending.outcome == "diverged"
    beside = fused(specs, 4)
    for name in specs:
        assert lives[name].progress[-1].measurement.values["val/loss"] == pytest.approx(beside[name].progress[-1].measurement.values["val/loss"])
    assert tape.replayed


@pytest.mark.parametrize(
    ("sections", "arithmetic"),
    [
        ({"model": {**MODELS["mlp"], "dropout": 0.5}}, "converted"),
        ({"model": MODELS["mlp"]}, "looped"),
        ({"model": MODELS["mlp"], "loss": "import:tests.engines.test_recordings:squared"}, "converted"),
    ],
)
def test_random_numbers_and_others_code_are_not_recorded(sections: dict[str, Any], arithmetic: str) -> None:
    tape = Tape()
    hold(trials(range(2), **sections), 2, arithmetic, recorder=tape)
    assert tape.recorded == 0


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of somebody's own."""
    return nn.functional.mse_loss(logits, nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype))


class _Broken(Tape):
    """Whose recordings do nothing."""

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        taken, _ = super().record(function)
        return taken, lambda: None


class _Unable(Tape):
    """On which nothing can be recorded."""

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("recorder", "why"), [(_Broken, "gave other numbers"), (_Unable, "not permitted")])
def test_a_recording_that_fails_is_given_up_and_said(recorder: type[Tape], why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hold(trials(range(3), model=MODELS["mlp"]), 4, recorder=recorder())
    assert why in caplog.text and "steps of 4 rows are taken one operation after the other" in caplog.text


def test_few_numbers_of_rows_are_recorded() -> None:
    """At most a quarter of the rows only fills up, and never more than there are."""
    arithmetic = SimpleNamespace(name="converted", draws=False)
    bank = cast(Bank, SimpleNamespace(padded=lambda trials: max(2, trials), arithmetic=arithmetic, loss_name="mse"))
    recordings = Recordings(bank, 250, Tape())
    padded = {trials: recordings.padded(trials) for trials in range(1, 251)}
    assert all(rows >= trials and (rows <= 1.25 * trials or rows == 2) for trials, rows in padded.items())
    assert len(set(padded.values())) <= 28 and max(padded.values()) == 250
    assert Recordings(bank, 250).padded(17) == 17
