"""FusedEngine: many trials in one step, a row for each; a row that falls free is filled again between two epochs.

    admit ──> row loaded          advance() = one epoch of all rows:
    release ──> row free            compact ─ [images ─ forward ─ sum of losses ─ backward ─ update]* ─ statistics ─ evaluate ─ measure

Trials share model, data shapes and rule (the fusion key); learning rate, decay plan, schedule, age and seeds are each its own. No value
of one row enters another: losses are summed, never averaged over rows, and clipping, statistics and random numbers are a row's own.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from study.engines.bank import WIDEST_STEP, Bank, Member, dropout_states, fusion_key
from study.engines.course import Course, sub_seed
from study.engines.engine import Snapshot
from study.engines.interval import Interval
from study.engines.recordings import CudaGraphs, Recorder, Recordings
from study.engines.slots import Slots
from study.engines.solo import initial_model, on_one_thread
from study.measurement import Progress
from study.training.decay import absent_places, decay_plan
from study.trial import TrialSpec


class FusedEngine:
    """Trains up to `capacity` trials of one fusion key, on one thread where it trains on the CPU."""

    def __init__(self, capacity: int, device: str = "cpu", arithmetic: str = "auto", recorder: Recorder | None = None) -> None:
        """Makes an engine without trials.

        Args:
            arithmetic: `converted`, `looped`, or `auto`: converted where torch.fx can read the model.
            recorder: Records steps, to replay them; on a GPU, where none is given, as CUDA graphs.
        """
        self.capacity = capacity
        self._device = torch.device(device)
        self._arithmetic = arithmetic
        self._recorder = CudaGraphs(self._device) if recorder is None and self._device.type == "cuda" else recorder
        self._slots = Slots(capacity, spare=WIDEST_STEP)
        self._members: dict[str, Member] = {}
        self._bank: Bank | None = None
        self._recordings: Recordings | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, trial_id: str) -> bool:
        return trial_id in self._slots

    def trials(self) -> list[str]:
        """The admitted trials."""
        return list(self._slots)

    @property
    def arithmetic(self) -> str:
        """How the model is computed; empty before the first trial."""
        return self._bank.arithmetic.name if self._bank else ""

    def admit(self, trial_id: str, trial: TrialSpec, snapshot: Snapshot | None = None, *, test: bool = False) -> None:
        """Takes a trial in, at its beginning or where a snapshot left it; `test` measures it on the test images, too, once it ends.

        Raises:
            InputError: if data, model or policy do not fit together.
            ValueError: if no slot is free, the trial has another fusion key, or the snapshot belongs to another trial.
        """
        with on_one_thread():
            course = Course(trial_id, trial, self._device, test=test)
            model = initial_model(trial, course, self._device)
            if self._bank is None:
                self._bank = Bank(trial, course, model, self._slots.rows, self._arithmetic)
                self._recordings = Recordings(self._bank, self.capacity, self._recorder)
            bank = self._bank
            if fusion_key(trial) != bank.key:
                raise ValueError(f"trial {trial_id} cannot be fused with those that are here: they differ in more than numbers")
            absent_places(bank.roles, trial.optimizer.gamma)
            generator = torch.Generator(self._device).manual_seed(sub_seed(trial.seed, "dropout"))
            if snapshot is not None:
                course.restore(snapshot)
            member = Member(course, decay_plan(bank.roles, trial.optimizer), generator)
            row = self._slots.admit(trial_id)
            self._members[trial_id] = member
            bank.load(row, dict(model.state_dict(keep_vars=True)), member)
            if snapshot is not None:
                bank.restore(row, member, snapshot)

    def advance(self, only: Collection[str] | None = None) -> list[Progress]:
        """Trains one epoch of every admitted trial, or of those that are named."""
        trials = [trial for trial in self._slots if only is None or trial in only]
        if self._bank is None or self._recordings is None or not trials:
            return []
        for source, target in self._slots.compact(trials, self._recordings.padded(len(trials))):
            self._bank.move(source, target)
        with on_one_thread():
            members = [self._members[trial] for trial in self._slots][: len(trials)]
            return Interval(self._bank, members, self._recordings).run()

    def snapshot(self, trial_id: str) -> Snapshot:
        """The trial's present state, between two epochs: a solo engine can go on with it."""
        bank, member = self._here(), self._members[trial_id]
        state = {
            "model": self.weights(trial_id),
            "moments": bank.remembered(self._slots.row(trial_id), member),
            "tracer": {"step": member.course.step, "products": [list(product) for product in member.products.values()]},
            "dropout": dropout_states(member.dropout),
            **member.course.state(),
        }
        return Snapshot(member.course.trial.canonical(), member.course.step, member.course.epoch, state)

    def weights(self, trial_id: str) -> Mapping[str, Tensor]:
        """The trial's present parameters and buffers by name, on the CPU."""
        return self._here().state(self._slots.row(trial_id))

    def release(self, trial_id: str) -> None:
        """Forgets a trial; its row is free."""
        self._slots.release(trial_id)
        del self._members[trial_id]

    def _here(self) -> "Bank":
        assert self._bank is not None, "no trial is admitted"
        return self._bank
