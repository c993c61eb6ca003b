"""Replicating: a study with replicates from its first trial to its confirmed best, interrupted on the way. Without Ray, and in the long run with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from ray.tune.search import Searcher

from study.budget import Meter
from study.errors import Interrupted
from study.home import StudyFolder
from study.spec import StudySpec
from study.tracking.outbox import Outbox
from study.tuning import driver, hosting
from study.tuning.callbacks import LedgerCallback
from study.tuning.choice import Choice
from study.tuning.confirming import confirm
from study.tuning.continuing import extended
from study.tuning.driver import run
from study.tuning.failures import FirstFailures
from study.tuning.stopping import OBJECTIVE
from study.tuning.trainables import SoloTrainable
from tests.tuning.test_driver import LONG, SERIAL, all_agree, mlflow_runs, prepared, spec


def tune_here(
    studied: StudySpec,
    folder: Path,
    outbox: Outbox,
    interrupt: threading.Event,
    choice: Choice,
    searcher: Callable[[dict[str, Any], int], Searcher],
    scheduler: object,
    meter: Meter,
    *,
    samples: int,
    at_once: int,
) -> tuple[str, str]:
    """Does what Ray Tune does with our searcher, trainable and callback: one trial after the other, in this process."""
    search = searcher(hosting.settings_of(studied, folder), at_once)
    callback = LedgerCallback(outbox, folder, studied.objective, FirstFailures(0))
    for number in map(str, range(samples)):
        config: Any = search.suggest(number)
        if config is None or config == Searcher.FINISHED:
            break
        trial: Any = SimpleNamespace(config=config, last_result=None, num_failures=0)
        callback.on_trial_start(0, [], trial)
        trainable = SoloTrainable.__new__(SoloTrainable)
        trainable.setup(config)
        done = False
        while not done:
            if interrupt.is_set():
                return "", ""
            trial.last_result = trainable.step()
            done = "done" in trial.last_result
            if OBJECTIVE in trial.last_result:
                search.on_trial_result(number, trial.last_result)
            callback.on_trial_result(0, [], trial, trial.last_result)
        search.on_trial_complete(number, trial.last_result)
        callback.on_trial_complete(0, [], trial)
    return "", ""


@pytest.mark.parametrize("where", ["here", pytest.param("ray", marks=pytest.mark.long)])
def test_replicates_go_on_after_an_interrupt_decide_the_best_and_alone_see_the_test_images(
    where: str, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the best are confirmed with other seeds still, then more trials are added."""
    if where == "here":
        monkeypatch.setattr(hosting, "tune_trials", tune_here)
        monkeypatch.setattr(driver, "on_ray", nullcontext)
    home = prepared(tmp_path / "home", mlflow_database)
    trial = {**LONG, "data": {**LONG["data"], "test": 0.2}}
    studied = spec("again", trial=trial, trials=4, replicate={"top": 1, "seeds": 2}, **SERIAL)
    with pytest.raises(Interrupted, match="4 of 4 trials"):
        run(studied, home=home, watch=interrupting)
    assert "interrupted" in {record.outcome for record in Outbox(home / "again").records() if record.replicate_of}

    result = run(studied, home=home)
    all_agree(home, studied, trials=8)
    searched, again = (part.set_index("trial_id") for _, part in result.trials.groupby(result.trials["replicate_of"] != ""))
    best_of_arms = set(searched.sort_values("value").groupby("arm").head(1).index)
    assert set(again.index) == {f"{trial_id}-r{number}" for trial_id in best_of_arms for number in (1, 2)}
    assert again["test/error"].between(0, 1).all() and searched["test/error"].isna().all()
    assert len(set(zip(again["seed"], again["data.seed"], strict=True))) == 2
    means = again.groupby("replicate_of")["value"].mean()
    assert result.best is not None
    assert (result.best.trial_id, result.best.objective.seeds) == (means.idxmin(), 2)
    assert result.best.objective.mean == pytest.approx(means.min())
    _, children, _ = mlflow_runs(home, "again")
    tags = {child.data.tags["study.trial_id"]: child.data.tags.get("study.replicate_of") for child in children}
    assert tags == {trial_id: trial_id.partition("-r")[0] if "-r" in trial_id else None for trial_id in result.trials["trial_id"]}

    confirmed = confirm("again", 2, home=home)
    all_agree(home, studied, trials=12)
    assert len(Outbox(home / "again").records()) == 12
    assert confirmed.best is not None and confirmed.best.objective.seeds == 2
    own = confirmed.trials[confirmed.trials["trial_id"].str.contains("-c")]
    assert set(own["seed"]).isdisjoint(again["seed"])
    assert confirmed.best.objective.mean == pytest.approx(own.groupby("replicate_of")["value"].mean().min())
    assert confirm("again", 2, home=home).best == confirmed.best

    longer = run(extended("again", 2, home), home=home)
    assert set(longer.trials["trial_id"]) >= {*confirmed.trials["trial_id"], "again-0004", "again-0005"}
    values = longer.trials.set_index("trial_id")["value"]
    pd.testing.assert_series_equal(values[confirmed.trials["trial_id"]], confirmed.trials.set_index("trial_id")["value"])


@contextmanager
def interrupting(folder: StudyFolder, interrupt: threading.Event) -> Iterator[None]:
    """Asks a study to stop once a replicate is under way."""

    def look() -> None:
        outbox = Outbox(folder.path)
        while not done.wait(0.02):
            if any(entry.replicate_of and entry.epoch >= 2 for entry in outbox.running()):
                interrupt.set()

    done = threading.Event()
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
