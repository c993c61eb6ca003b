"""Commands that follow studies, here or on a cluster: which there are, where they stand, what they print; one may be stopped."""

import sys
from typing import Annotated

import typer

from study import errors, views
from study.cli.answers import answer
from study.cli.arguments import Address, Home, Json, Name
from study.home import StudyFolder, home_path
from study.tuning.status import status as status_of


def list_studies(home: Home = None, address: Address = None, as_json: Json = False) -> None:
    """List the studies of a home, or those that were submitted to a cluster."""
    if address is not None:
        from study.cluster.client import connect

        cluster = connect(address)
        submitted = cluster.statuses(cluster.latest_of_each())
        answer(as_json, submitted, views.studies_table(submitted) if submitted else f"no studies were submitted to {cluster.url}")
        return
    base, found = home_path(home), []
    for folder in StudyFolder.all(base):
        try:
            found.append(status_of(folder))
        except errors.StudyError as error:
            print(f"{folder.path} is left out: {error}", file=sys.stderr)
    answer(as_json, found, views.studies_table(found) if found else f"no studies in {base}; start one with: study run SPEC")


def status(name: Name, home: Home = None, address: Address = None, as_json: Json = False) -> None:
    """Show where a study stands, whether or not it runs."""
    if address is None:
        found = status_of(StudyFolder.find(home_path(home), name))
    else:
        from study.cluster.client import connect

        cluster = connect(address)
        [found] = cluster.statuses([cluster.latest(name)])
    answer(as_json, found, views.study_view(found))


def logs(
    name: Name, address: Address = None, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends.")] = False, home: Home = None
) -> None:
    """Show what a study printed that was submitted to a cluster."""
    if address is None:
        folder = StudyFolder.find(home_path(home), name)
        message = "a study that runs on this machine prints in the terminal that started it, and keeps no log"
        raise errors.NotFound(message, where=str(folder.path), remedy="`study status` shows where it stands; for one on a cluster, give --address")
    from study.cluster.client import connect

    cluster = connect(address)
    try:
        for text in cluster.logs(cluster.latest(name), follow):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(f"{name} goes on", file=sys.stderr)


def stop(name: Name, address: Address = None, home: Home = None, as_json: Json = False) -> None:
    """Stop a study that runs here or on a cluster: its running trials report, their MLflow runs are closed, and it can be gone on with."""
    print(f"stopping {name}: waiting for its trials to report", file=sys.stderr)
    if address is None:
        folder = StudyFolder.find(home_path(home), name)
        folder.stop()
        found, again = status_of(folder), "the same `study run` goes on with it"
    else:
        from study.cluster.client import connect

        cluster = connect(address)
        [found] = cluster.statuses([cluster.stop(name)])
        again = "the same `study submit` goes on with it"
    answer(as_json, found, f"{name} is {found['state']}; {again}")
