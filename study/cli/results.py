"""Commands that read what a study found: its best config, its claims, its report, the layers of a trial."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from study import errors, views
from study.claimspec import ClaimSpec
from study.cli.answers import answer, prints_on_stderr, writing
from study.cli.arguments import Best, Home, Json, Name, TrackingUri
from study.display import Watcher
from study.home import StudyFolder, home_path
from study.results.best import BestConfig, document, varied
from study.results.export import WITH_A_MODEL, Target, export
from study.results.layers import trace_document
from study.spec import StudySpec

PICTURES = (".svg", ".png")
"""Kinds of pictures that `--plot` writes."""


def best(
    name: Best,
    confirm: Annotated[
        int | None,
        typer.Option(
            "--confirm", min=2, metavar="K", help="First train the best few trials again, solo, with K fresh seeds, and rank them by those."
        ),
    ] = None,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show the best config of a study, and how to use it.

    With --confirm the best three trials (by their replicates, where there are some) are trained again by the plain engine, with fresh seeds
    that neither the search nor the replicates have seen. The best mean becomes the study's best. Interrupted, the same command goes on.
    """
    if confirm is not None:
        _confirm(name, confirm, home, tracking_uri, as_json)
    config, folder = _load_best(name, home, tracking_uri), StudyFolder(home_path(home) / name)
    varied = _varied(config, folder.load_spec() if folder.spec.exists() else None)
    use = views.how_to_use(str(folder.best)) if folder.best.exists() else views.how_to_use(name, home=home, tracking_uri=tracking_uri)
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    answer(as_json, document(config), views.best_view(document(config), varied), use)


def _confirm(name: str, seeds: int, home: Path | None, tracking_uri: str | None, as_json: bool) -> None:
    """Trains the best few trials again, after saying how much that is."""
    out = views.console(stderr=as_json)
    with prints_on_stderr(as_json):
        from study.tuning import confirming

        out.print(views.confirming_line(confirming.forecast(name, seeds, home=home)), soft_wrap=True)
        confirming.confirm(name, seeds, home=home, tracking_uri=tracking_uri, watch=Watcher(out, live=not as_json))


def _varied(config: BestConfig, spec: StudySpec | None) -> dict[str, object]:
    """The fields that the study varied, and those that follow from them; without a spec, the optimizer's."""
    if spec is not None:
        return varied(config, spec)
    return {path: value for path, value in config.trial.dotted().items() if path.startswith("optimizer.") and value is not None}


def verify(
    name: Name,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 where a claim is refuted.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Test the claims of a study on its trials: expected, measured, 95% interval, verdict.

    confirmed: the interval lies inside what was expected; refuted: outside.
    inconclusive: it reaches across, or there are fewer than five seeds.
    """
    folder = StudyFolder.find(home_path(home), name)
    claims = folder.load_spec().claims
    if claims and not folder.table.exists():
        raise errors.NotFound("this study has no table of trials yet", where=str(folder.path), remedy="finish it with `study run`")
    found = _verdicts(claims, folder.table)
    answer(as_json, found, views.claims_view(found))
    raise typer.Exit(int(strict and any(claim["verdict"] == "refuted" for claim in found["claims"])))


def _verdicts(claims: Sequence[ClaimSpec], table: Path) -> dict[str, Any]:
    """The document of the verdicts; without claims nothing needs to be read."""
    if not claims:
        return {"claims": [], "tested": 0}
    from study.results.claims import verdicts_document
    from study.results.claims import verify as verdicts_on
    from study.results.table import read_table

    return verdicts_document(verdicts_on(claims, read_table(table)))


def export_best(
    name: Best,
    to: Annotated[Target, typer.Option("--to", help="In whose terms.")] = "yaml",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file instead of stdout.")] = None,
    home: Home = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print the best config of a study for another project."""
    config, model = _load_best(name, home, tracking_uri), None
    if to in WITH_A_MODEL:
        with prints_on_stderr():
            from study.tuning.preflight import model_plan

            model = model_plan(config.trial)
    exported = export(config, to, model)
    for warning in exported.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if output is None:
        sys.stdout.write(exported.text)
        return
    with writing(output, "-o"):
        output.write_text(exported.text, encoding="utf-8")


def _load_best(name: str, home: Path | None, tracking_uri: str | None) -> BestConfig:
    """The best config of a study in the home, of a file, or of an MLflow run."""
    from study import load_best

    return load_best(name, home=home, tracking_uri=None if (home_path(home) / name).is_dir() else tracking_uri)


def report(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to. Default: report.html in the study's folder.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write what a study found as one HTML page: answer, best config, arms, pictures, claims, warnings, provenance.

    The page needs no network and no scripts. With --json its content is printed instead, unless a file is named.
    """
    folder = StudyFolder.find(home_path(home), name)
    with prints_on_stderr():
        from study.results.report import report_document
        from study.tuning.reporting import REPORT, gathered, report_page

        found = gathered(folder, folder.load_spec())
    if output is not None or not as_json:
        target = output or folder.path / REPORT
        with writing(target, "-o"):
            target.write_text(report_page(found), encoding="utf-8")
    content = report_document(found)
    warnings = [Text(f"warning: {warning['says']}; {warning['remedy']}", style="yellow") for warning in content["warnings"]]
    answer(as_json, content, content["answer"], *warnings)


def trace(
    source: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's id, such as gains-0007, or a trace.parquet.", show_default=False)],
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the trace, too: a file that ends in .svg or .png.")] = None,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show what became of each layer of a trial: its effective learning rate over the steps, and at the end norm, rotation and state.

    States, read from the last 30% of samples; the first that holds counts:

    dying: the unit gradient |w||g| fell to 1e-3 of its size in the first 30%, or the norm below 1e-6 of its first value.
    free: not scale-invariant, so theory expects nothing; an arrow shows where the norm goes.
    equilibrium: five relaxation times have passed throughout, and rotation is within 10% of what theory expects.
    off: they have passed, but rotation is not.
    growing, shrinking: they have not passed, and the norm changed by more than 1%.
    settling: they have not passed, and the norm is level.

    Relaxation times count from the last change of lr x weight_decay; under a schedule that never rests, none passes.
    """
    if plot is not None and plot.suffix not in PICTURES:
        raise errors.InputError(f"is no kind of picture (got {plot.suffix!r})", where=str(plot), remedy=f"end it in {' or '.join(PICTURES)}")
    from study.lookup import find_trace

    trial_id, rows = find_trace(source, home_path(home), tracking_uri)
    found = trace_document(trial_id, rows)
    series = {layer: own.sort_values("step")["effective_lr"].tolist() for layer, own in rows.groupby("layer")}
    answer(as_json, found, views.trace_view(found, series, views.console().width))
    if plot is not None:
        from study.results.plots import save, trace_figure

        with writing(plot, "--plot"):
            save(trace_figure(rows, trial_id), plot)
