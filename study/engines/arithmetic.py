"""Arithmetic: one model's forward pass over many slots at once, each with parameters and images of its own.

    converted   torch.fx reads the model; convolutions become grouped ones, matrix products batched ones, the rest goes through vmap
    looped      the ordinary module, slot after slot, with each slot's rows as its parameters

Rows are tensors [slots, batch, ...]. What any slot computes depends on its own row alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

Rows = Mapping[str, Tensor]


class Mode(StrEnum):
    """What a pass is for."""

    TRAIN = "train"
    ESTIMATE = "estimate"
    """Evaluation, except that norms replace their running statistics by those of this batch."""
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Pass:
    """What a forward pass works on."""

    values: Rows
    """Parameters and buffers by name, [slots, *shape]; running statistics are written in place."""
    mode: Mode
    generators: Sequence[torch.Generator] = ()
    """One for each slot: draws its dropout. Empty outside of training."""


class Arithmetic(Protocol):
    """A model over slots."""

    name: str
    draws: bool
    """Whether training draws random numbers, as dropout does."""

    def __call__(self, images: Tensor, run: Pass) -> Tensor:
        """Images [slots, batch, ...] to logits [slots, batch, classes]."""


def reset_statistics(values: Rows) -> None:
    """Running statistics of norms as they begin, for an estimate of their own: the mean over the batches of one pass."""
    for name, value in values.items():
        match name.rpartition(".")[2]:
            case "running_mean" | "num_batches_tracked":
                value.zero_()
            case "running_var":
                value.fill_(1)


class Looped:
    """The ordinary module, slot after slot: the floor, and right for every model that keeps no state outside its buffers."""

    name = "looped"
    draws = True  # as far as anybody knows

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, images: Tensor, run: Pass) -> Tensor:
        """One slot after the other."""
        self._model.train(run.mode is Mode.TRAIN)
        norms = [module for module in self._model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        if run.mode is Mode.ESTIMATE:
            for norm in norms:
                norm.train()
                norm.momentum = None
            reset_statistics(run.values)
        try:
            return torch.stack([self._one(slot, images[slot], run) for slot in range(len(images))])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def _one(self, slot: int, images: Tensor, run: Pass) -> Tensor:
        # Stacked kernels lie channels-last, ordinary ones do not.
        own = {name: value[slot].contiguous() for name, value in run.values.items()}
        if not run.generators:
            return functional_call(self._model, own, (images,))  # type: ignore[no-any-return]
        # Dropout in somebody's module draws from torch's global generator: the slot's own takes its place meanwhile.
        generator, everybodys = run.generators[slot], _global_generator(images.device)
        before = everybodys.get_state()
        everybodys.set_state(generator.get_state())
        try:
            return functional_call(self._model, own, (images,))  # type: ignore[no-any-return]
        finally:
            generator.set_state(everybodys.get_state())
            everybodys.set_state(before)


def _global_generator(device: torch.device) -> torch.Generator:
    """What operations on a device draw from unless they are told."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
