"""Engine: who trains trials, one or many. An engine trains; it never logs, reports or decides.

admit(trial) ──> advance() ──> Progress ──> advance() ──> ... ──> release(trial)
                      │
                      └── snapshot(trial) ──> Snapshot ──> admit(trial, snapshot) on any engine, later
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from study.measurement import Progress
from study.trial import TrialSpec

SNAPSHOT_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a trial needs to go on as if nothing had happened: tensors and plain values only."""

    trial: dict[str, Any]
    """The trial's canonical spec; a snapshot continues no other trial."""
    step: int
    epoch: int
    state: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the snapshot whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save({"format": SNAPSHOT_FORMAT, "trial": self.trial, "step": self.step, "epoch": self.epoch, "state": self.state}, draft)
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Snapshot":
        """Reads a snapshot without executing anything that it may hold.

        Raises:
            OSError: if it cannot be read.
            RuntimeError, pickle.UnpicklingError: if it is damaged or holds more than tensors and plain values.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("format") != SNAPSHOT_FORMAT:
            raise RuntimeError(f"{path} has snapshot format {content.get('format')}, this version reads {SNAPSHOT_FORMAT}")
        return cls(content["trial"], content["step"], content["epoch"], content["state"])


class Engine(Protocol):
    """Trains the trials that it has admitted, an interval at a time."""

    def admit(self, trial_id: str, trial: TrialSpec, snapshot: Snapshot | None = None, *, test: bool = False) -> None:
        """Takes a trial in, at its beginning or where a snapshot left it; `test` measures it on the test images, too, once it ends."""

    def advance(self) -> list[Progress]:
        """Trains every admitted trial for one interval."""

    def snapshot(self, trial_id: str) -> Snapshot:
        """The trial's present state, between two intervals."""

    def weights(self, trial_id: str) -> Mapping[str, Tensor]:
        """The trial's present parameters and buffers by name, on the CPU."""

    def release(self, trial_id: str) -> None:
        """Forgets a trial."""
