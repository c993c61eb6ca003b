"""Problems: plain values that do not make a model, told in sentences with place, value, remedy and line.

tree ─validated─> model    or SpecError: [file.yaml:3: trial.optimizer.momentun: unknown key (got 'momentun'); did you mean 'momentum'?, ...]
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from study.errors import Problem, SpecError
from study.space import word

OVERRIDDEN = 0
"""The line of what a `--set` wrote."""

ELSEWHERE = {"learning_rate": "lr", "wd": "weight_decay", "max_grad_norm": "clip", "betas": "beta1", "type": "rule", "name": "rule"}
"""What other projects call some fields."""

Model = TypeVar("Model", bound=BaseModel)
Lines = Mapping[tuple[str, ...], int]
"""The line of every key by its path."""


def validated(
    model: type[Model],
    tree: object,
    source: str = "",
    lines: Lines | None = None,
    beyond: Callable[[Mapping[str, Any]], Iterable[Problem]] = lambda tree: (),
) -> Model:
    """Turns plain values into a model.

    Args:
        model: What the values describe.
        tree: The values.
        source: The file that they come from, for messages.
        lines: The line of every key by its path.
        beyond: What else is wrong with values of which pydantic has refused some.

    Raises:
        SpecError: with every problem found, in the order of lines.
    """
    if not isinstance(tree, Mapping):
        where = f"{source}:1" if source else ""
        raise SpecError([Problem("shape", f"must be a mapping of fields (got {shown(tree)})", where, "start with `name: my-study`")])
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [*_from_pydantic(error, tree, model), *beyond(tree)]
    except SpecError as error:
        problems = list(error.problems)
    by_line = [located(problem, source, lines or {}) for problem in dict.fromkeys(problems)]
    raise SpecError([problem for _, problem in sorted(by_line, key=lambda pair: pair[0])])


def located(problem: Problem, source: str, lines: Lines) -> tuple[int, Problem]:
    """The problem, whose place is keys joined by `/`, with its dotted path and, where it comes from a file, its line: that of the nearest key."""
    keys = tuple(problem.where.split("/")) if problem.where else ()
    line = next((lines[keys[:depth]] for depth in range(len(keys), 0, -1) if keys[:depth] in lines), 1)
    where = ".".join(keys)
    if line == OVERRIDDEN:
        where = f"--set {where}"
    elif source:
        where = f"{source}:{line}: {where}".removesuffix(": ")
    return line, replace(problem, where=where)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one is probably meant to be."""
    known = list(known)
    if (meant := ELSEWHERE.get(name)) in known:
        return meant
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.65)), None)


def in_words(details: ErrorDetails) -> tuple[str, str]:
    """What pydantic says of a value, with the value received, and the remedy that a check of our own names after `; `."""
    sentence, _, remedy = _sentence(details).partition("; ")
    received = "" if isinstance(details["input"], Mapping) or "(got" in sentence else f" (got {shown(details['input'])})"
    return f"{sentence}{received}", remedy


def shown(value: object) -> str:
    """A received value as messages show it, however large it is."""
    match value:
        case None | bool():
            return word(value)
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
        case int() if abs(value) > 10**60:
            return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _from_pydantic(error: ValidationError, tree: Mapping[str, Any], model: type[BaseModel]) -> list[Problem]:
    found: dict[tuple[str, str], Problem] = {}
    for details in error.errors(include_url=False):
        keys = _known_keys(details, tree)
        # A union reports once for each of its members; the first is enough.
        kind = details["type"] if details["type"] in ("extra_forbidden", "missing") else ""
        found.setdefault(("/".join(keys), kind), _problem(details, keys, model))
    return list(found.values())


def _known_keys(details: ErrorDetails, tree: object) -> list[str]:
    """The error's location without the steps that pydantic adds for unions and validators."""
    keys: list[str] = []
    for part in details["loc"]:
        if (isinstance(tree, Mapping) and part in tree) or (isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)):
            tree = tree[part]  # type: ignore[index]
        elif details["type"] != "missing" or not isinstance(tree, Mapping):
            break
        keys.append(str(part))
    return keys


def _problem(details: ErrorDetails, keys: Sequence[str], model: type[BaseModel]) -> Problem:
    where = "/".join(keys)
    if details["type"] == "extra_forbidden":
        near = nearest(keys[-1], _siblings(keys[:-1], model))
        remedy = f"did you mean {near!r}?" if near else "remove it; `study schema` lists the keys"
        return Problem("unknown-key", f"unknown key (got {shown(keys[-1])})", where, remedy)
    if details["type"] == "missing" and isinstance(details["loc"][-1], int):
        return Problem("missing", f"has too few values (got {shown(details['input'])})", where, "give all of them")
    if details["type"] == "missing":
        return Problem("missing", "is required", where, "add it")
    message, remedy = in_words(details)
    return Problem("value", message, where, remedy or "see `study schema` for what it takes")


def _sentence(details: ErrorDetails) -> str:
    """What pydantic says, or better words for it, with a remedy of our own after `; `."""
    match details["type"]:
        case "string_pattern_mismatch":
            return "must be lower-case letters, digits and dashes"
        case "too_short":
            return "must not be empty"
        case "model_type" | "dict_type":
            return "must be a mapping of fields"
    text = details["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _siblings(keys: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The fields beside an unknown key, to suggest one."""
    model: Any = root
    for key in keys:
        members = [member for member in get_args(model) if member not in (type(None), ...)]
        if get_origin(model) in (dict, tuple):
            model = members[-1]
        else:
            model = members[0] if members else model
            model = getattr(getattr(model, "model_fields", {}).get(key), "annotation", None)
    return list(getattr(model, "model_fields", {}))
