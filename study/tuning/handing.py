"""Handing: gives Tune the replicates that are wanted, and waits where the next look at them needs those that still run.

ledger ──plan──> [a-r1, b-r1, a-r2, b-r2]      suggest ──> each once ──> none for now ──> ... ──> the plan is empty: FINISHED
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from study.measurement import History
from study.trial import TrialSpec
from study.tuning.replication import Replicate
from study.tuning.stopping import OBJECTIVE

Plan = Callable[[], Sequence[Replicate]]
"""What is wanted and has not ended, as the ledger stands now."""


class ReplicateSearcher(Searcher):
    """A searcher that proposes nothing of its own."""

    def __init__(
        self, plan: Plan, history: Callable[[str], History], settings: Mapping[str, Any], tags: Callable[[TrialSpec], Mapping[str, str]]
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self._plan, self._history, self._settings, self._tags = plan, history, dict(settings), tags
        self._issued: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The config of the next replicate, None while others have to end first, or FINISHED."""
        batch = self._plan()
        if not batch:
            return Searcher.FINISHED
        one = next((one for one in batch if one.trial_id not in self._issued), None)
        if one is None:
            return None
        self._issued.add(one.trial_id)
        history = self._history(one.trial_id)
        return {
            **self._settings,
            "trial_id": one.trial_id,
            "arm": one.arm,
            "replicate_of": one.replicate_of,
            "trial": one.trial.brief(),
            "tags": self._tags(one.trial),
            "epoch": len(history),
            "history": [objective for _, objective in history],
            "test": True,
            "patience": None,
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn: the ledger holds it all."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
