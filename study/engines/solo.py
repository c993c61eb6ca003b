"""SoloEngine: one trial with ordinary modules and torch.optim. It is the definition of a trial, and so the oracle of every other engine.

epoch = steps over one shuffled pass ──> BatchNorm statistics ──> validation ──> Measurement (and Ending, when it is the last)
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from study.engines.course import EVALUATION_IMAGES, Course, sub_seed
from study.engines.engine import Snapshot
from study.engines.moments import moments_of, restore_moments
from study.measurement import LayerSample, Progress
from study.training.decay import absent_places, decay_plan, optimizer_for
from study.training.effective_lr import EffectiveLR
from study.training.gains import by_place
from study.training.models import build_model
from study.training.plans import roles_on
from study.training.schedules import build_scheduler, restore_schedule
from study.trial import TrialSpec

STATISTICS_IMAGES = 512
"""Training images from which BatchNorm statistics are estimated before an evaluation."""


class SoloEngine:
    """Trains one trial at a time, on one thread where it trains on the CPU: another number of threads changes bits."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._trial: _SoloTrial | None = None

    def admit(self, trial_id: str, trial: TrialSpec, snapshot: Snapshot | None = None, *, test: bool = False) -> None:
        """Takes a trial in, at its beginning or where a snapshot left it; `test` measures it on the test images, too, once it ends.

        Raises:
            InputError: if data, model or policy do not fit together.
            ValueError: if the snapshot belongs to another trial.
        """
        with on_one_thread():
            self._trial = _SoloTrial(trial_id, trial, self._device, test)
            if snapshot is not None:
                self._trial.restore(snapshot)

    def advance(self) -> list[Progress]:
        """Trains one epoch."""
        with on_one_thread():
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

    def __init__(self, trial_id: str, trial: TrialSpec, device: torch.device, test: bool) -> None:
        self.trial, self.device = trial, device
        self.course = Course(trial_id, trial, device, test=test)
        self.data = self.course.data
        self.model: nn.Module = initial_model(trial, self.course, device)
        self.parameters = list(self.model.parameters())
        self.roles = roles_on(self.model, self.data.train_images, trial.model.places)
        absent_places(self.roles, trial.optimizer.gamma)
        self.optimizer = optimizer_for(self.model, decay_plan(self.roles, trial.optimizer), trial.optimizer, fused=True)
        self.scheduler = build_scheduler(self.optimizer, trial.schedule, self.course.total_steps)
        self.tracer = EffectiveLR(self.model, self.optimizer, trial.trace.every, roles=self.roles)
        self.dropout = _rng_state(sub_seed(trial.seed, "dropout"), device)

    def advance(self) -> Progress:
        """Trains one epoch and measures."""
        start = time.perf_counter()
        values, samples = self._train_epoch()
        self.course.epoch += 1
        reason = self.course.divergence(values["train/loss"], max(float(parameter.detach().abs().max()) for parameter in self.parameters))
        if not reason:
            values |= self._evaluate() | by_place(self.tracer.gains().values())
            values |= self._conclude() if self.course.is_last else {}
        return self.course.measured(values, samples, reason, time.perf_counter() - start)

    def _train_epoch(self) -> tuple[dict[str, float], list[LayerSample]]:
        losses, wrong = [], []
        samples: list[LayerSample] = []
        self.model.train()
        with _own_randomness(self):
            for indices in self.course.batches():
                images, labels = self.course.batch(indices)
                loss, logits = self._step(images, labels)
                losses.append(loss)
                wrong.append(logits.argmax(1) != labels)
                self.course.step += 1
                if sample := self.tracer.sample():
                    samples += sample.values()
        error = float(torch.stack(wrong).to(self.course.dtype).mean())
        return self.course.trained(float(losses[0]), float(torch.stack(losses).mean()), error), samples

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None  # optimizer.zero_grad() does the same, and takes twenty times as long
        with self._autocast():
            logits = self.model(images)
            loss = self.course.loss(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.trial.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.trial.optimizer.clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach(), logits.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.trial.precision == "bf16" else nullcontext()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self._estimate_statistics()
        self.model.eval()
        if not len(self.data.validation_labels):
            return {}
        return self.course.evaluated(self._logits(self.data.validation_images))

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
            return torch.cat([self.model(part) for part in torch.split(images, EVALUATION_IMAGES)]).to(self.course.dtype)

    @torch.no_grad()
    def _conclude(self) -> dict[str, float]:
        self.model.eval()
        return self.course.concluded(self.model)

    def snapshot(self) -> Snapshot:
        """All state that the next epoch depends on."""
        state = {
            "model": self.model.state_dict(),
            "moments": moments_of(self.model, self.optimizer),
            "tracer": self.tracer.state_dict(),
            "dropout": self.dropout,
            **self.course.state(),
        }
        return Snapshot(self.trial.canonical(), self.course.step, self.course.epoch, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on where a snapshot of the same trial stands."""
        self.course.restore(snapshot)
        state = snapshot.state
        self.model.load_state_dict(state["model"])
        restore_moments(self.model, self.optimizer, state["moments"], self.course.step)
        restore_schedule(self.scheduler, self.course.step)
        self.tracer.load_state_dict(state["tracer"])
        self.dropout = state["dropout"]


def initial_model(trial: TrialSpec, course: Course, device: torch.device) -> nn.Module:
    """A trial's network as its seed begins it."""
    with torch.random.fork_rng(devices=_cuda(device)):
        torch.manual_seed(sub_seed(trial.seed, "init"))
        model = build_model(trial.model, course.data.shape, course.data.num_classes)
    return model.to(device, course.dtype)


def give_back_memory() -> None:
    """Lets go of memory that torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
def on_one_thread() -> Iterator[None]:
    """Holds torch to one thread meanwhile: another number of threads changes bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
