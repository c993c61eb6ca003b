"""Synthetic tables of trials, as `trials.parquet` has them, for tests of what is read from them."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from study.spec import StudySpec

SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True},
    "optimizer.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
    "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"},
}

NONE, ALL = "optimizer.gamma=none", "optimizer.gamma=all"


def spec(**changes: Any) -> StudySpec:
    """A study of two arms."""
    return StudySpec.model_validate({"name": "gains", "question": "Which gains should decay?", "space": SPACE, "search": {"trials": 10}, **changes})


def trial(number: int, arm: str = NONE, value: float | None = 0.1, outcome: str = "completed", **fields: Any) -> dict[str, Any]:
    """One row: a trial in the middle of its axes, unless its fields say otherwise."""
    own = {"trial_id": f"gains-{number:04}", "arm": arm, "outcome": outcome, "value": value, "replicate_of": "", "reason": "", "seconds": 2.0}
    middle = {"optimizer.lr": 0.03, "optimizer.weight_decay": 1e-3, "seed": 0, "data.seed": 0, "equilibrated": False}
    return {**own, **middle, "optimizer.gamma": arm.partition("=")[2], "final/val/error": value, **fields}


def replicates(row: Mapping[str, Any], values: Iterable[float]) -> list[dict[str, Any]]:
    """A trial's replicates with these values, on seeds 1, 2, ..."""
    trial_id = row["trial_id"]
    return [
        {**row, "trial_id": f"{trial_id}-r{k}", "replicate_of": trial_id, "value": value, "final/val/error": value, "seed": k, "data.seed": k}
        for k, value in enumerate(values, 1)
    ]


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows)
