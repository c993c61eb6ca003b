"""Slots: no row is held twice, and moves carry every trial to where it is said to be."""

import random

import pytest

from study.engines.slots import Slots


class Rows:
    """Slots beside the list of rows that they stand for, with its parking place."""

    def __init__(self, capacity: int, spare: int = 0) -> None:
        self.slots, self.held = Slots(capacity, spare), [""] * (capacity + spare + 1)

    def admit(self, trial: str) -> None:
        free = self.held.index("")
        assert self.slots.admit(trial) == free < self.slots.rows
        self.held[free] = trial

    def release(self, trial: str) -> None:
        self.held[self.held.index(trial)] = ""
        self.slots.release(trial)

    def compact(self, first: list[str] | None = None, reserve: int = 0) -> None:
        trials, moves = set(self.slots), self.slots.compact(first, reserve)
        for source, target in moves:
            assert self.held[source] and not self.held[target], "a move goes from a held row to a free one"
            self.held[target], self.held[source] = self.held[source], ""
        leading = trials if first is None else set(first) & trials
        assert set(self.held[: len(leading)]) == leading
        assert not any(self.held[len(leading) : reserve])
        assert set(self.held) - {""} == trials
        assert len(moves) <= 2 * len(trials)

    def check(self) -> None:
        trials = [trial for trial in self.held if trial]
        assert list(self.slots) == trials and len(self.slots) == len(trials)
        assert all(trial in self.slots and self.held[self.slots.row(trial)] == trial for trial in trials)
        assert not self.held[self.slots.rows], "nobody stays in the parking place"


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 16])
def test_any_history_keeps_every_trial_in_a_row_of_its_own(capacity: int) -> None:
    for seed in range(60):
        draw, spare, born = random.Random(f"{capacity} {seed}"), seed % 4, 0
        rows = Rows(capacity, spare)
        for _ in range(40):
            trials = list(rows.slots)
            match draw.choice(("admit", "admit", "release", "compact", "lead")):
                case "admit" if len(trials) < capacity:
                    rows.admit(str(born))
                    born += 1
                case "release" if trials:
                    rows.release(draw.choice(trials))
                case "compact":
                    rows.compact()
                case "lead":
                    leading = draw.sample([*trials, "stranger"], draw.randint(0, len(trials)))
                    rows.compact(leading, len(set(leading) & set(trials)) + draw.randint(0, spare))
            rows.check()


def test_a_trial_takes_the_first_free_row() -> None:
    slots = Slots(3)
    assert [slots.admit(trial) for trial in "abc"] == [0, 1, 2]
    slots.release("b")
    assert "b" not in slots and slots.admit("d") == 1


def test_compacting_fills_free_rows_and_leaves_others_alone() -> None:
    slots = Slots(4)
    for trial in "abcd":
        slots.admit(trial)
    slots.release("a")
    assert slots.compact() == [(3, 0)] or slots.compact() == []
    slots.release("b")
    assert slots.compact() in ([(2, 1)], [(3, 1)])
    assert slots.compact() == []


def test_trials_that_change_places_use_the_parking_place() -> None:
    slots = Slots(2)
    slots.admit("a")
    slots.admit("b")
    assert slots.compact(["b"]) == [(0, 2), (1, 0), (2, 1)] or slots.compact(["b"]) == []
    assert (slots.row("b"), slots.row("a")) == (0, 1)


def test_whoever_holds_a_row_gets_no_second_and_a_full_house_takes_nobody() -> None:
    slots = Slots(1)
    slots.admit("a")
    with pytest.raises(ValueError, match="a holds a slot"):
        slots.admit("a")
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        slots.admit("b")
    assert list(slots) == ["a"]
