"""Stack: named tensors of many trials, a row for each: a load, a snapshot, a fork is one row copied.

    name          tensor [rows, *shape]
    conv.weight   ████ ████ ████ ────     prefix(2) views the first two rows: what is trained
    bn.weight     █    █    █    ─

Kernels of convolutions lie channels-last, as grouped convolutions want them: all rows of one are a kernel of rows x outputs channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Stack:
    """Rows of tensors; every row has the names, shapes and dtypes of the tensors that it was made like."""

    def __init__(self, like: Mapping[str, Tensor], rows: int) -> None:
        self.tensors = {name: _stacked(value, rows) for name, value in like.items()}

    def load(self, row: int, values: Mapping[str, Tensor]) -> None:
        """Overwrites a row."""
        for name, tensor in self.tensors.items():
            tensor[row].copy_(values[name])

    def row(self, row: int) -> dict[str, Tensor]:
        """A copy of a row, contiguous."""
        return {name: tensor[row].clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}

    def move(self, source: int, target: int) -> None:
        """Copies one row over another."""
        for tensor in self.tensors.values():
            tensor[target].copy_(tensor[source])

    def clear(self, row: int) -> None:
        """Fills a row with zeros."""
        for tensor in self.tensors.values():
            tensor[row].zero_()

    def prefix(self, rows: int) -> dict[str, Tensor]:
        """Views of the first rows."""
        return {name: tensor[:rows] for name, tensor in self.tensors.items()}


def _stacked(value: Tensor, rows: int) -> Tensor:
    if value.ndim != 4:
        return torch.zeros((rows, *value.shape), dtype=value.dtype, device=value.device)
    outputs, *rest = value.shape
    flat = torch.empty((rows * outputs, *rest), dtype=value.dtype, device=value.device, memory_format=torch.channels_last)
    return flat.zero_().unflatten(0, (rows, outputs))  # type: ignore[no-any-return,no-untyped-call]
