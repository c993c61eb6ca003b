"""The command line: every command reads a spec or a study, asks one function of this package, and prints its answer.

study validate SPEC ─> ok            study run SPEC ─> live display ─> arms, best.yaml
study plan SPEC ─> decay audit       study resume, extend NAME ─> the same, from the study's folder
study submit SPEC --address URL ─> the same as a job on a Ray cluster; status, list, logs, stop and doctor take the address, too
study status, best, verify, report, export NAME, trace TRIAL ─> what was found

answers go to stdout, everything else to stderr; with --json the answer is one JSON document, and so is an error
exit codes: 0 fine, 1 no usable result (or a claim refuted, where `verify` is strict), 2 wrong input, 130 interrupted
"""

import functools
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit("study: the command line is not installed; pip install 'effective-lr-study[service]'")

from study import errors
from study.cli import following, results, running, specs, upkeep
from study.cli.answers import answer

app = typer.Typer(
    name="study",
    help="Searches learning rate, decay strength and gamma-decay policy, and measures the effective learning rates behind the answer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: Mapping[str, Callable[..., None]] = {
    "schema": specs.schema,
    "validate": specs.validate,
    "plan": specs.plan,
    "run": running.run,
    "resume": running.resume,
    "extend": running.extend,
    "submit": running.submit,
    "logs": following.logs,
    "stop": following.stop,
    "list": following.list_studies,
    "status": following.status,
    "best": results.best,
    "verify": results.verify,
    "export": results.export_best,
    "report": results.report,
    "trace": results.trace,
    "init": specs.init,
    "delete": upkeep.delete,
    "ui": upkeep.ui,
    "doctor": upkeep.doctor,
}
"""Every command, in the order in which `study --help` lists them."""


def _abortable(command: Callable[..., None]) -> Callable[..., None]:
    """The command, of which Ctrl-C makes an Abort: typer (0.29) would end it with 130 and without a word."""

    @functools.wraps(command)
    def ended(*given: Any, **named: Any) -> None:
        try:
            command(*given, **named)
        except KeyboardInterrupt:
            raise typer.Abort from None

    return ended


for name, command in COMMANDS.items():
    app.command(name)(_abortable(command))

WrongUsage: Any = typer.BadParameter.__mro__[2]
"""What typer raises for a command line that it cannot read; it has no public name of its own."""


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
        answer(True, {"errors": [asdict(problem) for problem in problems]})
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
            said = error.format_message().rstrip(".").replace("Value error, ", "")
            return 2, [errors.Problem("usage", said, "study", f"see {_help_of(given)}")]
        case ImportError() if "extra: " in str(error):  # the package's own words for a library that is not there
            message, _, remedy = str(error).partition(": ")
            return 2, [errors.Problem("missing-library", message, remedy=remedy)]
        case ModuleNotFoundError() if error.name and not error.name.startswith("study"):
            remedy = "pip install 'effective-lr-study[service]'; `study doctor` checks it"
            return 2, [errors.Problem("missing-library", f"a library is missing (got {error.name!r})", remedy=remedy)]
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return 1, [errors.Problem("bug", f"this is a bug in study ({said})", remedy="run it again with --debug, and report what that shows")]


def _help_of(given: Sequence[str]) -> str:
    return f"study {given[0]} --help" if given and given[0] in COMMANDS else "study --help"


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may also follow the command.")] = False) -> None:
    del debug  # main() reads it wherever it stands; this puts it into the help
