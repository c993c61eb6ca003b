"""Tape: what a CUDA graph is, on a CPU. Every operation is written down with the very tensors that it read and wrote, and done again.

As in a graph, nothing that Python decided is decided again, a tensor that was not told to change holds what it held, and recording leaves
no trace in what was there before. So a step that replays rightly from a tape does from a graph, as far as its own code goes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from study.engines.steps import Taken


class Tape:
    """A recorder, which counts what it recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing is different."""
        yield

    def record(self, function: Callable[[], Taken]) -> tuple[Taken, Callable[[], None]]:
        """What the function returns, and what does its operations again."""
        self.recorded += 1
        with _Writing() as written:
            taken = function()
        written.undo()

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for again in written.operations:
                    again()

        return taken, replay


class _Writing(TorchDispatchMode):
    """Writes down the operations of a block, and what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self._own: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FORBIDDEN:
            raise RuntimeError(f"{function} moves a value between Python and the GPU, which a graph cannot")
        if kwargs.get("device") is None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{function} makes a tensor without saying where, which on a GPU is the wrong place")
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given):
                    self._keep(tensor)
        found = function(*args, **kwargs)
        fresh = [value for value in tree_leaves(found) if isinstance(value, Tensor) and not self._is_old(value, (args, kwargs))]
        for value in fresh:
            self._own[value.untyped_storage().data_ptr()] = value
        self.operations.append(lambda: _again(function, args, kwargs, found, fresh))
        return found

    def _is_old(self, value: Tensor, given: Any) -> bool:
        """Whether it lies in the memory of something that the operation was given."""
        places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        return value.untyped_storage().data_ptr() in places

    def _keep(self, tensor: Any) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own and place not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[place] = (whole, whole.clone())

    def undo(self) -> None:
        """Puts back what the block wrote over."""
        for whole, before in self._before.values():
            whole.copy_(before)


FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}
"""What needs a number in Python, or brings one from there."""


def _again(function: Any, args: Any, kwargs: Any, found: Any, fresh: list[Tensor]) -> None:
    """An operation once more; its results go where they went."""
    places = {id(tensor) for tensor in fresh}
    for place, value in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
        if id(place) in places:
            place.copy_(value)
