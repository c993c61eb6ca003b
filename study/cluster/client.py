"""Client: submit, follow and stop studies as Ray jobs.

spec, folder, settings ──submit──> attempt gains-3 ──on the head: study.job──> study run ──> the home on shared storage
                                   logs, stop: of the latest attempt
status, list, doctor ──a short job that reads the home there, and is deleted──> the same documents as here

An attempt that has ended is gone on with by submitting again: `study run` finds what is there. One that runs is never doubled.
"""

import asyncio
import json
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.cluster.attempts import RUNNING, Attempt, attempt_of, status_of
from study.cluster.sealing import SEALED, seal, token_of
from study.cluster.shipping import SPEC, Settings, forwarded, import_problems, packed, shipped_files
from study.errors import ClusterError, NameTaken, NotFound, NotRunning, SpecError
from study.spec import StudySpec
from study.tracking.recorder import COMMIT, git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER = "STUDY-ANSWER "
"""Begins the line in which a job that reads says what it found."""

GRACE = "300"
"""Seconds that a stopped study has to let its trials report, before Ray kills it."""

PATIENCE = 10.0
"""Seconds to wait for an answer of the cluster's dashboard."""

READING = 180.0
"""Seconds that a job which only reads may take; a busy head needs some to start it."""

POLL = 0.5
"""Seconds between looks at a job."""


def connect(address: str, environment: Mapping[str, str] | None = None) -> "Cluster":
    """A cluster by the address of its dashboard, such as http://head:8265, with its token if it asks for one.

    A cluster that lets everybody in is not shown the token.

    Raises:
        ClusterError: within seconds, if nothing answers, or the token is missing or wrong.
    """
    environment = os.environ if environment is None else environment
    url = _dashboard(address)
    token = ""
    if (status := _probe(url)) == 401:
        token = token_of(environment)
        if not token:
            remedy = "export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH with the file that holds it; `ray get-auth-token` on the head shows it"
            raise ClusterError("the cluster asks for a token, and there is none here", where=url, remedy=remedy)
        status = _probe(url, token)
    if status in (401, 403):
        remedy = "compare RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token (the first that is there counts) with the head's"
        raise ClusterError("the cluster refuses this token", where=url, remedy=remedy)
    if status != 200:
        raise ClusterError(f"what answers is not the dashboard of Ray (HTTP {status})", where=url, remedy="name it, as http://head:8265")
    return Cluster(url, _client(url, token), token)


class Cluster:
    """The studies that were submitted to one Ray cluster."""

    def __init__(self, url: str, client: "JobSubmissionClient", token: str) -> None:
        self.url, self._client, self._token = url, client, token

    @property
    def asks_for_a_token(self) -> bool:
        """Whether the cluster refuses who has no token."""
        return bool(self._token)

    def submit(
        self, spec: StudySpec, folder: Path, *, home: str = "", tracking_uri: str | None = None, requirements: str = ""
    ) -> tuple[Attempt, list[str]]:
        """Starts a study as a job, or goes on with one that has ended; returns the attempt, and the variables that were not forwarded.

        Args:
            spec: The study.
            folder: Its files are sent along, for `import:` paths and data.
            home: The study home on the cluster's shared storage. Default: the cluster's own `$STUDY_HOME`.
            tracking_uri: The MLflow store as the head reaches it. Default: `$MLFLOW_TRACKING_URI`, here or there, else SQLite in the home.
            requirements: A file in the folder, of packages that the cluster lacks.

        Raises:
            SpecError: if the spec imports what the cluster must not run or cannot find.
            NameTaken: if the name belongs to another study in the same home.
            ClusterError: if the study runs already, or the cluster refuses.
        """
        if problems := [*import_problems(spec, folder)]:
            raise SpecError(problems)
        _check_place(folder, home, requirements)
        before = self.attempts(spec.name)
        self._check_history(before, spec, home)
        settings = forwarded(os.environ, tracking_uri)
        number = before[-1].number + 1 if before else 1
        attempt = Attempt(f"{spec.name}-{number}", spec.name, number, home, spec.spec_hash(), "PENDING")
        command = ["python", "-m", "study.job", "run", SPEC, *(["--home", home] if home else [])]
        with tempfile.TemporaryDirectory() as place, _asking(self.url):
            package = Path(place) / f"{spec.name}.zip"
            packed(spec, folder, package)
            environment: dict[str, Any] = {"working_dir": str(package), "env_vars": self._variables(settings)}
            if requirements:
                environment["pip"] = {"packages": [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{requirements}"], "pip_check": False}
            self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=attempt.id,
                runtime_env=environment,
                metadata={"study": spec.name, "attempt": str(number), "home": home, "spec_hash": attempt.spec_hash},
            )
        return attempt, [] if self._token else sorted(settings.secret)

    def _check_history(self, before: Sequence[Attempt], spec: StudySpec, home: str) -> None:
        """Refuses what would run twice, and what `study run` would refuse on the head."""
        for attempt in before:
            if attempt.running:
                remedy = (
                    f"follow it with `study logs {attempt.name} -f --address URL`, or end it first with `study stop {attempt.name} --address URL`"
                )
                raise ClusterError(f"this study runs there already, as {attempt.id}", where=spec.name, remedy=remedy)
        last = before[-1] if before else None
        if last and last.home == home and last.spec_hash != spec.spec_hash() and self.statuses([last])[0]["spec_hash"] not in ("", spec.spec_hash()):
            message = f"this name belongs to a study of another trial, space, sampler, seed, objective or stopping, submitted as {last.id}"
            raise NameTaken(message, where=spec.name, remedy="give the changed study another name, or another --home")

    def _variables(self, settings: Settings) -> dict[str, str]:
        """The environment of the job, as anybody sees it who may list jobs."""
        sealed = {SEALED: seal(settings.secret, self._token)} if settings.secret and self._token else {}
        commit = {COMMIT: found} if (found := git_commit()) else {}
        return {**settings.plain, **sealed, **commit, "RAY_JOB_STOP_WAIT_TIME_S": GRACE}

    def attempts(self, name: str | None = None) -> list[Attempt]:
        """Every submission, or those of one study, oldest first."""
        with _asking(self.url):
            jobs = self._client.list_jobs()
        found = [attempt for job in jobs if (attempt := attempt_of(job)) is not None and name in (None, attempt.name)]
        return sorted(found, key=lambda attempt: (attempt.name, attempt.number))

    def latest(self, name: str) -> Attempt:
        """The latest submission of a study.

        Raises:
            NotFound: if there is none.
        """
        attempts = self.attempts()
        mine = [attempt for attempt in attempts if attempt.name == name]
        if not mine:
            known = ", ".join(sorted({attempt.name for attempt in attempts})) or "none"
            raise NotFound(f"no study of this name was submitted (got {name!r})", where=self.url, remedy=f"studies there: {known}")
        return mine[-1]

    def latest_of_each(self) -> list[Attempt]:
        """The latest submission of every study, by name."""
        return list({attempt.name: attempt for attempt in self.attempts()}.values())

    def logs(self, attempt: Attempt, follow: bool = False) -> Iterator[str]:
        """What an attempt has printed; with *follow*, until it ends."""
        with _asking(self.url):
            if not follow:
                yield self._client.get_job_logs(attempt.id)
                return
            lines = self._client.tail_job_logs(attempt.id)
            with asyncio.Runner() as runner:
                while (text := runner.run(_next(lines))) is not None:
                    yield text

    def ended(self, attempt: Attempt) -> Attempt:
        """The attempt once it has ended."""
        while True:
            now = self._now(attempt.id)
            if not now.running:
                return now
            time.sleep(POLL)

    def _now(self, submission: str) -> Attempt:
        with _asking(self.url):
            found = attempt_of(self._client.get_job_info(submission))
        assert found is not None, "submitted here"
        return found

    def stop(self, name: str) -> Attempt:
        """Asks the latest attempt of a study to end, and waits until its trials have reported and it has.

        Raises:
            NotRunning: if it has ended before.
        """
        attempt = self.latest(name)
        if not attempt.running:
            raise NotRunning(f"this study does not run (its last attempt, {attempt.id}, is {attempt.status})", where=self.url, remedy=attempt.again)
        with _asking(self.url):
            self._client.stop_job(attempt.id)
        return self.ended(attempt)

    def statuses(self, attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
        """The documents of `study status`, each with the attempt as `job`, as the home on the cluster has them."""
        if not attempts:
            return []
        found = self._answer("status", *(f"{attempt.name}={attempt.home}" for attempt in attempts))
        return [status_of(attempt, document) for attempt, document in zip(attempts, found, strict=True)]

    def checks(self, home: str, tracking_uri: str | None) -> list[dict[str, Any]]:
        """What `study doctor` finds on the cluster's head, and on every node about the home."""
        options = [*(["--home", home] if home else []), *(["--tracking-uri", tracking_uri] if tracking_uri else [])]
        found: list[dict[str, Any]] = self._answer("doctor", *options)
        return found

    def _answer(self, *arguments: str) -> Any:
        """What a short job says that reads on the head; the job is deleted."""
        with _asking(self.url):
            job = self._client.submit_job(entrypoint=shlex.join(["python", "-m", "study.job", *arguments]), metadata={"study.reads": arguments[0]})
            deadline = time.monotonic() + READING
            while (info := self._client.get_job_info(job)).status in RUNNING:
                if time.monotonic() > deadline:
                    self._client.stop_job(job)
                    raise ClusterError(f"the head did not answer within {READING:.0f} s", where=self.url, remedy="see its load in the dashboard")
                time.sleep(POLL / 2)
            printed = self._client.get_job_logs(job)
            self._client.delete_job(job)
        answers = [line.removeprefix(ANSWER) for line in printed.splitlines() if line.startswith(ANSWER)]
        if not answers:
            remedy = "is this project installed in the environment that `python` names there? see docs/cluster.md"
            raise ClusterError(f"the head cannot say ({_last_words(printed or info.message or '')})", where=self.url, remedy=remedy)
        return json.loads(answers[-1])


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turns what Ray's client raises into an error of ours."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"the cluster refuses the token ({_last_words(error)})", where=url, remedy="see RAY_AUTH_TOKEN") from None
    except (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise ClusterError(f"the cluster does not answer ({_last_words(error)})", where=url, remedy="try again; what runs there goes on") from None
    except RuntimeError as error:  # all that Ray's client knows
        raise ClusterError(f"the cluster will not do it ({_last_words(error)})", where=url, remedy="see its dashboard") from None


def _check_place(folder: Path, home: str, requirements: str) -> None:
    if home and not home.startswith("/"):
        remedy = "name a folder that every node reaches, such as /mnt/studies"
        raise ClusterError(f"the home on the cluster must be an absolute path (got {home!r})", where="--home", remedy=remedy)
    if requirements and (folder / requirements) not in shipped_files(folder):
        raise ClusterError(
            f"no such file among those that are sent from {folder} (got {requirements!r})",
            where="--pip",
            remedy="name one in the folder that is submitted",
        )


def _dashboard(address: str) -> str:
    """The address as a URL.

    Raises:
        ClusterError: if it is of another kind.
    """
    url = address.rstrip("/") if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise ClusterError("is not the address of a dashboard", where=address, remedy="name it, as http://head:8265")
    return url


def _probe(url: str, token: str = "") -> int:
    """The HTTP status of a first question.

    Raises:
        ClusterError: if nothing answers.
    """
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        remedy = "start the cluster, or forward its dashboard to here: ray dashboard cluster.yaml"
        raise ClusterError(f"no Ray cluster answers ({reason})", where=url, remedy=remedy) from None


def _client(url: str, token: str) -> "JobSubmissionClient":
    if find_spec("aiohttp") is None or find_spec("cryptography") is None:
        raise ClusterError("what speaks to clusters is not installed", where=url, remedy="pip install 'effective-lr-study[cluster]'")
    from ray.job_submission import JobSubmissionClient

    for talker in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{talker}").setLevel(logging.WARNING)
    # These would take the place of the address that was given.
    kept = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        with _asking(url):
            # Named here, the token is sent whatever RAY_AUTH_MODE was when ray was first imported. An empty one keeps Ray from sending that of
            # this machine's own clusters to whoever answers.
            return JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}" if token else ""})
    finally:
        os.environ.update(kept)


def _last_words(printed: object) -> str:
    """The last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in str(printed).splitlines() if any(map(str.isalpha, line))]
    return lines[-1] if lines else type(printed).__name__


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)
