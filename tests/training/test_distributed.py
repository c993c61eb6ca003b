"""In training over several processes, every process reads the same traces as one process would."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from study.errors import ModelError
from study.training.effective_lr import EffectiveLR

PROCESSES = 2

Numbers = dict[str, list[float]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))


def traced(model: nn.Module) -> Numbers:
    """Every layer's norms, rotation and rate after two steps, and the gains' sizes."""
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    tracer = EffectiveLR(model, optimizer, every=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    rows = (tracer.sample() or {}).items()
    weights = {layer: [row.weight_norm, row.grad_norm, row.rotation, row.coordinate_rate or 0.0, float(row.scale_invariant)] for layer, row in rows}
    return weights | {name: [gain.rms, gain.distance] for name, gain in tracer.gains().items()}


def process(rank: int, folder: str) -> None:
    """One of the processes; writes down what it saw."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    sharded = net()
    fully_shard(sharded)
    found: dict[str, object] = {"replicated": traced(DistributedDataParallel(net())), "sharded": traced(sharded)}
    try:
        traced(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    except ModelError as error:
        found["flattened"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_every_process_reads_what_one_process_would(way: str, seen: list[dict[str, object]]) -> None:
    alone = traced(net())
    assert alone["0"][-1] == 1.0
    for found in seen:
        numbers = found[way]
        assert isinstance(numbers, dict)
        assert numbers.keys() == alone.keys()
        for layer, values in alone.items():
            assert numbers[layer] == pytest.approx(values, rel=1e-5)


def test_flattened_parameters_are_refused_with_the_remedy(seen: list[dict[str, object]]) -> None:
    for found in seen:
        assert "flattens several layers" in str(found["flattened"]) and "fully_shard" in str(found["flattened"])
