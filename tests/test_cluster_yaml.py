"""cluster.yaml is what Ray's own cluster launcher accepts, and names only what this project has."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from study.cli import app

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


NAMED = [ROOT / "cluster.yaml", ROOT / "examples" / "services" / "compose.yaml", ROOT / "docs" / "cluster.md"]


@pytest.mark.parametrize("file", NAMED, ids=lambda file: file.name)
def test_every_command_of_study_exists_with_its_options(file: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"(?:^#? +|^|`)study ([a-z]+)([^`\n#|]*)", file.read_text("utf-8"), re.MULTILINE)
    assert {"submit", "doctor"} <= {name for name, _ in used} or file.name == "compose.yaml"
    for name, rest in used:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) <= options, f"study {name}{rest}"


@pytest.mark.parametrize("file", NAMED, ids=lambda file: file.name)
def test_every_file_and_target_that_is_named_exists(file: Path) -> None:
    text = file.read_text("utf-8")
    for name in re.findall(r"\b(?:docs|examples|search_spaces|study)/[\w/]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?<!\w)make ([a-z]+)(?= +(?:starts|docker))", text)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for found in re.findall(r"(?:\.|effective-lr-study)\[([a-z,]+)\]", text):
        assert set(found.split(",")) <= extras.keys()


def test_every_node_has_the_token_and_the_home() -> None:
    config = cluster()
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head", "worker"):
        starts = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0] and "STUDY_HOME=/mnt/studies" in starts[0]
    assert "--volume /mnt/studies:/mnt/studies" in config["docker"]["run_options"]
    assert any("mount " in line and "/mnt/studies" in line for line in config["initialization_commands"])


def test_mlflow_lets_in_who_calls_the_head_by_any_of_its_names() -> None:
    [server] = [line for line in cluster()["head_start_ray_commands"] if "mlflow server" in line]
    assert "--host 127.0.0.1 " in server
    (allowed,) = re.findall(r'--allowed-hosts "([^"]*)"', server)
    shell = "hostname() { case $1 in -f) echo head.internal;; -i) echo 10.0.0.7;; *) echo head;; esac; }; echo "
    hosts = subprocess.run(["sh", "-c", f'{shell}"{allowed}"'], capture_output=True, text=True, check=True).stdout.strip().split(",")
    assert hosts == ["localhost:5000", "127.0.0.1:5000", "head:5000", "head.internal:5000", "10.0.0.7:5000"]
    (address,) = re.findall(r"MLFLOW_TRACKING_URI=(\S+?);", " ".join(cluster()["head_start_ray_commands"]))
    assert address.removeprefix("http://") in hosts


@pytest.mark.long
def test_mlflow_knows_a_name_only_with_its_port() -> None:
    lets_in = pytest.importorskip("mlflow.server.security_utils").is_allowed_host_header
    assert lets_in(["head:5000"], "head:5000")
    assert not lets_in(["head"], "head:5000")
    assert not lets_in(["head:5000"], "elsewhere:5000")


def test_the_comments_for_other_clouds_are_accepted() -> None:
    """The provider lines of the comments, put in place of the one for AWS."""
    providers = re.findall(r"^# (?:[A-Z][\w ]+): (\{type: \w+,.*?\})(?:,|$)", (ROOT / "cluster.yaml").read_text(), re.MULTILINE)
    assert {yaml.safe_load(text)["type"] for text in providers} == {"gcp", "azure", "local"}
    prepared = accept(cluster())
    for provider in map(yaml.safe_load, providers):
        if provider["type"] == "local":
            config = {key: value for key, value in cluster().items() if key not in ("available_node_types", "head_node_type", "max_workers")}
            accept({**config, "provider": provider, "auth": {**config["auth"], "ssh_private_key": "~/.ssh/KEY.pem"}})
        else:
            pytest.importorskip("ray.autoscaler._private.util").validate_config({**prepared, "provider": provider})


def test_the_services_are_on_loopback_and_make_the_tables_once() -> None:
    services = yaml.safe_load((ROOT / "examples" / "services" / "compose.yaml").read_text())["services"]
    assert [port for service in services.values() for port in service.get("ports", ())] == ["${MLFLOW_ADDRESS:-127.0.0.1}:5000:5000"]
    assert services["mlflow"]["depends_on"] == {"tables": {"condition": "service_completed_successfully"}}
    assert "db upgrade" in services["tables"]["command"][-1]
    assert "${POSTGRES_PASSWORD:?" in services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert {"mlflow", "psycopg"} <= pins().keys()


def test_nodes_have_the_project_where_they_install_it_from() -> None:
    mounts = cluster()["file_mounts"]
    folder = re.search(r"cd ~/(\S+)", " ".join(cluster()["setup_commands"]))
    assert folder is not None
    assert mounts[f"/home/ray/{folder[1]}"] == "."


def test_images_hold_the_pinned_ray() -> None:
    docker = cluster()["docker"]
    assert {image.split(":")[1].split("-")[0] for image in (docker["head_image"], docker["worker_image"])} == {pins()["ray"]}


def test_the_image_of_the_services_copies_files_that_are_in_its_folder() -> None:
    file = ROOT / "examples" / "services" / "compose.yaml"
    build = yaml.safe_load(file.read_text("utf-8"))["x-mlflow"]["build"]
    copied = re.findall(r"^COPY (\S+)", build["dockerfile_inline"], re.MULTILINE)
    assert copied and all((file.parent / build["context"] / name).is_file() for name in copied)
