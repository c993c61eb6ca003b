"""Where commands print: answers on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from study import errors, views
from study.cli.pointing import pointed
from study.spec import StudySpec


def answer(as_json: bool, document: object, *shown: RenderableType) -> None:
    """Prints the answer of a command on stdout: its document, or what shows it in a terminal."""
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    out = views.console()
    for view in shown:
        out.print(view, soft_wrap=isinstance(view, str | Text))


@contextmanager
def writing(file: Path, option: str) -> Iterator[None]:
    """Says what was written, or why it could not be."""
    try:
        yield
    except OSError as error:
        raise errors.HomeError(f"cannot be written ({error.strerror})", where=str(file), remedy=f"choose another with {option}") from None
    print(f"written to {file}", file=sys.stderr)


@contextmanager
def at_its_line(spec: StudySpec, file: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Says where in the file of a spec stands what turns out to be wrong only once data and model are there."""
    try:
        yield
    except errors.InputError as error:
        if isinstance(error, errors.DataError | errors.ImportFailed | errors.ModelError) or type(error) is errors.InputError:
            raise errors.SpecError(pointed(error.problems, spec, file, overrides)) from error
        raise


@contextmanager
def prints_on_stderr(wanted: bool = True) -> Iterator[None]:
    """Keeps what libraries and the user's own code print out of an answer on stdout."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
