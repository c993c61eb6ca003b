"""Everything that can go wrong, drawn once.

    StudyError                    base; never raised itself
    ├── InputError                the user's input is wrong                     exit 2
    │   ├── SpecError             a spec: every problem in it at once
    │   ├── ImportFailed          an `import:` path, or the user's code behind it
    │   ├── DataError             arrays that cannot be trained on
    │   ├── ModelError            a model that the request does not fit
    │   │   ├── UnclaimedParameter    a parameter without a role
    │   │   └── UnknownPlace          a gain whose place cannot be known
    │   ├── HomeError             a study home that cannot be used
    │   ├── NameTaken             the name belongs to a different study
    │   ├── NotFound              no such study, trial or file
    │   ├── NotRunning            a study that runs in no process cannot be stopped
    │   ├── ClusterError          the Ray cluster does not answer, or will not do what was asked
    │   └── TrackingUnavailable   the MLflow store does not answer
    ├── NotExpressible            a decay policy that a target cannot say       exit 2
    ├── ClusterLost               the Ray cluster went away, resumable           exit 1
    ├── AllFail                   the first trials all failed the same way      exit 1
    ├── NoResult                  the study ended without a usable result       exit 1
    └── Interrupted               stopped by the user, resumable                exit 130

Every error is one or more `Problem`s: sentences with a place, the value received and a remedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `where: message; remedy`."""

    kind: str
    """A stable word for programs, such as `unknown-key`."""
    message: str
    """What is wrong, with the value received."""
    where: str = ""
    """File, line and dotted path, as far as they are known."""
    remedy: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{head}{self.message}{tail}"


class StudyError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1
    kind = "study"

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(self.kind, message, where, remedy),)
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problems))


def _rebuild(cls: type[StudyError], problems: tuple[Problem, ...]) -> StudyError:
    error = cls.__new__(cls)
    error.problems = problems
    Exception.__init__(error, str(error))
    return error


class InputError(StudyError):
    """The user's input is wrong."""

    exit_code = 2
    kind = "input"


class SpecError(InputError):
    """A spec with one or more problems, all reported together."""

    kind = "spec"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        Exception.__init__(self, str(self))


class ImportFailed(InputError):
    """An `import:` path could not be resolved, or the code behind it raised."""

    kind = "import"


class DataError(InputError):
    """Arrays that cannot be trained on: NaN pixels, labels out of range, too few images."""

    kind = "data"


class ModelError(InputError):
    """A model that the request does not fit."""

    kind = "model"


class UnclaimedParameter(ModelError):
    """A parameter that no role claims."""

    kind = "unclaimed-parameter"


class UnknownPlace(ModelError):
    """A norm gain whose place cannot be read from the computation."""

    kind = "unknown-place"


class HomeError(InputError):
    """A study home that cannot be created, read or written."""

    kind = "home"


class NameTaken(InputError):
    """The study's name already belongs to a study with another spec hash."""

    kind = "name-taken"


class NotFound(InputError):
    """No study, trial or file of that name."""

    kind = "not-found"


class NotRunning(InputError):
    """A study that runs in no process, or in none that can be reached from here."""

    kind = "not-running"


class ClusterError(InputError):
    """The Ray cluster does not answer, refuses who asks, or will not do what was asked."""

    kind = "cluster"


class TrackingUnavailable(InputError):
    """The MLflow tracking store does not answer."""

    kind = "tracking"


class NotExpressible(StudyError):
    """A decay policy that the chosen target cannot express."""

    exit_code = 2
    kind = "not-expressible"


class ClusterLost(StudyError):
    """The Ray that runs a study did not start, or went away; the same command goes on."""

    kind = "cluster-lost"


class AllFail(StudyError):
    """The first trials of a study all failed the same way; running ones were interrupted."""

    kind = "all-fail"


class NoResult(StudyError):
    """The study ended, but no trial completed with a finite value."""

    kind = "no-result"


class Interrupted(StudyError):
    """The study was stopped by the user; the same command resumes it."""

    exit_code = 130
    kind = "interrupted"
