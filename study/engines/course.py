"""Course: what one trial is between its first step and its last, apart from its tensors. Every engine keeps one for each trial.

data, order of images, augmentation, dropout   drawn from the trial's own seed, whatever else runs
step, epoch, first loss                        where it stands
measured()                                     an epoch's numbers ──> Progress; completed or diverged are decided here, for all engines alike
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from study.engines.engine import Snapshot
from study.engines.exploits import POPULATION
from study.measurement import EXPLOITS, Ending, LayerSample, Measurement, Outcome, Progress, Reason, finite, layer_medians
from study.training.data import Data, augmented, batches, load_data
from study.training.imported import user_function
from study.training.losses import loss_function
from study.training.probes import probe
from study.training.schedules import decay_factor, lr_factor
from study.trial import DataSpec, TrialSpec

EXPLODED_LOSS = 1e3
"""An interval's mean train loss above this many times max(1, first loss) has exploded."""

EXPLODED_PARAMETER = 1e15
"""A parameter of larger size has exploded."""

EVALUATION_IMAGES = 1024
"""Images that go through the model at once when it is evaluated."""

Metric = Callable[[Tensor, Tensor], float]


def sub_seed(seed: int, purpose: str) -> int:
    """An independent seed for one purpose of a trial."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


def dtype_of(trial: TrialSpec) -> torch.dtype:
    """The dtype that a trial's parameters have."""
    return torch.float64 if trial.precision == "float64" else torch.float32


@lru_cache(maxsize=8)
def data_on(spec: str, device: torch.device, dtype: torch.dtype) -> Data:
    """The data of a spec in JSON, on a device: trials of equal specs share the tensors, which nobody writes to."""
    return load_data(DataSpec.model_validate_json(spec)).to(device, dtype)


class Course:
    """One trial's way."""

    def __init__(self, trial_id: str, trial: TrialSpec, device: torch.device, *, test: bool = False) -> None:
        self.trial_id, self.trial, self.test = trial_id, trial, test
        self.dtype = dtype_of(trial)
        self.data = data_on(trial.data.model_dump_json(), device, self.dtype)
        self.steps_per_epoch = len(self.data.train_labels) // trial.data.batch_size
        self.total_steps = trial.schedule.epochs * self.steps_per_epoch
        self.loss = loss_function(trial.loss)
        self.metrics: dict[str, Metric] = {f"val/{path.rpartition(':')[2]}": user_function(path) for path in trial.metrics}
        self.order = torch.Generator().manual_seed(sub_seed(trial.seed, "order"))
        self.augmentation = torch.Generator(device).manual_seed(sub_seed(trial.seed, "augmentation"))
        self.step = self.epoch = 0
        self.first_loss = math.nan
        self.population: dict[str, Any] = {}

    def batches(self) -> Tensor:
        """The images of every step of the next epoch: int64 [steps, batch]."""
        return batches(len(self.data.train_labels), self.trial.data.batch_size, self.order)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images, as training sees them, and labels of one step."""
        return augmented(self.data.train_images[indices], self.trial.data.augment, self.augmentation), self.data.train_labels[indices]

    def scheduled(self, step: int, *, aux: bool = False) -> tuple[float, float]:
        """Learning rate and decay factor of the update after so many steps; `aux` asks for what muon leaves to adamw."""
        schedule = self.trial.schedule
        return self.trial.optimizer.peak(aux=aux) * lr_factor(schedule, step, self.total_steps), decay_factor(schedule, step, self.total_steps)

    def trained(self, first_loss: float, loss: float, error: float) -> dict[str, float]:
        """The metrics of an epoch's training, once its steps are counted: means over its steps."""
        if math.isnan(self.first_loss):
            self.first_loss = first_loss
        lr, factor = self.scheduled(self.step)
        decay = self.trial.optimizer.weight_decay * factor
        found = {"train/loss": loss, "train/error": error, "lr": lr, "weight_decay": decay, "intrinsic_lr": lr * decay}
        return {**found, EXPLOITS: float(len(self.population["exploits"]))} if self.population else found

    def divergence(self, train_loss: float, largest: float) -> Reason:
        """Why the trial counts as diverged, empty where it does not.

        Args:
            largest: The largest size of any parameter.
        """
        if reason := not_finite(train_loss) or not_finite(largest):
            return reason
        return "exploded" if train_loss > EXPLODED_LOSS * max(1.0, self.first_loss) or largest > EXPLODED_PARAMETER else ""

    def evaluated(self, logits: Tensor) -> dict[str, float]:
        """The metrics of the validation images; none where there are none."""
        return self._metrics("val", logits, self.data.validation_labels)

    def _metrics(self, part: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
        own = {name.replace("val/", f"{part}/", 1): float(metric(logits, labels)) for name, metric in self.metrics.items()}
        return {f"{part}/loss": float(self.loss(logits, labels)), f"{part}/error": float((logits.argmax(1) != labels).float().mean()), **own}

    @property
    def ends_with_more(self) -> bool:
        """Whether something is looked at only at the trial's end: by probes, or on the test images."""
        return bool(self.trial.probes) or (self.test and len(self.data.test_labels) > 0)

    def concluded(self, model: nn.Module) -> dict[str, float]:
        """What is looked at only at the trial's end, on a model in eval mode: what probes find, and the metrics of the test images."""
        return self._probed(model) | (self._tested(model) if self.test and len(self.data.test_labels) else {})

    def _tested(self, model: nn.Module) -> dict[str, float]:
        bf16 = self.trial.precision == "bf16"
        with torch.autocast(self.data.test_images.device.type, torch.bfloat16, enabled=bf16):
            logits = torch.cat([model(part) for part in torch.split(self.data.test_images, EVALUATION_IMAGES)])
        return self._metrics("test", logits.to(self.dtype), self.data.test_labels)

    def _probed(self, model: nn.Module) -> dict[str, float]:
        images, labels = self.data.validation_images, self.data.validation_labels
        if not len(labels):
            images, labels = self.data.train_images, self.data.train_labels
        return {f"final/{name}/{key}": value for name in self.trial.probes for key, value in probe(name, model, images, labels).items()}

    @property
    def is_last(self) -> bool:
        """Whether the epoch that was just counted is the trial's last."""
        return self.epoch == self.trial.schedule.epochs

    def measured(self, values: Mapping[str, float], samples: Iterable[LayerSample], reason: Reason, seconds: float) -> Progress:
        """An epoch as the world hears of it, with the trial's ending where it ended."""
        found, rows = dict(values), tuple(samples)
        if not reason:
            found |= layer_medians(rows)
            reason = not_finite(found["val/loss"]) if "val/loss" in found else ""
        ending = Ending(Outcome.DIVERGED, reason) if reason else Ending(Outcome.COMPLETED) if self.is_last else None
        return Progress(self.trial_id, Measurement(self.step, self.epoch, finite(found), rows, seconds), ending)

    def state(self) -> dict[str, Any]:
        """What a snapshot holds of it."""
        found = {"order": self.order.get_state(), "augmentation": self.augmentation.get_state(), "first_loss": self.first_loss}
        return {**found, POPULATION: self.population} if self.population else found

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on where a snapshot of the same trial stands.

        Raises:
            ValueError: if it belongs to another trial.
        """
        if snapshot.trial != self.trial.canonical():
            raise ValueError(f"the snapshot belongs to another trial than {self.trial_id}")
        self.order.set_state(snapshot.state["order"])
        self.augmentation.set_state(snapshot.state["augmentation"])
        self.first_loss = snapshot.state["first_loss"]
        self.population = snapshot.state.get(POPULATION, {})
        self.step, self.epoch = snapshot.step, snapshot.epoch


def not_finite(value: float) -> Reason:
    """`nan` or `inf`, or nothing."""
    return "nan" if math.isnan(value) else "inf" if math.isinf(value) else ""
