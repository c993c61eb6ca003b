"""Commands that train: a study is run here, gone on with, extended, or submitted to a cluster."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.text import Text

from study import errors, views
from study.cli.answers import answer, at_its_line, prints_on_stderr
from study.cli.arguments import Home, Json, Name, Sets, SpecFile, TrackingUri
from study.display import Watcher
from study.home import StudyFolder, home_path
from study.results.best import document, varied
from study.spec import StudySpec, load_spec
from study.tuning.status import status as status_of

Enqueue: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="POINT", help="Try a point first, such as '{\"optimizer.lr\": 0.1}'; the rest is drawn. Repeatable.")
]


def run(
    spec_file: SpecFile,
    overrides: Sets = None,
    enqueue: Enqueue = None,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with one that was interrupted. Ctrl-C once stops it cleanly."""
    spec = load_spec(spec_file, overrides or ())
    with at_its_line(spec, spec_file, overrides or ()):
        _run(spec, home, tracking_uri, as_json, enqueue or ())


def resume(name: Name, home: Home = None, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """Go on with a study that was interrupted, from the spec in its folder."""
    from study.tuning.continuing import resumed

    _run(resumed(name, home), home, tracking_uri, as_json)


def extend(
    name: Name,
    trials: Annotated[int, typer.Option("--trials", min=1, metavar="N", help="How many more, over all arms.", show_default=False)],
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Add trials to a study and run them; none is repeated, and a new best trial of an arm gets its replicates."""
    from study.tuning.continuing import extended

    _run(extended(name, trials, home), home, tracking_uri, as_json)


def submit(
    spec_file: SpecFile,
    address: Annotated[str, typer.Option("--address", metavar="URL", help="Dashboard of the Ray cluster, as http://head:8265.", show_default=False)],
    overrides: Sets = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end, and end with its exit code; Ctrl-C only ends the following.")] = False,
    home: Annotated[str, typer.Option("--home", metavar="DIR", help="Study home on the cluster's shared storage. Default: its $STUDY_HOME.")] = "",
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", metavar="URI", help="MLflow store as the head reaches it. Default: $MLFLOW_TRACKING_URI, else SQLite there."),
    ] = None,
    requirements: Annotated[str, typer.Option("--pip", metavar="FILE", help="Requirements in this folder that the cluster still lacks.")] = "",
    as_json: Json = False,
) -> None:
    """Run a study as a job on a Ray cluster, or go on with one that was submitted before; prints its id at once.

    The files of the current folder go along, without hidden ones, environments and studies.
    """
    from study.cluster.client import connect

    spec = load_spec(spec_file, overrides or ())
    cluster = connect(address)
    attempt, kept = cluster.submit(spec, Path.cwd(), home=home, tracking_uri=tracking_uri, requirements=requirements)
    if kept:
        print(f"warning: the cluster asks for no token, so these were not forwarded: {', '.join(kept)}", file=sys.stderr)
    answer(as_json, {**attempt.document(), "name": spec.name, "address": cluster.url}, attempt.id)
    if not wait:
        return
    try:
        for text in cluster.logs(attempt, follow=True):
            print(text, end="", file=sys.stderr, flush=True)
        done = cluster.ended(attempt)
    except KeyboardInterrupt:
        print(f"{attempt.id} goes on; follow it with `study logs {spec.name} -f --address {cluster.url}`", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(done.code)


def _run(spec: StudySpec, home: Path | None, tracking_uri: str | None, as_json: bool, enqueue: Sequence[str] = ()) -> None:
    """Runs a study with a live display, and shows what it found."""
    out = views.console(stderr=as_json)
    out.print(views.headline(spec), soft_wrap=True)
    watcher = Watcher(out, live=not as_json)
    with prints_on_stderr(as_json):
        from study.tuning import driver
        from study.tuning.reporting import warnings_of

        result = driver.run(spec, home=home, tracking_uri=tracking_uri, watch=watcher, enqueue=enqueue)
    folder = StudyFolder.find(home_path(home), spec.name)
    found = status_of(folder)
    if not watcher.watched:
        out.print("this study had already finished: nothing was run")
    out.print(views.arms_table(found))
    if found["comparison"]:
        out.print(views.comparison_view(found["comparison"]))
    if spec.claims and (verdicts := json.loads(folder.claims.read_text("utf-8")))["claims"]:
        out.print(views.claims_view(verdicts))
    for warning in warnings_of(folder, spec, result.trials):
        out.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    if result.best is None:
        raise errors.NoResult(views.why_nothing(found), where=spec.name, remedy=views.what_then(found, folder))
    config = document(result.best)
    answer(as_json, config, views.best_view(config, varied(result.best, spec)), views.where_to_look(found, folder, home, tracking_uri))
