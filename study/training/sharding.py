"""Sharding: models and parameters as distributed training holds them, for those who only look on.

DistributedDataParallel, torch.compile ──bare_model──> the module inside
fully_shard's parameter ──local──> the part of it that this process holds ──summed_over_shards──> numbers of the whole
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from study.errors import ModelError


def bare_model(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel.

    Raises:
        ModelError: if the model's parameters are flattened, as FullyShardedDataParallel does: no layer's weights are then whole.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        else:
            break
    _check_not_flattened(model)
    return model


def _check_not_flattened(model: nn.Module) -> None:
    # Whoever flattens has imported it; importing it here takes a second.
    flattening = sys.modules.get("torch.distributed.fsdp")
    if flattening is not None and any(isinstance(module, flattening.FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "FullyShardedDataParallel flattens several layers into one parameter, of which no layer's norm can be read",
            where="model",
            remedy="shard it with torch.distributed.fsdp.fully_shard, which keeps the parameters apart",
        )


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    part: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from the processes that hold it; any other tensor as it is."""
    gathered: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def summed_over_shards(parameters: Sequence[Tensor], numbers: Sequence[Tensor]) -> list[list[float]]:
    """Each parameter's numbers, added up over the processes that hold parts of it.

    All processes must call it with the same parameters. One transfer from the device, and one exchange for each way of sharding.

    Args:
        numbers: For each parameter a vector of what its local part adds.
    """
    found: list[list[float]] = [[] for _ in parameters]
    groups: dict[object, list[int]] = {}
    for index, parameter in enumerate(parameters):
        way = (parameter.device_mesh, parameter.placements) if _is_sharded(parameter) else parameter.device  # type: ignore[attr-defined]
        groups.setdefault((way, len(numbers[index])), []).append(index)
    for members in groups.values():
        table = _added_up(torch.stack([numbers[index] for index in members]), parameters[members[0]])
        for index, row in zip(members, table.tolist(), strict=True):
            found[index] = row
    return found


def _added_up(table: Tensor, parameter: Tensor) -> Tensor:
    """The sum of a table over the processes among which a parameter is sharded."""
    if not _is_sharded(parameter):
        return table
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in parameter.placements]  # type: ignore[attr-defined]
    total: Tensor = DTensor.from_local(table, parameter.device_mesh, placements, run_check=False).full_tensor()  # type: ignore[attr-defined]
    return total


def _is_sharded(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
