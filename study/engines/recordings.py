"""Recordings: steps that are recorded as CUDA graphs, and replayed with other numbers in the same places.

Recordings ──steps(rows, names, decays)──> Steps on a CPU, and of models that cannot be recorded
                                           Replayed on a GPU: a few steps as they are ─ recorded ─ checked ─ replayed

A GPU computes a small step faster than Python asks for it: a replay asks once for the whole step. One recording is kept for each number of
rows, which is rounded up so that there are few. None is trusted unseen: its first step is compared with the one that is taken without it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from study.engines.bank import Bank
from study.engines.steps import Steps, Taken
from study.engines.updates import Decay
from study.trial import IMPORT

log = logging.getLogger(__name__)

WARM_UP = 2
"""Steps of each kind that are taken before one is recorded: libraries choose kernels and reserve memory in the first."""

SHARE_OF_OCTAVE = 4
"""Numbers of rows between one power of two and the next: at most a quarter of the rows only fills up."""

CLOSE, FEW = 1e-3, 0.01
"""How far a coordinate may be from the one of the unrecorded step, relative to the longest way of any, and the share that may be further:
some kernels add in any order, and rules that take signs make much of that.
"""


class Recorder(Protocol):
    """Records what a GPU is asked to do."""

    def aside(self) -> AbstractContextManager[None]:
        """A block in which steps are taken that prepare a recording."""

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        """What the function returns, and what computes that again, in the same memory, from what its inputs hold by then.

        The function is called once, and nothing is computed.
        """


class CudaGraphs:
    """Records CUDA graphs, which share one pool of memory: what one returns is read before another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream that recordings are made on, as libraries keep memory for each stream."""
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            yield
        present.wait_stream(self._stream)

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        """As a graph."""
        graph = torch.cuda.CUDAGraph()
        # The outer block puts the present stream back where recording fails, which the inner one does not (torch 2.13).
        with torch.cuda.stream(torch.cuda.current_stream(self._stream.device)), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            taken = function()
        return taken, graph.replay


class Recordings:
    """The steps of one bank, recorded where there is a recorder and the bank's model, loss and random numbers allow it."""

    def __init__(self, bank: Bank, most: int, recorder: Recorder | None = None) -> None:
        """Makes none yet.

        Args:
            most: Trials that the bank has rows for.
        """
        self._bank, self._most = bank, most
        self._recorder = recorder if _may_be_recorded(bank) else None
        self._kept: dict[tuple[Any, ...], Replayed] = {}

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self._recorder is not None

    def padded(self, trials: int) -> int:
        """The rows to train for so many trials."""
        if self.records:
            step = max(1, (1 << (trials - 1).bit_length()) // (2 * SHARE_OF_OCTAVE))
            trials = min(self._most, -(-trials // step) * step)
        return self._bank.padded(trials)

    def steps(self, rows: int, names: Sequence[str], decays: Mapping[int, Decay]) -> "Steps | Replayed":
        """What takes the steps of the first rows."""
        steps = Steps(self._bank, rows, names, decays)
        if self._recorder is None:
            return steps
        key = (rows, *names, any(decay.anchor is not None for decay in decays.values()))
        if key not in self._kept:
            self._kept[key] = Replayed(steps, self._recorder)
        self._kept[key].adopt(steps)
        return self._kept[key]


def _may_be_recorded(bank: Bank) -> bool:
    """Whether every step does the same with other numbers: nobody else's code, and no random numbers, which a graph would not draw anew."""
    return not (bank.arithmetic.name == "looped" or bank.arithmetic.draws or bank.loss_name.startswith(IMPORT))


class _Recording(NamedTuple):
    """One kind of step, recorded."""

    taken: Taken
    replay: Callable[[], None]


class Replayed:
    """Steps of a number of rows, recorded when they have been taken a few times."""

    def __init__(self, steps: Steps, recorder: Recorder) -> None:
        self._steps, self._recorder = steps, recorder
        self._places: list[Tensor] = []
        self._recordings: dict[bool, _Recording] = {}
        self._warm = {False: 0, True: 0}
        self._is_given_up = False

    def adopt(self, steps: Steps) -> None:
        """Goes on with what decay and constraints are for other trials in the same rows."""
        if steps is not self._steps:
            for mine, its in zip(self._steps.settings(), steps.settings(), strict=True):
                mine.copy_(its)

    def take(self, images: Tensor, labels: Tensor, now: Tensor, generators: Sequence[torch.Generator], watches: bool) -> Taken:
        """One step of every row, as `Steps.take` has it."""
        if self._is_given_up:
            return self._steps.take(images, labels, now, generators, watches)
        if self._warm[watches] < WARM_UP:
            self._warm[watches] += 1
            with self._recorder.aside():
                return self._steps.take(images, labels, now, generators, watches)
        if not self._places:
            self._places = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in (images, labels, now)]
        for place, value in zip(self._places, (images, labels, now), strict=True):
            place.copy_(value)
        if watches not in self._recordings:
            return self._recorded(watches)
        recording = self._recordings[watches]
        recording.replay()
        return recording.taken.cloned()

    def _recorded(self, watches: bool) -> Taken:
        """A step without a recording, which one is made for and compared with."""
        images, labels, now = self._places
        before = [tensor.clone() for tensor in self._steps.state()]
        try:
            recording = _Recording(*self._recorder.record(lambda: self._steps.take(images, labels, now, (), watches)))
            recording.replay()
            replayed, after = recording.taken.cloned(), [tensor.clone() for tensor in self._steps.state()]
        except RuntimeError as error:  # what CUDA and torch raise where something cannot be recorded; the step itself is taken below
            self._give_up(f"recording them failed: {error}".splitlines()[0])
            recording = None
        for tensor, value in zip(self._steps.state(), before, strict=True):
            tensor.copy_(value)
        taken = self._steps.take(images, labels, now, (), watches)
        if recording is None:
            return taken
        if _is_close(replayed.numbers, taken.numbers, taken.numbers) and all(
            _is_close(mine, its, its - was) for mine, its, was in zip(after, self._steps.state(), before, strict=True)
        ):
            self._recordings[watches] = recording
        else:
            self._give_up("a recorded step gave other numbers")
        return taken

    def _give_up(self, why: str) -> None:
        self._is_given_up = True
        self._recordings.clear()
        log.warning("steps of %d rows are taken one operation after the other, as %s", self._steps.rows, why)


def _is_close(one: Tensor, other: Tensor, way: Tensor) -> bool:
    """Whether nearly all coordinates agree, as far as they moved; those that are not finite do."""
    if not other.numel():
        return True
    moved = way.abs()
    limit = CLOSE * torch.where(moved.isfinite(), moved, 0).max()
    differ = ((one - other).abs() > limit) | (one.isfinite() != other.isfinite())
    return float(differ.double().mean()) <= FEW
