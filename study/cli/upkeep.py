"""Commands around studies: the installation is checked, the MLflow UI opened, a study removed."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from study import errors, views
from study.cli.answers import answer, prints_on_stderr
from study.cli.arguments import Address, Home, Json, Name, TrackingUri
from study.home import home_path, tracking_uri_for


def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Remove a study: its folder and its MLflow runs, after asking. A study that runs is refused.

    MLflow keeps deleted runs, and their artifacts, until `mlflow gc`.
    """
    from study.removal import leavings, remove

    with prints_on_stderr():
        left = leavings(home_path(home), name, tracking_uri)
        if not yes and (as_json or not sys.stdin.isatty()):
            raise errors.InputError("nobody can be asked here whether to remove it", where=name, remedy=f"add --yes to remove {left}")
        if not yes and not _confirmed(f"Remove {left}?"):
            print("nothing was removed", file=sys.stderr)
            raise typer.Exit(0)
        remove(left)
    answer(as_json, left.document(), f"removed {left}")


def _confirmed(question: str) -> bool:
    """Asks on stderr; an end of input is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


def ui(
    home: Home = None,
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; anything but loopback shows your results to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI on a study home. Ctrl-C ends it."""
    from study.ui import show

    show(tracking_uri_for(home_path(home), tracking_uri), host, port)


def doctor(home: Home = None, tracking_uri: TrackingUri = None, address: Address = None, as_json: Json = False) -> None:
    """Check the installation, the store, the cluster and the GPU, and say what to do. With --address, of the head of that cluster."""
    from study.doctor import examine, examine_cluster

    base = home_path(home)
    with prints_on_stderr():
        checks = [
            asdict(check)
            for check in (
                examine_cluster(address, str(home or ""), tracking_uri)
                if address is not None
                else examine(base, tracking_uri_for(base, tracking_uri))
            )
        ]
    failed = any(check["state"] == "fail" for check in checks)
    answer(as_json, {"ok": not failed, "checks": checks}, views.checks_view(checks))
    raise typer.Exit(int(failed))
