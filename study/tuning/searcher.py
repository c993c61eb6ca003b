"""Searcher: gives Ray Tune the trials of a Search, and tells the Search what became of them.

suggest ──────────> a trial that an earlier start left running, else the Search's next one, else FINISHED (once none runs, where trials pause)
on_trial_result ──> the objective at an epoch
on_trial_complete ─> the last result, and how the trial ended
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from study.budget import Meter
from study.measurement import History
from study.trial import TrialSpec
from study.tuning.search import Proposal, Search
from study.tuning.stopping import EPOCH, OBJECTIVE
from study.tuning.trainables import MUTATED, VALUE, ending_of

AHEAD = 2
"""Trials that wait for a process to fall free, so that it takes the next one at once: the more, the less the search knows when it proposes them."""


class JournalSearcher(Searcher):
    """Gives Tune the trials of a Search: first those that an earlier start left running, then new ones."""

    def __init__(
        self,
        search: Search,
        settings: Mapping[str, Any],
        resumed: Sequence[tuple[Proposal, History]],
        tags: Callable[[TrialSpec], Mapping[str, str]] = lambda trial: {},
        meter: Meter | None = None,
        pausing: bool = False,
        processes: int = sys.maxsize,
    ) -> None:
        """Begins to propose.

        Args:
            pausing: Whether trials pause and go on: once it hears that no trial is to come, Tune ends a process as soon as nobody uses it.
            processes: So many trials are proposed at once when the study starts; later, `AHEAD` more than those that run.
        """
        super().__init__(metric=OBJECTIVE, mode="min" if search.spec.objective.direction == "minimize" else "max")
        self._search, self._settings = search, dict(settings)
        self._waiting, self._tags, self._meter, self._pausing = list(resumed), tags, meter, pausing
        self._trial_ids: dict[str, str] = {}
        self._processes, self._reporting = processes, set[str]()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The config of the next trial, None where enough of them wait for a process, or FINISHED."""
        if not self._pausing and len(self._trial_ids) >= max(self._processes, len(self._reporting)) + AHEAD:
            return None
        if self._waiting:
            proposal, history = self._waiting.pop(0)
        else:
            asked = self._search.ask()
            if asked is None:
                return None if self._pausing and self._trial_ids else Searcher.FINISHED
            proposal, history = asked, ()
        self._trial_ids[trial_id] = proposal.trial_id
        return {
            **self._settings,
            "trial_id": proposal.trial_id,
            "arm": proposal.arm,
            "trial": proposal.trial.brief(),
            "tags": self._tags(proposal.trial),
            "epoch": len(history),
            "history": [objective for _, objective in history],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes the objective at an epoch."""
        self._reporting.add(trial_id)
        self._note(self._trial_ids[trial_id], result)

    def _note(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if OBJECTIVE in result:
            self._search.report(trial_id, result[EPOCH], result[OBJECTIVE])
        if MUTATED in result:
            self._search.mark_mutated(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells how the trial ended; Tune withholds the last result of a stopped trial from `on_trial_result`."""
        ours = self._trial_ids.pop(trial_id, None)
        self._reporting.discard(trial_id)
        if ours is None:
            return
        last = [(result[EPOCH], result[OBJECTIVE])] if result and OBJECTIVE in result else []
        if result and MUTATED in result:
            self._search.mark_mutated(ours)
        ending, value = ending_of(result, error), (result or {}).get(VALUE)
        self._search.tell(ours, ending, value, last)
        if self._meter is not None:
            self._meter.end(ending.outcome, value)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the journal holds it all."""
