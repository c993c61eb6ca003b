"""Slots: which trial holds which row of a stack. Plain Python.

    admit(a) admit(b) admit(c)    release(a)      compact() -> [(2, 0)]
    rows   0:a  1:b  2:c          0:-  1:b  2:c   0:c  1:b

A trial that comes takes the first free row. Compacting fills free rows from the end, so that the trials hold rows 0 to n - 1.
"""

from collections.abc import Iterable, Iterator

Move = tuple[int, int]
"""The row that a trial leaves, and the one that it takes."""


class Slots:
    """Rows of a fixed number, each held by at most one trial."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._row_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, trial_id: str) -> bool:
        return trial_id in self._row_of

    def __iter__(self) -> Iterator[str]:
        """The trials in the order of their rows."""
        return iter(sorted(self._row_of, key=self._row_of.__getitem__))

    def row(self, trial_id: str) -> int:
        """The row that a trial holds."""
        return self._row_of[trial_id]

    def admit(self, trial_id: str) -> int:
        """Gives a trial the first free row.

        Raises:
            ValueError: if the trial holds a row already, or none is free.
        """
        if trial_id in self._row_of:
            raise ValueError(f"trial {trial_id} holds a slot already")
        taken = set(self._row_of.values())
        free = next((row for row in range(self.capacity) if row not in taken), None)
        if free is None:
            raise ValueError(f"all {self.capacity} slots are taken")
        self._row_of[trial_id] = free
        return free

    def release(self, trial_id: str) -> None:
        """Frees the row of a trial."""
        del self._row_of[trial_id]

    def compact(self, first: Iterable[str] = ()) -> list[Move]:
        """Moves trials until they hold the first rows, those named *first* before the others.

        Returns:
            The moves in the order in which rows must be copied: each goes to a row that is free by then, for which one row beyond the
            capacity, number `capacity`, serves as a parking place.
        """
        wanted = [trial for trial in self if trial in set(first)]
        wanted += [trial for trial in self if trial not in wanted]
        target = {trial: row for row, trial in enumerate(self._settled(wanted, len(set(first) & set(wanted))))}
        return self._moves(target)

    def _settled(self, wanted: list[str], leading: int) -> list[str]:
        """The trials in the order of their rows to be: who stands within the right part already stays."""
        order: list[str | None] = [None] * len(wanted)
        parts = ((wanted[:leading], range(leading)), (wanted[leading:], range(leading, len(wanted))))
        for trials, rows in parts:
            staying = [trial for trial in trials if self._row_of[trial] in rows]
            for trial in staying:
                order[self._row_of[trial]] = trial
            free = (row for row in rows if order[row] is None)
            for trial, row in zip([trial for trial in trials if trial not in staying], free, strict=True):
                order[row] = trial
        return [trial for trial in order if trial is not None]

    def _moves(self, target: dict[str, int]) -> list[Move]:
        """Copies that bring every trial to its target; a ring of trials that wait for each other's rows is opened by parking one."""
        moves: list[Move] = []
        pending = {trial: row for trial, row in target.items() if self._row_of[trial] != row}
        while pending:
            taken = set(self._row_of.values())
            ready = next((trial for trial, row in pending.items() if row not in taken), None)
            trial = next(iter(pending)) if ready is None else ready
            row = self.capacity if ready is None else pending.pop(trial)
            moves.append((self._row_of[trial], row))
            self._row_of[trial] = row
        return moves
