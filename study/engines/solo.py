"""SoloEngine: one trial with ordinary modules and torch.optim. It is the definition of a trial, and so the oracle of every other engine.

epoch = steps over one shuffled pass ──> BatchNorm statistics ──> validation ──> Measurement (and Ending, when it is the last)
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from study.engines.engine import Progress, Snapshot
from study.measurement import Ending, LayerSample, Measurement, Outcome, Reason, finite, layer_medians
from study.training.data import Data, augmented, batches, load_data
from study.training.decay import absent_places, decay_plan, optimizer_for
from study.training.effective_lr import EffectiveLR
from study.training.gains import by_place
from study.training.imported import user_function
from study.training.losses import loss_function
from study.training.models import build_model
from study.training.plans import roles_on
from study.training.probes import probe
from study.training.schedules import build_scheduler, decay_factor
from study.trial import TrialSpec

EXPLODED_LOSS = 1e3
"""An interval's mean train loss above this many times max(1, first loss) has exploded."""

EXPLODED_PARAMETER = 1e15
"""A parameter of larger size has exploded."""

STATISTICS_IMAGES = 512
"""Training images from which BatchNorm statistics are estimated before an evaluation."""

EVALUATION_IMAGES = 1024
"""Images that go through the model at once when it is evaluated."""

Metric = Callable[[Tensor, Tensor], float]


def sub_seed(seed: int, purpose: str) -> int:
    """An independent seed for one purpose of a trial."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


class SoloEngine:
    """Trains one trial at a time, on one thread where it trains on the CPU: another number of threads changes bits."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._trial: _SoloTrial | None = None

    def admit(self, trial_id: str, trial: TrialSpec, snapshot: Snapshot | None = None) -> None:
        """Takes a trial in, at its beginning or where a snapshot left it.

        Raises:
            InputError: if data, model or policy do not fit together.
            ValueError: if the snapshot belongs to another trial.
        """
        with _one_thread():
            self._trial = _SoloTrial(trial_id, trial, self._device)
            if snapshot is not None:
                self._trial.restore(snapshot)

    def advance(self) -> list[Progress]:
        """Trains one epoch."""
        with _one_thread():
            return [self._admitted().advance()]

    def snapshot(self, trial_id: str) -> Snapshot:
        """The trial's present state, between two epochs."""
        return self._admitted().snapshot()

    def weights(self, trial_id: str) -> Mapping[str, Tensor]:
        """The trial's present parameters and buffers by name, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self._admitted().model.state_dict().items()}

    def release(self, trial_id: str) -> None:
        """Forgets the trial."""
        self._trial = None

    def _admitted(self) -> "_SoloTrial":
        assert self._trial is not None, "no trial is admitted"
        return self._trial


class _SoloTrial:
    """One trial between its first step and its last."""

    def __init__(self, trial_id: str, trial: TrialSpec, device: torch.device) -> None:
        self.trial_id, self.trial, self.device = trial_id, trial, device
        self.dtype = torch.float64 if trial.precision == "float64" else torch.float32
        self.data: Data = load_data(trial.data).to(device, self.dtype)
        with torch.random.fork_rng(devices=_cuda(device)):
            torch.manual_seed(sub_seed(trial.seed, "init"))
            model = build_model(trial.model, self.data.shape, self.data.num_classes)
        self.model: nn.Module = model.to(device, self.dtype)
        self.roles = roles_on(self.model, self.data.train_images, trial.model.places)
        absent_places(self.roles, trial.optimizer.gamma)
        self.optimizer = optimizer_for(self.model, decay_plan(self.roles, trial.optimizer), trial.optimizer, fused=True)
        self.total_steps = trial.schedule.epochs * self.steps_per_epoch
        self.scheduler = build_scheduler(self.optimizer, trial.schedule, self.total_steps)
        self.tracer = EffectiveLR(self.model, self.optimizer, trial.trace.every, roles=self.roles)
        self.loss = loss_function(trial.loss)
        self.metrics: dict[str, Metric] = {f"val/{path.rpartition(':')[2]}": user_function(path) for path in trial.metrics}
        self.order = torch.Generator().manual_seed(sub_seed(trial.seed, "order"))
        self.augmentation = torch.Generator(device).manual_seed(sub_seed(trial.seed, "augmentation"))
        self.dropout = _rng_state(sub_seed(trial.seed, "dropout"), device)
        self.step = self.epoch = 0
        self.first_loss = math.nan

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the images that fill no batch are left out."""
        return len(self.data.train_labels) // self.trial.data.batch_size

    def advance(self) -> Progress:
        """Trains one epoch and measures."""
        start = time.perf_counter()
        values, samples = self._train_epoch()
        self.epoch += 1
        reason = self._divergence(values["train/loss"])
        if not reason:
            values |= self._evaluate()
            values |= by_place(self.tracer.gains().values()) | layer_medians(samples)
            reason = _not_finite(values["val/loss"]) if "val/loss" in values else ""
        ending = Ending(Outcome.DIVERGED, reason) if reason else None
        if ending is None and self.epoch == self.trial.schedule.epochs:
            ending = Ending(Outcome.COMPLETED)
            values |= self._probe()
        measurement = Measurement(self.step, self.epoch, finite(values), tuple(samples), time.perf_counter() - start)
        return Progress(self.trial_id, measurement, ending)

    def _train_epoch(self) -> tuple[dict[str, float], list[LayerSample]]:
        losses, wrong = [], []
        samples: list[LayerSample] = []
        self.model.train()
        with _own_randomness(self):
            for indices in batches(len(self.data.train_labels), self.trial.data.batch_size, self.order):
                images, labels = self.data.train_images[indices], self.data.train_labels[indices]
                loss, logits = self._step(augmented(images, self.trial.data.augment, self.augmentation), labels)
                losses.append(loss)
                wrong.append(logits.argmax(1) != labels)
                self.step += 1
                if sample := self.tracer.sample():
                    samples += sample.values()
        if math.isnan(self.first_loss):
            self.first_loss = float(losses[0])
        lr = self.optimizer.param_groups[0]["lr"]
        decay = self.trial.optimizer.weight_decay * decay_factor(self.trial.schedule, self.step, self.total_steps)
        self_reported = {"lr": lr, "weight_decay": decay, "intrinsic_lr": lr * decay}
        return {
            "train/loss": float(torch.stack(losses).mean()),
            "train/error": float(torch.stack(wrong).to(self.dtype).mean()),
            **self_reported,
        }, samples

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        with self._autocast():
            logits = self.model(images)
            loss = self.loss(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.trial.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.trial.optimizer.clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach(), logits.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.trial.precision == "bf16" else nullcontext()

    def _divergence(self, train_loss: float) -> Reason:
        """Why the trial counts as diverged; the same rule in every engine."""
        if reason := _not_finite(train_loss):
            return reason
        largest = max(float(parameter.detach().abs().max()) for parameter in self.model.parameters())
        if reason := _not_finite(largest):
            return reason
        exploded = train_loss > EXPLODED_LOSS * max(1.0, self.first_loss) or largest > EXPLODED_PARAMETER
        return "exploded" if exploded else ""

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self._estimate_statistics()
        self.model.eval()
        labels = self.data.validation_labels
        if not len(labels):
            return {}
        logits = self._logits(self.data.validation_images)
        own = {name: float(metric(logits, labels)) for name, metric in self.metrics.items()}
        return {"val/loss": float(self.loss(logits, labels)), "val/error": float((logits.argmax(1) != labels).float().mean()), **own}

    def _estimate_statistics(self) -> None:
        """Replaces every BatchNorm's running statistics by those of the first training images under the present weights."""
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
        if not norms:
            return
        self.model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None
        with self._autocast():
            self.model(self.data.train_images[:STATISTICS_IMAGES])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            return torch.cat([self.model(part) for part in torch.split(images, EVALUATION_IMAGES)]).to(self.dtype)

    @torch.no_grad()
    def _probe(self) -> dict[str, float]:
        images, labels = self.data.validation_images, self.data.validation_labels
        if not len(labels):
            images, labels = self.data.train_images, self.data.train_labels
        self.model.eval()
        found: dict[str, float] = {}
        for name in self.trial.probes:
            found |= {f"final/{name}/{key}": value for key, value in probe(name, self.model, images, labels).items()}
        return found

    def snapshot(self) -> Snapshot:
        """All state that the next epoch depends on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.last_epoch,
            "tracer": self.tracer.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
            "dropout": self.dropout,
            "first_loss": self.first_loss,
        }
        return Snapshot(self.trial.canonical(), self.step, self.epoch, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on where a snapshot of the same trial stands."""
        if snapshot.trial != self.trial.canonical():
            raise ValueError(f"the snapshot belongs to another trial than {self.trial_id}")
        state = snapshot.state
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]
        self.tracer.load_state_dict(state["tracer"])
        self.order.set_state(state["order"])
        self.augmentation.set_state(state["augmentation"])
        self.dropout = state["dropout"]
        self.first_loss = state["first_loss"]
        self.step, self.epoch = snapshot.step, snapshot.epoch


def _not_finite(value: float) -> Reason:
    return "nan" if math.isnan(value) else "inf" if math.isinf(value) else ""


def _cuda(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _rng_state(seed: int, device: torch.device) -> list[Tensor]:
    """The states of torch's global generators after seeding: the CPU's, and the device's where it has its own."""
    with torch.random.fork_rng(devices=_cuda(device)):
        torch.manual_seed(seed)
        return _global_states(device)


def _global_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in _cuda(device))]


@contextmanager
def _own_randomness(trial: _SoloTrial) -> Iterator[None]:
    """Lends the trial torch's global generators, which dropout draws from, and gives them back untouched."""
    with torch.random.fork_rng(devices=_cuda(trial.device)):
        torch.set_rng_state(trial.dropout[0])
        for index, state in zip(_cuda(trial.device), trial.dropout[1:], strict=True):
            torch.cuda.set_rng_state(state, index)
        yield
        trial.dropout = _global_states(trial.device)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
