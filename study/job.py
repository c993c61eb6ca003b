"""Job: what runs on the head of a cluster when a study is submitted to it, or asked about.

python -m study.job run SPEC [--home DIR]      sealed settings opened, imports checked, then `study run`
python -m study.job status NAME=HOME ...       one line for `study.cluster.client`, with one document for each study
python -m study.job doctor [--home DIR]        the same with checks, and whether every node sees the home
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from study.cli import main as command_line
from study.cluster.client import ANSWER
from study.cluster.sealing import SEALED, token_of, unseal
from study.cluster.shipping import import_problems
from study.errors import HomeError, SpecError, StudyError
from study.home import StudyFolder, tracking_uri_for
from study.spec import load_spec
from study.tuning.status import status


def main(arguments: Sequence[str]) -> int:
    """Runs one of the three, and returns its exit code."""
    kind, *rest = arguments
    try:
        _open_settings()
        if kind == "run":
            return _run(*_options(rest))
        if kind == "status":
            found: Any = [_status(*reversed(word.partition("=")[::2])) for word in rest]
        else:
            _, options = _options(rest)
            found = _checks(options)
        print(f"{ANSWER}{json.dumps(found)}", flush=True)
    except StudyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _open_settings() -> None:
    """Sealed settings take their places in the environment of this process, and of no other: those that train need none."""
    if sealed := os.environ.pop(SEALED, ""):
        os.environ.update(unseal(sealed, token_of(os.environ)))


def _options(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What stands alone, and the options with their values."""
    alone, options, left = [], {}, list(words)
    while left:
        word = left.pop(0)
        if word.startswith("--"):
            options[word] = left.pop(0)
        else:
            alone.append(word)
    return alone, options


def _home(given: str) -> Path:
    """The study home of this cluster.

    Raises:
        HomeError: if nobody has named one: a job's own folder is gone with it.
    """
    home = given or os.environ.get("STUDY_HOME", "")
    if not home.startswith("/"):
        remedy = "submit with --home DIR, or set STUDY_HOME for `ray start` on every node"
        raise HomeError(f"the cluster has no study home on shared storage (got {home!r})", where="STUDY_HOME", remedy=remedy)
    return Path(home)


def _run(alone: Sequence[str], options: dict[str, str]) -> int:
    [spec_file] = alone
    home = _home(options.get("--home", ""))
    if problems := [*import_problems(load_spec(spec_file), Path.cwd())]:
        raise SpecError(problems)
    return command_line(["run", spec_file, "--home", str(home)])


def _status(home: str, name: str) -> dict[str, Any] | None:
    try:
        folder = StudyFolder.find(_home(home), name)
        return {**status(folder), "spec_hash": folder.card().spec_hash}
    except StudyError:
        return None  # it has not begun; the job that runs it knows why


def _checks(options: dict[str, str]) -> list[dict[str, Any]]:
    """What the doctor finds on the head, and whether every node sees the home."""
    from study.doctor import Check, examine
    from study.tuning.nodes import nodes_that_see

    home = _home(options.get("--home", ""))
    found = examine(home, tracking_uri_for(home, options.get("--tracking-uri")))
    try:
        seen = nodes_that_see(home)
    except OSError as error:
        remedy = "choose another with --home or $STUDY_HOME"
        nodes = Check("nodes", "fail", f"{home} cannot be written on the head ({error.strerror})", remedy)
    else:
        blind = [name for name, sees in seen.items() if not sees]
        remedy = "mount the same shared storage (NFS, EFS) there, and name a folder of it with --home or $STUDY_HOME"
        nodes = (
            Check("nodes", "fail", f"{home} is not the same folder on {', '.join(blind)}", remedy)
            if blind
            else Check("nodes", "ok", f"{home} is the same folder on all nodes ({len(seen)})")
        )
    return [asdict(check) for check in (*found, nodes)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
