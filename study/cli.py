"""The command line: every command reads a spec or a study, asks one function of this package, and prints its answer.

study validate SPEC ─> ok            study run SPEC ─> live display ─> arms, best.yaml
study plan SPEC ─> decay audit       study resume, extend NAME ─> the same, from the study's folder
study submit SPEC --address URL ─> the same as a job on a Ray cluster; status, list, logs, stop and doctor take the address, too
study status, best, verify, report, export NAME, trace TRIAL ─> what was found

answers go to stdout, everything else to stderr; with --json the answer is one JSON document, and so is an error
exit codes: 0 fine, 1 no usable result (or a claim refuted, where `verify` is strict), 2 wrong input, 130 interrupted
"""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

try:
    import typer
    from rich.console import RenderableType
    from rich.text import Text
except ModuleNotFoundError:
    sys.exit("study: the command line is not installed; pip install 'effective-lr-study[service]'")

from study import errors, views
from study.claimspec import ClaimSpec
from study.display import Watcher
from study.home import StudyFolder, home_path, tracking_uri_for
from study.results.best import BestConfig, document, varied
from study.results.export import WITH_A_MODEL, Target, export
from study.results.layers import trace_document
from study.space import arm_label
from study.spec import StudySpec, load_spec
from study.tuning.status import status as status_of

app = typer.Typer(
    name="study",
    help="Searches learning rate, decay strength and gamma-decay policy, and measures the effective learning rates behind the answer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WrongUsage: Any = typer.BadParameter.__mro__[2]
"""What typer raises for a command line that it cannot read; it has no public name of its own."""

PICTURES = (".svg", ".png")
"""Kinds of pictures that `--plot` writes."""

SpecFile: TypeAlias = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML or JSON file.", show_default=False)]
Name: TypeAlias = Annotated[str, typer.Argument(metavar="NAME", help="A study in the home.", show_default=False)]
Best: TypeAlias = Annotated[
    str, typer.Argument(metavar="NAME", help="A study in the home, a best.yaml, or the id of an MLflow run.", show_default=False)
]
Sets: TypeAlias = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace a field or a section of the spec; the value is YAML. Repeatable.")
]
Home: TypeAlias = Annotated[Path | None, typer.Option("--home", metavar="DIR", help="Folder of all studies. Default: $STUDY_HOME, else ./studies.")]
TrackingUri: TypeAlias = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URI", help="MLflow store. Default: $MLFLOW_TRACKING_URI, else SQLite in the home.")
]
Compare: TypeAlias = Annotated[
    str, typer.Option(metavar="LIBRARIES", help="Set their defaults beside it: torch,timm,hf,torchvision,torchvision-recipe,fastai, or all.")
]
Address: TypeAlias = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="Dashboard of the Ray cluster to which it was submitted, as http://head:8265.")
]
Enqueue: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="POINT", help="Try a point first, such as '{\"optimizer.lr\": 0.1}'; the rest is drawn. Repeatable.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    try:
        code = app([word for word in given if word != "--debug"] or ["--help"], prog_name="study", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, as_json, given)


def _report(error: Exception, as_json: bool, given: Sequence[str]) -> int:
    """Prints what went wrong, one line for each problem, and returns the exit code that goes with it."""
    code, problems = _diagnosis(error, [word for word in given if word != "--debug"])
    if as_json:
        _answer(True, {"errors": [asdict(problem) for problem in problems]})
    else:
        for problem in problems:
            print(problem, file=sys.stderr)
    return code


def _diagnosis(error: Exception, given: Sequence[str]) -> tuple[int, Sequence[errors.Problem]]:
    match error:
        case errors.Interrupted():
            return error.exit_code, [replace(problem, remedy=f"go on with: {shlex.join(['study', *given])}") for problem in error.problems]
        case typer.Abort():  # Ctrl-C before anything was started, or after it has ended
            return 130, [errors.Problem("interrupted", "interrupted", "study", f"go on with: {shlex.join(['study', *given])}")]
        case errors.StudyError():
            return error.exit_code, error.problems
        case _ if isinstance(error, WrongUsage):
            return 2, [errors.Problem("usage", error.format_message().rstrip("."), "study", f"see {_help_of(given)}")]
        case ImportError() if "extra: " in str(error):  # the package's own words for a library that is not there
            message, _, remedy = str(error).partition(": ")
            return 2, [errors.Problem("missing-library", message, remedy=remedy)]
        case ModuleNotFoundError() if error.name and not error.name.startswith("study"):
            remedy = "pip install 'effective-lr-study[service]'; `study doctor` checks it"
            return 2, [errors.Problem("missing-library", f"a library is missing (got {error.name!r})", remedy=remedy)]
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return 1, [errors.Problem("bug", f"this is a bug in study ({said})", remedy="run it again with --debug, and report what that shows")]


def _help_of(given: Sequence[str]) -> str:
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return f"study {given[0]} --help" if given and given[0] in known else "study --help"


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may also follow the command.")] = False) -> None:
    del debug  # main() reads it wherever it stands; this puts it into the help


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, with the documentation of every field."""
    _answer(True, {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudySpec.model_json_schema()})


@app.command()
def validate(spec_file: SpecFile, overrides: Sets = None, as_json: Json = False) -> None:
    """Check a spec: prints `ok` and a summary, or every error at once."""
    spec = load_spec(spec_file, overrides or ())
    search = spec.search
    summary = {
        "ok": True,
        "name": spec.name,
        "trials": search.trials,
        "arms": [arm_label(arm) for arm in spec.arms],
        "axes": list(spec.space),
        "sampler": search.sampler,
        "epochs": None if "schedule.epochs" in spec.space else spec.trial.schedule.epochs,
    }
    _answer(as_json, summary, "ok", views.summary_line(summary))


@app.command()
def plan(spec_file: SpecFile, overrides: Sets = None, compare: Compare = "", home: Home = None, as_json: Json = False) -> None:
    """Dry run: trials, arms, steps, the engine with its measured gain, and what decay does to each parameter."""
    spec = load_spec(spec_file, overrides or ())
    libraries = [word.strip() for word in compare.split(",") if word.strip()]
    with _prints_on_stderr():
        from study.tuning.choosing import choose, pilot_seconds
        from study.tuning.forecast import forecast
        from study.tuning.preflight import audit

        audited = audit(spec, None if libraries == ["all"] else libraries).document()
        choice = choose(spec, home_path(home))
        ahead = forecast(spec, None if spec.resources.gpus_per_trial else pilot_seconds(spec), choice, os.cpu_count() or 1)
        planned = {**audited, "forecast": {**audited["forecast"], **ahead}, "engine": choice.document()}
    _answer(as_json, planned, views.plan_view(planned, spec.trial.optimizer))


@app.command()
def run(
    spec_file: SpecFile,
    overrides: Sets = None,
    enqueue: Enqueue = None,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with one that was interrupted. Ctrl-C once stops it cleanly."""
    _run(load_spec(spec_file, overrides or ()), home, tracking_uri, as_json, enqueue or ())


@app.command()
def resume(name: Name, home: Home = None, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """Go on with a study that was interrupted, from the spec in its folder."""
    from study.tuning.continuing import resumed

    _run(resumed(name, home), home, tracking_uri, as_json)


@app.command()
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


def _run(spec: StudySpec, home: Path | None, tracking_uri: str | None, as_json: bool, enqueue: Sequence[str] = ()) -> None:
    """Runs a study with a live display, and shows what it found."""
    out = views.console(stderr=as_json)
    out.print(views.headline(spec), soft_wrap=True)
    watcher = Watcher(out, live=not as_json)
    with _prints_on_stderr(as_json):
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
    _answer(as_json, config, views.best_view(config, _varied(result.best, spec)), views.where_to_look(found, folder, home, tracking_uri))


@app.command()
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
    _answer(as_json, {**attempt.document(), "name": spec.name, "address": cluster.url}, attempt.id)
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


@app.command()
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


@app.command()
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
    _answer(as_json, found, f"{name} is {found['state']}; {again}")


@app.command("list")
def list_studies(home: Home = None, address: Address = None, as_json: Json = False) -> None:
    """List the studies of a home, or those that were submitted to a cluster."""
    if address is not None:
        from study.cluster.client import connect

        cluster = connect(address)
        submitted = cluster.statuses(cluster.latest_of_each())
        _answer(as_json, submitted, views.studies_table(submitted) if submitted else f"no studies were submitted to {cluster.url}")
        return
    base, found = home_path(home), []
    for folder in StudyFolder.all(base):
        try:
            found.append(status_of(folder))
        except errors.StudyError as error:
            print(f"{folder.path} is left out: {error}", file=sys.stderr)
    _answer(as_json, found, views.studies_table(found) if found else f"no studies in {base}; start one with: study run SPEC")


@app.command()
def status(name: Name, home: Home = None, address: Address = None, as_json: Json = False) -> None:
    """Show where a study stands, whether or not it runs."""
    if address is None:
        found = status_of(StudyFolder.find(home_path(home), name))
    else:
        from study.cluster.client import connect

        cluster = connect(address)
        [found] = cluster.statuses([cluster.latest(name)])
    _answer(as_json, found, views.study_view(found))


@app.command()
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
    _answer(as_json, document(config), views.best_view(document(config), varied), use)


def _confirm(name: str, seeds: int, home: Path | None, tracking_uri: str | None, as_json: bool) -> None:
    """Trains the best few trials again, after saying how much that is."""
    out = views.console(stderr=as_json)
    with _prints_on_stderr(as_json):
        from study.tuning import confirming

        out.print(views.confirming_line(confirming.forecast(name, seeds, home=home)), soft_wrap=True)
        confirming.confirm(name, seeds, home=home, tracking_uri=tracking_uri, watch=Watcher(out, live=not as_json))


@app.command()
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
    _answer(as_json, found, views.claims_view(found))
    raise typer.Exit(int(strict and any(claim["verdict"] == "refuted" for claim in found["claims"])))


def _verdicts(claims: Sequence[ClaimSpec], table: Path) -> dict[str, Any]:
    """The document of the verdicts; without claims nothing needs to be read."""
    if not claims:
        return {"claims": [], "tested": 0}
    import pandas as pd

    from study.results.claims import verdicts_document
    from study.results.claims import verify as verdicts_on

    return verdicts_document(verdicts_on(claims, pd.read_parquet(table)))


@app.command("export")
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
        with _prints_on_stderr():
            from study.tuning.preflight import model_plan

            model = model_plan(config.trial)
    exported = export(config, to, model)
    for warning in exported.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if output is None:
        sys.stdout.write(exported.text)
        return
    with _writing(output, "-o"):
        output.write_text(exported.text, encoding="utf-8")


@app.command()
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
    with _prints_on_stderr():
        from study.results.report import report_document
        from study.tuning.reporting import REPORT, gathered, report_page

        found = gathered(folder, folder.load_spec())
    if output is not None or not as_json:
        target = output or folder.path / REPORT
        with _writing(target, "-o"):
            target.write_text(report_page(found), encoding="utf-8")
    answer = report_document(found)
    warnings = [Text(f"warning: {warning['says']}; {warning['remedy']}", style="yellow") for warning in answer["warnings"]]
    _answer(as_json, answer, answer["answer"], *warnings)


@app.command()
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
    _answer(as_json, found, views.trace_view(found, series, views.console().width))
    if plot is not None:
        from study.results.plots import save, trace_figure

        with _writing(plot, "--plot"):
            save(trace_figure(rows, trial_id), plot)


def _load_best(name: str, home: Path | None, tracking_uri: str | None) -> BestConfig:
    """The best config of a study in the home, of a file, or of an MLflow run."""
    from study import load_best

    return load_best(name, home=home, tracking_uri=None if (home_path(home) / name).is_dir() else tracking_uri)


def _varied(config: BestConfig, spec: StudySpec | None) -> dict[str, object]:
    """The fields that the study varied, and those that follow from them; without a spec, the optimizer's."""
    if spec is not None:
        return varied(config, spec)
    return {path: value for path, value in config.trial.dotted().items() if path.startswith("optimizer.") and value is not None}


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="A new file.", show_default=True)] = Path("my-study.yaml"),
    model: Annotated[str, typer.Option(help="mlp, resnet, transformer, or import:package.module:function.")] = "resnet",
    data: Annotated[str, typer.Option(help="digits, mnist5k, npz, or import:package.module:function.")] = "digits",
    rule: Annotated[str, typer.Option(help="sgd, adam, adamw, lion or muon.")] = "sgd",
    scientific: Annotated[
        list[str] | None, typer.Option(metavar="PATH[=VALUES]", help="A field whose values are compared. Repeatable. Default: optimizer.gamma.")
    ] = None,
    question: Annotated[str, typer.Option(help="What the study is to find out.")] = "Which norm gains should weight decay touch?",
) -> None:
    """Write a commented spec for your case: a valid one, to be edited. An existing file is left as it is."""
    from study.starter import Start, spec_text, write_spec

    start = Start(file.stem.lower().replace("_", "-"), question, model, data, rule, tuple(scientific or ("optimizer.gamma",)))
    write_spec(spec_text(start), file)
    print(f"written to {file}; look at it, then: study plan {shlex.quote(str(file))}", file=sys.stderr)


@app.command()
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

    with _prints_on_stderr():
        left = leavings(home_path(home), name, tracking_uri)
        if not yes and (as_json or not sys.stdin.isatty()):
            raise errors.InputError("nobody can be asked here whether to remove it", where=name, remedy=f"add --yes to remove {left}")
        if not yes and not _confirmed(f"Remove {left}?"):
            print("nothing was removed", file=sys.stderr)
            raise typer.Exit(0)
        remove(left)
    _answer(as_json, left.document(), f"removed {left}")


def _confirmed(question: str) -> bool:
    """Asks on stderr; an end of input is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


@app.command()
def ui(
    home: Home = None,
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; anything but loopback shows your results to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI on a study home. Ctrl-C ends it."""
    from study.ui import show

    show(tracking_uri_for(home_path(home), tracking_uri), host, port)


@app.command()
def doctor(home: Home = None, tracking_uri: TrackingUri = None, address: Address = None, as_json: Json = False) -> None:
    """Check the installation, the store, the cluster and the GPU, and say what to do. With --address, of the head of that cluster."""
    from study.doctor import examine, examine_cluster

    base = home_path(home)
    with _prints_on_stderr():
        checks = [
            asdict(check)
            for check in (
                examine_cluster(address, str(home or ""), tracking_uri)
                if address is not None
                else examine(base, tracking_uri_for(base, tracking_uri))
            )
        ]
    failed = any(check["state"] == "fail" for check in checks)
    _answer(as_json, {"ok": not failed, "checks": checks}, views.checks_view(checks))
    raise typer.Exit(int(failed))


def _answer(as_json: bool, document: object, *shown: RenderableType) -> None:
    """Prints the answer of a command on stdout: its document, or what shows it in a terminal."""
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    out = views.console()
    for view in shown:
        out.print(view, soft_wrap=isinstance(view, str | Text))


@contextmanager
def _writing(file: Path, option: str) -> Iterator[None]:
    """Says what was written, or why it could not be."""
    try:
        yield
    except OSError as error:
        raise errors.HomeError(f"cannot be written ({error.strerror})", where=str(file), remedy=f"choose another with {option}") from None
    print(f"written to {file}", file=sys.stderr)


@contextmanager
def _prints_on_stderr(wanted: bool = True) -> Iterator[None]:
    """Keeps what libraries and the user's own code print out of an answer on stdout."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
