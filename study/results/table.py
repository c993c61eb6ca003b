"""Table: a study's trials, one row each, as `trials.parquet` holds them and every reader of results takes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from study.errors import HomeError
from study.measurement import TrialRecord
from study.trial import TrialSpec, flatten

if TYPE_CHECKING:
    import pandas as pd


def trial_table(records: Sequence[TrialRecord]) -> "pd.DataFrame":
    """One row for each trial, columns as `trials.parquet` has them; lists and mappings as JSON."""
    import pandas as pd

    own = ("trial_id", "arm", "outcome", "reason", "replicate_of", "value", "step", "epoch", "seconds", "run_id")
    rows = []
    for record in records:
        fields = flatten(TrialSpec.model_validate(record.trial).model_dump(mode="json"))
        settled = {"equilibrated": record.metrics.get("final/equilibrated") == 1}
        plain = {path: json.dumps(value) if isinstance(value, list | dict) else value for path, value in fields.items()}
        rows.append({**{name: getattr(record, name) for name in own}, **settled, **plain, **record.metrics})
    return pd.DataFrame(rows)


def read_table(path: Path) -> "pd.DataFrame":
    """The table in a `trials.parquet`.

    Raises:
        HomeError: if it is damaged.
    """
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        remedy = "remove it: `study run` writes it again from the study's ledger"
        raise HomeError(f"cannot be read as the study's table of trials ({error})", where=str(path), remedy=remedy) from error
