"""Stack: what is loaded into a row is what is read from it, and no other row notices."""

import pytest
import torch
from torch import Tensor, nn

from study.engines.stack import Stack

ROWS = 4


def values(seed: int) -> dict[str, Tensor]:
    """A network's state: kernels, vectors, statistics, a count, a single number."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, (3, 1), groups=2), nn.Flatten(), nn.Linear(4, 2))
    drawn = {name: torch.randn(value.shape) if value.is_floating_point() else value + seed for name, value in model.state_dict().items()}
    return {**drawn, "double": torch.randn(2, dtype=torch.float64)}


@pytest.fixture
def stack() -> Stack:
    made = Stack(values(0), ROWS)
    for row in range(ROWS):
        made.load(row, values(row))
    return made


def assert_row(stack: Stack, row: int, expected: dict[str, Tensor]) -> None:
    found = stack.row(row)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype and found[name].is_contiguous(), name


def test_a_row_is_what_was_loaded(stack: Stack) -> None:
    for row in range(ROWS):
        assert_row(stack, row, values(row))


def test_a_row_read_is_a_copy(stack: Stack) -> None:
    for value in stack.row(1).values():
        value.zero_()
    assert_row(stack, 1, values(1))


def test_a_new_stack_is_zero() -> None:
    for tensor in Stack(values(3), 2).tensors.values():
        assert not tensor.any()


def test_moving_copies_one_row_over_another(stack: Stack) -> None:
    stack.move(3, 1)
    for row, source in enumerate((0, 3, 2, 3)):
        assert_row(stack, row, values(source))


def test_clearing_leaves_nothing_of_a_row_not_even_nan(stack: Stack) -> None:
    stack.load(2, {name: torch.full_like(value, float("nan")) if value.is_floating_point() else value for name, value in values(2).items()})
    stack.clear(2)
    assert_row(stack, 2, {name: torch.zeros_like(value) for name, value in values(2).items()})
    assert_row(stack, 1, values(1))


def test_a_prefix_is_a_view(stack: Stack) -> None:
    for tensor in stack.prefix(2).values():
        assert len(tensor) == 2
        tensor.zero_()
    assert_row(stack, 1, {name: torch.zeros_like(value) for name, value in values(1).items()})
    assert_row(stack, 2, values(2))


def test_kernels_of_all_rows_are_one_kernel_that_lies_channels_last(stack: Stack) -> None:
    for name, value in values(0).items():
        if value.ndim == 4:
            for rows in (ROWS, 2):
                flat = stack.prefix(rows)[name].flatten(0, 1)
                assert flat.is_contiguous(memory_format=torch.channels_last), name
                assert flat.data_ptr() == stack.tensors[name].data_ptr(), "flattening copies nothing"
        else:
            assert stack.tensors[name].is_contiguous(), name
