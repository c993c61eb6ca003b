"""One study of each engine under kills, as `make chaos` runs them by the dozen; and what its comparison would notice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from study.measurement import Ending, Outcome
from tests import chaos

EPOCHS = list(range(chaos.EPOCHS))


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["solo", "fused"])
def test_whatever_is_killed_no_trial_is_lost_repeated_or_recorded_twice(engine: str, tmp_path: Path) -> None:
    report = chaos.disturbed(engine, seed=7, trials=30, keep=tmp_path)
    assert report.violations == [] and report.lost == 0
    assert report.kills.keys() >= {"worker", "node", "driver", "server"} and report.kills["driver"] == 2


def run(**changed: Any) -> tuple[Any, dict[str, list[int]]]:
    """A run as MLflow holds it after everything went well."""
    tags = {"study.outcome": "completed", "study.value": "0.25"}
    given = {"status": "FINISHED", "tags": tags, "best": 0.25, "steps": EPOCHS, **changed}
    data = SimpleNamespace(tags=given["tags"], metrics={"best/val/loss": given["best"]})
    return SimpleNamespace(info=SimpleNamespace(status=given["status"]), data=data), {"val/loss": given["steps"]}


RECORD = SimpleNamespace(outcome=Outcome.COMPLETED, reason="", value=0.25)
TOLD = (Ending(Outcome.COMPLETED), 0.25)


def test_a_trial_that_went_well_is_not_complained_about() -> None:
    assert list(chaos._of_trial("a-0000", RECORD, TOLD, [run()], 0.25)) == []


@pytest.mark.parametrize(
    ("record", "told", "runs", "says"),
    [
        (None, TOLD, [run()], "ledger None"),
        (RECORD, None, [run()], "journal None"),
        (RECORD, TOLD, [], "0 runs"),
        (RECORD, TOLD, [run(), run()], "2 runs"),
        (RECORD, (Ending(Outcome.FAILED), None), [run()], "failed"),
        (RECORD, TOLD, [run(status="RUNNING")], "RUNNING"),
        (RECORD, TOLD, [run(best=0.3)], "expected 0.25"),
        (SimpleNamespace(outcome=Outcome.COMPLETED, reason="", value=0.2), TOLD, [run()], "expected 0.25"),
        (RECORD, TOLD, [run(steps=[*EPOCHS[:-1], 0])], "repeated steps"),
        (RECORD, TOLD, [run(steps=EPOCHS[:-1])], "11 points"),
    ],
)
def test_every_kind_of_loss_is_noticed(record: Any, told: Any, runs: list[Any], says: str) -> None:
    (complaint,) = chaos._of_trial("a-0000", record, told, runs, 0.25)
    assert says in complaint
