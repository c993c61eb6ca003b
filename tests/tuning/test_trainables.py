"""A solo trial as Tune sees it: what it leaves on disk, and how it goes on where a process without memory or luck left it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study.engines.engine import Snapshot
from study.engines.solo import SoloEngine
from study.measurement import Measurement, Outcome
from study.spec import ObjectiveSpec
from study.trial import TrialSpec
from study.tuning import trainables
from study.tuning.trainables import ENDING, MEASUREMENT, SoloTrainable, snapshot_path

TRIAL = TrialSpec.model_validate(
    {
        "data": {"batch_size": 64, "train_size": 128},
        "model": {"name": "mlp", "width": 8},
        "schedule": {"epochs": 4, "shape": "cosine"},
        "trace": {"every": 1},
    }
)


def trainable(folder: Path, **more: str) -> SoloTrainable:
    """A trial without Ray around it."""
    found = SoloTrainable.__new__(SoloTrainable)
    objective = ObjectiveSpec(metric="val/loss").model_dump_json()
    found.setup(
        {
            "trial_id": "a-0000",
            "folder": str(folder),
            "objective": objective,
            "trial": TRIAL.model_dump_json(),
            "device": "cpu",
            "keep_weights": "none",
            "history": [],
            "test": False,
            **more,
        }
    )
    return found


def measured(result: dict[str, Any]) -> Measurement:
    """A measurement without the time that it took."""
    found: Measurement = result[MEASUREMENT]
    return Measurement(found.step, found.epoch, found.values, found.samples)


@pytest.fixture
def undisturbed(tmp_path: Path) -> list[Measurement]:
    one = trainable(tmp_path / "undisturbed")
    return [measured(one.step()) for _ in range(4)]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is taken as often as it may be."""
    monkeypatch.setattr(trainables, "SNAPSHOT_SECONDS", -1.0)


def test_a_snapshot_is_never_ahead_of_what_the_study_knows(tmp_path: Path) -> None:
    """Whoever asks for an epoch has heard of the last one; a process that dies before that repeats it."""
    one, path = trainable(tmp_path), snapshot_path(tmp_path, "a-0000")
    one.step()
    assert not path.exists()
    for epoch in (1, 2):
        one.step()
        assert Snapshot.load(path).epoch == epoch


def test_another_process_goes_on_bit_for_bit(tmp_path: Path, undisturbed: list[Measurement]) -> None:
    one = trainable(tmp_path)
    found = [measured(one.step()) for _ in range(3)]
    other = trainable(tmp_path)
    again = [measured(other.step()) for _ in range(2)]
    assert found == undisturbed[:3]
    assert again == undisturbed[2:]


def test_a_trial_without_memory_goes_on_from_its_snapshot_once(
    tmp_path: Path, undisturbed: list[Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainable(tmp_path)
    found = [measured(one.step()) for _ in range(2)]
    monkeypatch.setattr(SoloEngine, "advance", _without_memory_at(SoloEngine.advance, {3, 5}))
    found += [measured(one.step())]
    assert found == [undisturbed[0], undisturbed[1], undisturbed[2]]
    ending = one.step()[ENDING]
    assert (ending.outcome, ending.reason) == (Outcome.FAILED, "out-of-memory")
    assert "MemoryError: at call 5" in ending.error


def _without_memory_at(advance: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """An engine's `advance` that raises at some of its calls, counted from 3."""
    count = 2

    def short(engine: SoloEngine) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise MemoryError(f"at call {count}")
        return advance(engine)

    return short
