"""Fields: what each field of a trial takes, and whether the axes of a space fit the fields that they vary.

optimizer.gama    no such field            optimizer        a section, not a field
model.width       whole numbers only       optimizer.gamma  `last+inner` is stored as `inner+last`
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from study.errors import Problem
from study.problems import in_words, nearest, shown
from study.space import Axis, Scalar
from study.trial import TrialSpec


@cache
def field_type(path: str) -> Any:
    """The annotation of a field of TrialSpec by dotted path; `Any` below `args`, None where there is no such field."""
    model: Any = TrialSpec
    parts = path.split(".")
    for depth, part in enumerate(parts):
        info: FieldInfo | None = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return None
        if part == "args" and depth + 2 == len(parts):
            return Any
        model = info.annotation
        if depth + 1 == len(parts):
            return model if hasattr(model, "model_fields") else info.rebuild_annotation()
    return None


def takes_whole_numbers(path: str, axis: Axis) -> bool:
    """Whether an axis on a field is an interval of whole numbers."""
    if axis.choices is not None:
        return False
    annotation = field_type(path)
    if annotation is Any:
        return all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step or 1))
    return _accepts_only_whole_numbers(annotation)


def canonical(space: Mapping[str, Axis]) -> dict[str, Axis]:
    """The axes with every choice and condition written as its field stores it: `last+inner` becomes `inner+last`."""
    return {
        path: axis.model_copy(
            update={
                "choices": None if axis.choices is None else tuple(stored(path, value) for value in axis.choices),
                "when": {parent: stored(parent, value) for parent, value in axis.when.items()},
            }
        )
        for path, axis in space.items()
    }


def stored(path: str, value: Scalar) -> Scalar:
    """A value as the field of this path stores it; as it stands where there is no such field, or the field does not take it."""
    annotation = field_type(path)
    if annotation is None or annotation is Any or hasattr(annotation, "model_fields"):
        return value
    try:
        kept = TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return value
    return kept if isinstance(kept, bool | int | float | str | None) else value


def refusal(path: str, value: Scalar) -> tuple[str, str] | None:
    """Why a field does not take a value, and what to do; None where it does, or where there is no such field."""
    annotation = field_type(path)
    if annotation is None or annotation is Any or hasattr(annotation, "model_fields"):
        return None
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        return in_words(error.errors()[0])
    return None


def space_problems(space: Mapping[str, Axis], whole: bool = True) -> Iterator[Problem]:
    """What is wrong between axes and fields, and between axes and their conditions.

    Args:
        space: The axes by path.
        whole: Whether these are all axes; where not, a condition on another one is not judged.
    """
    for path, axis in space.items():
        yield from _axis_problems(path, path, axis)
        for other in axis.also:
            yield from _axis_problems(other, f"{path}/also", axis)
            if other in space or sum(other in axis.also for axis in space.values()) > 1:
                yield Problem("axis", f"{other} takes the values of two axes", f"space/{path}/also", "leave it to one of them")
        if axis.when and axis.role == "scientific":
            yield Problem("condition", "a scientific axis cannot be conditional: its values are arms", f"space/{path}/when", "remove `when`")
        for parent, value in axis.when.items():
            where = f"space/{path}/when"
            if parent == path or (whole and parent not in space):
                yield Problem("condition", f"the condition names no other axis (got {parent!r})", where, "name a path of `space`")
            elif parent in space and space[parent].choices is not None and value not in (space[parent].choices or ()):
                choices = ", ".join(map(shown, space[parent].choices or ()))
                yield Problem("condition", f"{parent} never takes this value (got {shown(value)})", where, f"use one of {choices}")


def _accepts_only_whole_numbers(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _accepts_only_whole_numbers(get_args(annotation)[0])
    members = [member for member in get_args(annotation) if member is not type(None)]
    return annotation is int or (len(members) == 1 and _accepts_only_whole_numbers(members[0]))


def _nearest_field(path: str) -> str | None:
    """The field that an unknown path is probably meant to be: the one that it names from elsewhere, else one of the section that it names."""
    same = [field for field in all_fields() if f".{field}".endswith(f".{path}") or path == f"trial.{field}"]
    if same:
        return same[0]
    section, dot, name = path.rpartition(".")
    beside = [field.rpartition(".")[2] for field in all_fields() if field.rpartition(".")[0] == section]
    near = nearest(name, beside)
    return f"{section}{dot}{near}" if near else nearest(path, all_fields())


def _axis_problems(path: str, at: str, axis: Axis) -> Iterator[Problem]:
    """What is wrong between an axis and a field that takes its values."""
    annotation, where = field_type(path), f"space/{at}"
    if annotation is None:
        near = _nearest_field(path)
        yield Problem(
            "no-such-field", f"a trial has no such field (got {path!r})", where, f"did you mean {near!r}?" if near else "see `study schema`"
        )
        return
    if hasattr(annotation, "model_fields"):
        yield Problem(
            "section", f"{path!r} is a section, not a field", where, f"vary a field of it, such as {path}.{next(iter(annotation.model_fields))}"
        )
        return
    if axis.choices is not None and len(set(map(repr, axis.choices))) < len(axis.choices):
        yield Problem("choice", f"choices repeat a value (got {', '.join(map(shown, axis.choices))})", where, "keep each once")
    if annotation is Any:
        return
    if axis.step is not None and _accepts_only_whole_numbers(annotation) and axis.step != int(axis.step):
        yield Problem("step", f"{path} takes whole numbers only (got step {axis.step})", where, "use a whole step")
    for value in axis.endpoints():
        if (said := refusal(path, value)) is not None:
            yield Problem("choice", said[0], where, said[1] or f"use values that {path} takes")


@cache
def all_fields(model: type[BaseModel] = TrialSpec, prefix: str = "") -> tuple[str, ...]:
    """Every field that an axis could name, by dotted path."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        section: Any = info.annotation
        found += all_fields(section, f"{prefix}{name}.") if hasattr(section, "model_fields") else [f"{prefix}{name}"]
    return tuple(found)
