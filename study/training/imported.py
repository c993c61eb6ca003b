"""The user's own code, which a spec names as `import:package.module:function`.

load_object(path)          the object itself
user_function(path)        a function that calls it
call_user(path, ...)       its result

KeyError in my/nets.py ──> ImportFailed: import:my.nets:wide raised KeyError: 'x' at my/nets.py:12 `return d['x']`
"""

import importlib
import inspect
import linecache
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from study.errors import ImportFailed

LONGEST_MESSAGE = 300
"""Characters shown of a user's exception."""

_WRITTEN = "import:package.module:function"
_OURS = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple(
    folder + os.sep
    for folder in (
        *(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    )
)


def load_object(path: str) -> Any:
    """What `import:package.module:function` names. The current directory is importable.

    Raises:
        ImportFailed: if there is no such module or name, or importing the module raises.
    """
    module_name, name = _parts(path)
    module = _module(path, module_name)
    with user_code(path):
        if hasattr(module, name):
            return getattr(module, name)
    near = get_close_matches(name, dir(module), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "name a function that it defines"
    raise ImportFailed(f"{path}: {module_name} has no {name!r} ({_file_of(module)})", remedy=remedy)


def user_function(path: str) -> Callable[..., Any]:
    """The function that `path` names; what it raises becomes ImportFailed with the user's own line.

    Raises:
        ImportFailed: if it cannot be imported or called.
    """
    function = load_object(path)
    if not callable(function):
        raise ImportFailed(f"{path} is not a function (got {type(function).__name__})", remedy="name a function or a class")

    @wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        with user_code(path, function):
            return function(*args, **kwargs)

    return call


def call_user(path: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the function that `path` names.

    Raises:
        ImportFailed: if it cannot be imported, or raises.
    """
    return user_function(path)(*args, **kwargs)


@contextmanager
def user_code(path: str, function: object = None) -> Iterator[None]:
    """Turns whatever the user's code behind `path` raises into ImportFailed; KeyboardInterrupt passes.

    Args:
        path: What the spec names.
        function: What is being called: its definition is shown where the exception has no line of the user's.
    """
    try:
        yield
    except ImportFailed:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and a script's top level may exit
        raise _raised(path, error, function) from error


class _Location(NamedTuple):
    """A line of code."""

    file: str
    line: int
    source: str

    def __str__(self) -> str:
        shown = f"{_relative(self.file)}:{self.line}"
        return f"{shown} `{self.source}`" if self.source else shown


def _parts(path: str) -> tuple[str, str]:
    module, _, name = path.removeprefix("import:").partition(":")
    if not path.startswith("import:") or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ImportFailed(f"is not written {_WRITTEN} (got {path!r})", remedy="for example import:my.nets:wide for wide() in my/nets.py")
    return module, name


def _module(path: str, name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    with user_code(path):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ImportFailed(
                f"{path}: there is no module {error.name!r} in {folder} or among the installed packages",
                remedy="start from the folder that holds it, or install it",
            ) from error


def _raised(path: str, error: BaseException, function: object) -> ImportFailed:
    kind, reason = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        reason = error.msg
    if len(reason) > LONGEST_MESSAGE:
        reason = reason[:LONGEST_MESSAGE] + "..."
    said = f"{kind}: {reason}" if reason else kind
    location = _syntax_line(error) or _user_line(error, _parts(path)[0].partition(".")[0])
    if location is not None:
        return ImportFailed(f"{path} raised {said} at {location}", remedy="mend that line")
    defined = _definition(function)
    place = f" when called, defined at {defined}" if defined else ""
    return ImportFailed(f"{path} raised {said}{place}", remedy="check `args` against what it takes")


def _syntax_line(error: BaseException) -> _Location | None:
    """Where a file cannot be parsed; None for text that the user's code parsed itself."""
    if not isinstance(error, SyntaxError) or not error.filename or error.filename.startswith("<"):
        return None
    return _location(error.filename, error.lineno or 1)


def _user_line(error: BaseException, package: str) -> _Location | None:
    """The innermost line of the user's: outside of libraries, else of the named package, which may be installed."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame, package)]
    if not frames:
        return None
    frame, line = frames[-1]
    return _location(frame.f_code.co_filename, line)


def _is_users(frame: FrameType, package: str) -> bool:
    file = os.path.abspath(frame.f_code.co_filename)
    if frame.f_code.co_filename.startswith("<") or file.startswith(_OURS):
        return False
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == package or not file.startswith(_LIBRARIES)


def _definition(function: object) -> _Location | None:
    try:
        unwrapped = inspect.unwrap(function)  # type: ignore[arg-type]
        file, (_, line) = inspect.getsourcefile(unwrapped), inspect.getsourcelines(unwrapped)
    except (TypeError, OSError, ValueError):
        return None
    return _location(file, line) if file else None


def _location(file: str, line: int) -> _Location:
    linecache.checkcache(file)
    return _Location(file, line, linecache.getline(file, line).strip())


def _file_of(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return _relative(file) if file else "built in"


def _relative(file: str) -> str:
    below = os.path.relpath(file)
    return file if below.startswith("..") else below
