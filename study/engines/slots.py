"""Slots: which trial holds which row of a stack. Plain Python.

    admit(a) admit(b) admit(c)    release(a)      compact() -> [(2, 0)]
    rows   0:a  1:b  2:c          0:-  1:b  2:c   0:c  1:b

A trial that comes takes the first free row. Compacting brings the trials that are to be trained into rows 0 to n - 1, and keeps the
others out of a reserve behind them.
"""

from collections.abc import Collection, Iterator

Move = tuple[int, int]
"""The row that a trial leaves, and the one that it takes."""


class Slots:
    """Rows of a fixed number, each held by at most one trial."""

    def __init__(self, capacity: int, spare: int = 0) -> None:
        """Makes rows without trials.

        Args:
            capacity: The most trials.
            spare: Rows beyond that, so that a reserve can be kept free.
        """
        self.capacity, self.rows = capacity, capacity + spare
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
        if len(self) == self.capacity:
            raise ValueError(f"all {self.capacity} slots are taken")
        self._row_of[trial_id] = row = next(self._free(0))
        return row

    def release(self, trial_id: str) -> None:
        """Frees the row of a trial."""
        del self._row_of[trial_id]

    def compact(self, first: Collection[str] | None = None, reserve: int = 0) -> list[Move]:
        """Moves trials until those named *first*, or all, hold the first rows, and no other one any of the first *reserve* rows.

        Returns:
            The moves in the order in which rows must be copied: each goes to a row that is free by then, for which one row beyond all
            others, number `rows`, serves as a parking place.
        """
        leading = [trial for trial in self if first is None or trial in first]
        target = self._within(leading, range(len(leading)))
        others = [trial for trial in self if trial not in target]
        behind = range(max(reserve, len(leading)), self.rows)
        return self._moves(target | self._within(others, behind))

    def _within(self, trials: list[str], rows: range) -> dict[str, int]:
        """A row of its own in the range for each trial: its present one, if that is in the range."""
        staying = {trial: self._row_of[trial] for trial in trials if self._row_of[trial] in rows}
        free = iter(sorted(set(rows) - set(staying.values())))
        return {trial: staying[trial] if trial in staying else next(free) for trial in trials}

    def _free(self, start: int) -> Iterator[int]:
        taken = set(self._row_of.values())
        return (row for row in range(start, self.rows) if row not in taken)

    def _moves(self, target: dict[str, int]) -> list[Move]:
        """Copies that bring every trial to its target; a ring of trials that wait for each other's rows is opened by parking one."""
        moves: list[Move] = []
        pending = {trial: row for trial, row in target.items() if self._row_of[trial] != row}
        while pending:
            taken = set(self._row_of.values())
            ready = next((trial for trial, row in pending.items() if row not in taken), None)
            trial = next(iter(pending)) if ready is None else ready
            row = self.rows if ready is None else pending.pop(trial)
            moves.append((self._row_of[trial], row))
            self._row_of[trial] = row
        return moves
