"""The ways to convolve all slots at once do the same, and the faster one is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from study.engines import convolutions
from study.engines.convolutions import WAYS, Convolution, convolved
from tests.engines.conformance import fused, hold, trials

SLOTS, BATCH = 3, 4


def inputs(module: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, SLOTS * module.in_channels, 6, 6, generator=draw, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(SLOTS, *module.weight.shape, generator=draw, dtype=torch.float64)
    biases = None if module.bias is None else torch.randn(SLOTS, module.out_channels, generator=draw, dtype=torch.float64)
    return images.requires_grad_(), weights.requires_grad_(), biases


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"bias": False, "stride": 2}, {"padding": 1, "dilation": 2}, {"groups": 2, "padding": "same"}])
def test_every_way_is_a_convolution_of_each_slot_by_itself(way: str, options: dict[str, Any]) -> None:
    module = nn.Conv2d(4, 6, 3, **options)
    images, weights, biases = inputs(module)
    out = WAYS[way](images, weights, biases, Convolution.of(module, SLOTS))
    alone = []
    for slot, own in enumerate(images.chunk(SLOTS, dim=1)):
        bias = None if biases is None else biases[slot]
        alone.append(torch.func.functional_call(module, {"weight": weights[slot], **({} if bias is None else {"bias": bias})}, (own,)))
    expected = torch.cat(alone, dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    for mine, its in zip(*(torch.autograd.grad(value.square().sum(), (images, weights)) for value in (out, expected)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_the_faster_way_is_found_backward_included(monkeypatch: pytest.MonkeyPatch) -> None:
    how = Convolution.of(nn.Conv2d(4, 6, 3), SLOTS)
    tensors = inputs(nn.Conv2d(4, 6, 3))
    for slow, fast in (("grouped", "apart"), ("apart", "grouped")):
        calls: list[str] = []

        def timed(name: str, calls: list[str] = calls) -> Any:
            way = WAYS[name]
            return lambda *given: calls.append(name) or way(*given)

        with monkeypatch.context() as patch:
            patch.setattr(convolutions, "WAYS", {name: timed(name) for name in WAYS})
            # The clock goes on by a second in the faster way and by two in the other.
            time = {"now": 0.0}

            def now(device: torch.device, time: dict[str, float] = time, calls: list[str] = calls, slow: str = slow) -> float:
                time["now"] += 2 if calls and calls[-1] == slow else 1
                return time["now"]

            patch.setattr(convolutions, "_now", now)
            assert convolutions._faster(*tensors, how) == fast
            assert calls.count(slow) == calls.count(fast) == convolutions.ROUNDS + 1


def test_trials_whose_slots_are_convolved_apart_are_trained_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "_way", lambda *given: "apart")
    hold(trials(range(0, 16, 5), model={"norm": "batch"}), 4)


def test_on_a_cpu_slots_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "_faster", lambda *given: pytest.fail("timed"))
    fused(trials(range(2), schedule={"epochs": 1}), 2)
    images, weights, biases = inputs(nn.Conv2d(4, 6, 3))
    how = Convolution.of(nn.Conv2d(4, 6, 3), SLOTS)
    assert torch.equal(convolved(images, weights, biases, how), WAYS["grouped"](images, weights, biases, how))
