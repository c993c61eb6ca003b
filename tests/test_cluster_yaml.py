"""cluster.yaml is what Ray's own cluster launcher accepts, and names only what this project has."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def accept(config: dict[str, Any]) -> dict[str, Any]:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs ray[default]")
    prepared: dict[str, Any] = util.prepare_config(config)
    util.validate_config(prepared)
    return prepared


def test_ray_accepts_the_file() -> None:
    assert accept(cluster())["cluster_name"] == "effective-lr-study"


@pytest.mark.parametrize("path", ["max_worker", "auth.ssh_usr", "docker.imag", "available_node_types.gpu_worker.min_worker"])
def test_ray_rejects_a_misspelt_key(path: str) -> None:
    config = cluster()
    *sections, key = path.split(".")
    branch = config
    for section in sections:
        branch = branch[section]
    branch[key] = 1
    with pytest.raises(Exception, match=rf"Additional properties are not allowed \('{key}' was unexpected\)"):
        accept(config)


def test_the_head_has_no_gpu_and_workers_come_only_for_work() -> None:
    types = cluster()["available_node_types"]
    assert types[cluster()["head_node_type"]]["resources"]["GPU"] == 0
    workers = [kind for name, kind in types.items() if name != cluster()["head_node_type"]]
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 and kind["resources"]["GPU"] >= 1 for kind in workers)


def test_nodes_install_extras_that_exist_with_the_pinned_versions() -> None:
    install = " ".join(cluster()["setup_commands"])
    extras = re.search(r"'\.\[([a-z,]+)\]'", install)
    constraints = re.search(r"--constraint (\S+)", install)
    assert extras is not None
    assert constraints is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= known.keys()
    assert (ROOT / constraints[1]).is_file()


def test_nodes_have_the_project_where_they_install_it_from() -> None:
    mounts = cluster()["file_mounts"]
    folder = re.search(r"cd ~/(\S+)", " ".join(cluster()["setup_commands"]))
    assert folder is not None
    assert mounts == {f"/home/ray/{folder[1]}": "."}


def test_images_hold_the_pinned_ray() -> None:
    docker = cluster()["docker"]
    assert {image.split(":")[1].split("-")[0] for image in (docker["head_image"], docker["worker_image"])} == {pins()["ray"]}
