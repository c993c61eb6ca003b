"""StudySpec: a trial with holes. Reads a spec, checks all of it at once, and turns assignments into trials.

YAML or JSON ─read─> tree and line numbers ─override─> tree ─check─> StudySpec ─trial_for(assignment)─> TrialSpec
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from study.errors import NotFound, Problem, SpecError
from study.space import Assignment, Axis, Frozen, Scalar, arms, word
from study.trial import Count, NonNegative, Seed, TrialSpec

MAX_BYTES = 1_000_000
"""A larger file is refused, and no more than this is read of it."""

MAX_NODES = 20_000
"""Values in a file after anchors are expanded; more is refused, so that a small file cannot fill the memory."""

MAX_COMBINATIONS = 1_000
"""How many trials are tried out when a space is checked."""

PRODUCT = ("optimizer.lr", "optimizer.weight_decay", "optimizer.intrinsic_lr")
"""Three fields of which two are free."""

LAYER_METRICS = ("effective_lr/median", "rotation/median", "rotation_ratio/median")
"""Summaries of the layers that can serve as an objective."""

_OVERRIDDEN = 0
"""The line of what a `--set` wrote."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("a duration is a number and a unit, such as 90s, 15m, 4h or 2d")
        return float(match[1]) * _SECONDS[match[2]]
    if isinstance(value, bool):
        raise ValueError("a duration is a number and a unit, such as 90s, 15m, 4h or 2d")
    return value


Duration: TypeAlias = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
StudyName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]
Model = TypeVar("Model", bound=BaseModel)


class SearchSpec(Frozen):
    """How assignments are drawn, and how many."""

    trials: Count
    """Trials in all, over all arms; replicates are not counted."""
    sampler: Literal["tpe", "random", "sobol", "grid", "gp", "cmaes"] = "tpe"
    """How values are proposed."""
    seed: Seed = 0
    """Draws the proposals."""


class ObjectiveSpec(Frozen):
    """What a trial is ranked by."""

    metric: str = "val/error"
    """A metric that every measurement holds."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which end is better."""
    at: Literal["final", "best"] = "final"
    """Which measurement counts: a trial's last one or its best one."""

    def value(self, history: Sequence[float]) -> float:
        """A trial's value from the objective at its measurements, oldest first."""
        if self.at == "final":
            return history[-1]
        return min(history) if self.direction == "minimize" else max(history)

    def rank(self, value: float) -> float:
        """A number that is smaller for better values."""
        return value if self.direction == "minimize" else -value


class StoppingSpec(Frozen):
    """Which trials are stopped before their last epoch."""

    scheduler: Literal["none", "asha", "median"] = "none"
    """`asha`: successive halving on rungs grace x reduction^k. `median`: below the median of the others' running means."""
    grace: Count = 4
    """Epochs that every trial gets."""
    reduction: Annotated[Count, Field(ge=2)] = 3
    """One in so many trials goes on at each rung (asha)."""
    within_arm: bool = True
    """Compare a trial with trials of its own arm only, so that no arm is stopped because another learns faster."""


class BudgetSpec(Frozen):
    """When the whole study ends, whatever is left of it."""

    wall: Duration | None = None
    """Time since the study was started or resumed, in seconds or as 90s, 15m, 4h, 2d."""
    gpu_hours: NonNegative | None = None
    """Hours of GPU, shares of a GPU counted as such, over all trials."""


class ResourcesSpec(Frozen):
    """What a trial runs on."""

    engine: Literal["auto", "solo"] = "auto"
    """`solo`: one trial in one process. `auto` chooses the fastest that is available."""
    cpus_per_trial: Count = 1
    """Cores that a trial reserves; each trial computes on one thread whatever this says."""
    gpus_per_trial: NonNegative = 0.0
    """Share of a GPU that a trial reserves; 0 trains on the CPU."""


class KeepSpec(Frozen):
    """What is kept of ended trials."""

    weights: Literal["best", "all", "none"] = "best"
    """Whose final weights become a safetensors artifact."""


class StudySpec(Frozen):
    """A study: one trial, the axes along which it varies, and how to search them."""

    version: Literal[1] = 1
    """Version of this format."""
    name: StudyName
    """Lower-case letters, digits and dashes; the study's folder and its MLflow experiment."""
    question: str = ""
    """What the study is to find out, in one sentence."""
    trial: TrialSpec = Field(default_factory=TrialSpec)
    """One complete trial; `space` varies some of its fields."""
    space: dict[str, Axis] = Field(min_length=1)
    """Axes by dotted path into `trial`."""
    search: SearchSpec
    objective: ObjectiveSpec = Field(default_factory=ObjectiveSpec)
    stopping: StoppingSpec = Field(default_factory=StoppingSpec)
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    keep: KeepSpec = Field(default_factory=KeepSpec)

    @field_validator("space")
    @classmethod
    def _canonical_choices(cls, space: dict[str, Axis]) -> dict[str, Axis]:
        return _canonical(space)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [*_space_problems(self.space), *_study_problems(self.space, self.trial, self.search, self.objective, self.stopping)]
        problems = problems or [*_combination_problems(self)]
        if problems:
            raise SpecError(problems)
        return self

    @property
    def arms(self) -> list[Assignment]:
        """The combinations of scientific values that are compared, in order."""
        return arms(self.space)

    @property
    def nuisance(self) -> dict[str, Axis]:
        """The axes that are tuned within each arm."""
        return {path: axis for path, axis in self.space.items() if axis.role == "nuisance"}

    def integer(self, path: str) -> bool:
        """Whether the axis on `path` takes whole numbers only."""
        return _takes_whole_numbers(path, self.space[path])

    def trial_for(self, assignment: Mapping[str, Any]) -> TrialSpec:
        """The complete trial with the assigned fields replaced.

        Axes take precedence over the base trial: of lr, weight_decay and intrinsic_lr, the one that is not assigned follows.

        Raises:
            SpecError: if the combination is not a valid trial.
        """
        tree = self.trial.canonical()
        varied = {path.rpartition(".")[2] for path in PRODUCT if path in assignment}
        if "intrinsic_lr" in varied:
            del tree["optimizer"]["lr" if "weight_decay" in varied else "weight_decay"]
        for path, value in assignment.items():
            *sections, field = path.split(".")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[field] = value
        return validated(TrialSpec, tree)

    def spec_hash(self) -> str:
        """SHA-256 over everything that decides what the trials are; changes elsewhere are allowed on resume."""
        whole = self.model_dump(mode="json", include={"space": True, "search": {"sampler", "seed"}, "objective": True, "stopping": True})
        text = json.dumps({**whole, "trial": self.trial.canonical()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The spec with every default filled in, as YAML that loads back to an equal spec."""
        tree = {**self.model_dump(mode="json", exclude_none=True), "trial": self.trial.canonical()}
        return to_yaml(tree)


def load_spec(source: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Reads and checks a spec.

    Args:
        source: A YAML or JSON file.
        overrides: `path=value` with a YAML value, replacing any field or section.

    Raises:
        NotFound: if there is no such file.
        SpecError: with every problem of the spec, each with file, line and path.
    """
    path = Path(source)
    tree, lines = read_document(path)
    for override in overrides:
        keys, value = _parsed_override(tree, override)
        tree = _replaced(tree, keys, value)
        lines = {where: line for where, line in lines.items() if where[: len(keys)] != keys}
        lines = {keys[: depth + 1]: _OVERRIDDEN for depth in range(len(keys))} | lines
    return check(tree, str(path), lines)


def check(tree: object, source: str = "", lines: Mapping[tuple[str, ...], int] | None = None) -> StudySpec:
    """Turns plain values into a StudySpec; arguments and errors as in `validated`."""
    return validated(StudySpec, tree, source, lines)


def validated(model: type[Model], tree: object, source: str = "", lines: Mapping[tuple[str, ...], int] | None = None) -> Model:
    """Turns plain values into a model.

    Args:
        model: What the values describe.
        tree: The values.
        source: The file that they come from, for messages.
        lines: The line of every key by its path.

    Raises:
        SpecError: with every problem found, in the order of lines.
    """
    if not isinstance(tree, Mapping):
        where = f"{source}:1" if source else ""
        raise SpecError([Problem("shape", f"must be a mapping of fields (got {_shown(tree)})", where, "start with `name: my-study`")])
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = _from_pydantic(error, tree, model)
        if model is StudySpec:
            problems += _problems_of_valid_parts(tree)
    except SpecError as error:
        problems = list(error.problems)
    located = [_located(problem, source, lines or {}) for problem in dict.fromkeys(problems)]
    raise SpecError([problem for _, problem in sorted(located, key=lambda pair: pair[0])])


class Document(NamedTuple):
    """A parsed file: plain values, and the line of every key by its path."""

    tree: object
    lines: dict[tuple[str, ...], int]


def read_document(path: Path) -> Document:
    """Parses a YAML or JSON file safely.

    Raises:
        NotFound: if the file is missing.
        SpecError: if it is unreadable, too large, not UTF-8, empty, not YAML, or more than plain values.
    """

    def refuse(kind: str, message: str, remedy: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(kind, message, f"{path}:{line}" if line else str(path), remedy)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            size = max(len(content), path.stat().st_size) / 1e6
            raise refuse("too-large", f"is larger than {MAX_BYTES / 1e6:g} MB (got {size:.1f} MB)", "is this the right file?")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path), remedy="check the path, or start from one in search_spaces/") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise refuse("encoding", f"is not UTF-8 (byte 0x{byte:02x} at offset {error.start})", "save it as UTF-8 text") from None
    except OSError as error:
        raise refuse("unreadable", f"cannot be read ({error.strerror})", "check that it is a file that you may read") from None
    try:
        document = _parsed(text.replace("\t", " ") if path.suffix == ".json" else text)
    except _Refused as error:
        raise refuse(error.kind, error.message, error.remedy, error.line) from None
    if not document.lines:
        raise refuse("empty", "is empty", "start with `name: my-study`", 1)
    return document


def parse_value(text: str) -> object:
    """One YAML value, read as a spec reads it.

    Raises:
        ValueError: if it is not YAML, or more than plain values.
    """
    return _parsed(text).tree


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that reads back to the same values, here and in other YAML readers."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Refused(ValueError):
    """Text that a spec may not hold."""

    def __init__(self, kind: str, message: str, remedy: str, line: int = 1) -> None:
        super().__init__(message)
        self.kind, self.message, self.remedy, self.line = kind, message, remedy, line


def _parsed(text: str) -> Document:
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, lines)
        for count, (where, node) in enumerate(_walk(root)):
            if count > MAX_NODES:
                raise _Refused("too-large", f"holds more than {MAX_NODES} values once anchors are expanded", "write out what you need")
            lines.setdefault(where, node.start_mark.line + 1)
        return Document(loader.construct_document(root), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"is not valid YAML: {error.problem or error.context or 'cannot be parsed'}"
        raise _Refused("yaml", message, "mend the line", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Refused("yaml", f"is not valid YAML: a control character (got {chr(error.character)!r})", "remove it", line) from None
    except RecursionError:
        raise _Refused("too-deep", "nests too deeply", "a spec needs a handful of levels") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, `no` and `off` as words, and refuses tags and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused("tag", f"tags are not allowed (got {shown!r})", "write plain values", event.start_mark.line + 1)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("key", "a key must be a word, not a list or a mapping", "mend the line", line)
            if key.value in seen:
                raise _Refused("repeated-key", f"the key {key.value!r} stands twice", "keep one of them", line)
            seen.add(key.value)
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        # JSON writes a character beyond U+FFFF as two escapes, which PyYAML leaves apart.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def construct_yaml_int(self, node: Any) -> int:
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            got = _shown(node.value)
            raise _Refused("number", f"cannot be read as a number (got {got})", "mend the line", node.start_mark.line + 1) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every word that `_Loader` or a stock YAML reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # PyYAML loses spaces around these line breaks, unless it escapes them.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if set(data) & set("\x85\u2028\u2029") else None)


_FLOAT = re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "float", "timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _walk(node: yaml.Node, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    yield where, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*where, key.value), key
            yield from _walk(value, (*where, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk(value, (*where, str(index)))


def _parsed_override(tree: object, override: str) -> tuple[tuple[str, ...], object]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError([Problem("override", f"an override is path=value (got {override!r})", "--set", "for example --set search.trials=10")])
    try:
        return _keys(tree, path), parse_value(text)
    except ValueError as error:
        raise SpecError([Problem("override", f"the value {error} (got {_shown(text)})", f"--set {path}", "quote it")]) from None


def _keys(tree: object, path: str) -> tuple[str, ...]:
    """The steps to a field; below `space` the dotted path of an axis is one step."""
    if not path.startswith("space."):
        return tuple(path.split("."))
    axis = path.removeprefix("space.")
    space = tree.get("space") if isinstance(tree, Mapping) else None
    for name in map(str, space if isinstance(space, Mapping) else ()):
        if axis.startswith(f"{name}."):
            return ("space", name, *axis.removeprefix(f"{name}.").split("."))
    return ("space", axis)


def _replaced(tree: object, keys: Sequence[str], value: object) -> object:
    if not keys:
        return value
    branch = dict(tree) if isinstance(tree, Mapping) else {}
    branch[keys[0]] = _replaced(branch.get(keys[0]), keys[1:], value)
    return branch


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


def _accepts_only_whole_numbers(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _accepts_only_whole_numbers(get_args(annotation)[0])
    members = [member for member in get_args(annotation) if member is not type(None)]
    return annotation is int or (len(members) == 1 and _accepts_only_whole_numbers(members[0]))


def _takes_whole_numbers(path: str, axis: Axis) -> bool:
    annotation = field_type(path)
    if annotation is Any:
        return all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step or 1))
    return _accepts_only_whole_numbers(annotation)


def _canonical(space: Mapping[str, Axis]) -> dict[str, Axis]:
    """The axes with every choice and condition written as its field stores it: `last+inner` becomes `inner+last`."""
    return {
        path: axis.model_copy(
            update={
                "choices": None if axis.choices is None else tuple(_stored(path, value) for value in axis.choices),
                "when": {parent: _stored(parent, value) for parent, value in axis.when.items()},
            }
        )
        for path, axis in space.items()
    }


def _stored(path: str, value: Scalar) -> Scalar:
    annotation = field_type(path)
    if annotation is None or annotation is Any or hasattr(annotation, "model_fields"):
        return value
    try:
        stored = TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return value
    return stored if isinstance(stored, bool | int | float | str | None) else value


def _problems_of_valid_parts(tree: Mapping[str, Any]) -> list[Problem]:
    """What pydantic does not get to when a field is wrong: how the other parts fit together."""

    def part(model: type[Model], key: str) -> Model | None:
        try:
            return model.model_validate(tree.get(key, {}))
        except ValidationError:
            return None

    given = tree.get("space")
    space = given if isinstance(given, Mapping) else {}
    axes: dict[str, Axis] = {}
    for path, axis in space.items():
        try:
            axes[str(path)] = Axis.model_validate(axis)
        except ValidationError:
            continue
    axes = _canonical(axes)
    search = part(SearchSpec, "search") if axes and len(axes) == len(space) else None
    return [
        *_space_problems(axes, whole=len(axes) == len(space)),
        *_study_problems(axes, part(TrialSpec, "trial"), search, part(ObjectiveSpec, "objective"), part(StoppingSpec, "stopping")),
    ]


def _space_problems(space: Mapping[str, Axis], whole: bool = True) -> Iterator[Problem]:
    for path, axis in space.items():
        yield from _axis_problems(path, axis)
        if axis.when and axis.role == "scientific":
            yield Problem("condition", "a scientific axis cannot be conditional: its values are arms", f"space/{path}/when", "remove `when`")
        for parent, value in axis.when.items():
            where = f"space/{path}/when"
            if parent == path or (whole and parent not in space):
                yield Problem("condition", f"the condition names no other axis (got {parent!r})", where, "name a path of `space`")
            elif parent in space and space[parent].choices is not None and value not in (space[parent].choices or ()):
                choices = ", ".join(map(_shown, space[parent].choices or ()))
                yield Problem("condition", f"{parent} never takes this value (got {_shown(value)})", where, f"use one of {choices}")
    if all(path in space for path in PRODUCT):
        yield Problem("product", "lr, weight_decay and intrinsic_lr cannot all be axes: any two fix the third", "space", "remove one of them")


def _axis_problems(path: str, axis: Axis) -> Iterator[Problem]:
    annotation, where = field_type(path), f"space/{path}"
    if annotation is None:
        near = get_close_matches(path, _fields(), n=1)
        yield Problem(
            "no-such-field", f"a trial has no such field (got {path!r})", where, f"did you mean {near[0]!r}?" if near else "see `study schema`"
        )
        return
    if hasattr(annotation, "model_fields"):
        yield Problem(
            "section", f"{path!r} is a section, not a field", where, f"vary a field of it, such as {path}.{next(iter(annotation.model_fields))}"
        )
        return
    if axis.choices is not None and len(set(map(repr, axis.choices))) < len(axis.choices):
        yield Problem("choice", f"choices repeat a value (got {', '.join(map(_shown, axis.choices))})", where, "keep each once")
    if annotation is Any:
        return
    if axis.step is not None and _accepts_only_whole_numbers(annotation) and axis.step != int(axis.step):
        yield Problem("step", f"{path} takes whole numbers only (got step {axis.step})", where, "use a whole step")
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    for value in axis.endpoints():
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            sentence, _, remedy = _sentence(error.errors()[0]).partition("; ")
            shown = "" if "(got" in sentence else f" (got {_shown(value)})"
            yield Problem("choice", f"{sentence}{shown}", where, remedy or f"use values that {path} takes")


def _study_problems(
    space: Mapping[str, Axis], trial: TrialSpec | None, search: SearchSpec | None, objective: ObjectiveSpec | None, stopping: StoppingSpec | None
) -> Iterator[Problem]:
    """How the parts of a study fit together; parts that are None are not valid yet, and not looked at."""
    if search is not None:
        yield from _search_problems(space, search)
    if trial is not None and objective is not None:
        yield from _objective_problems(trial, objective)
    if trial is not None and stopping is not None and stopping.scheduler != "none" and "schedule.epochs" not in space:
        grace, epochs = stopping.grace, trial.schedule.epochs
        if grace > epochs:
            yield Problem(
                "grace", f"grace is longer than a trial (got {grace} of {epochs} epochs)", "stopping/grace", "lower it, or use scheduler: none"
            )


def _search_problems(space: Mapping[str, Axis], search: SearchSpec) -> Iterator[Problem]:
    number, trials = len(arms(space)), search.trials
    if trials % number:
        below, above = trials - trials % number, trials + number - trials % number
        near = f"{below} or {above}" if below else f"{above}"
        yield Problem("arms", f"trials must divide evenly over {number} arms (got {trials})", "search/trials", f"use {near}")
    for path, axis in space.items() if search.sampler == "grid" else ():
        if axis.choices is None and axis.step is None and not _takes_whole_numbers(path, axis):
            yield Problem("grid", "a grid needs choices or a step on every axis", f"space/{path}", "list choices, or use another sampler")


def _objective_problems(trial: TrialSpec, objective: ObjectiveSpec) -> Iterator[Problem]:
    known = (*trial.measured(), *LAYER_METRICS)
    if objective.metric not in known:
        yield Problem("metric", f"no trial reports this metric (got {objective.metric!r})", "objective/metric", f"use one of {', '.join(known)}")
    elif objective.metric.startswith("val/") and trial.data.validation == 0 and not trial.data.name.startswith("import:"):
        yield Problem(
            "metric", "a validation metric needs validation images (got data.validation 0)", "objective/metric", "set trial.data.validation above 0"
        )


def _combination_problems(spec: StudySpec) -> Iterator[Problem]:
    """Values that are valid alone but not together, each reported once."""
    told: set[tuple[str, str]] = set()
    for where, assignment in islice(_corners(spec), MAX_COMBINATIONS):
        try:
            spec.trial_for(assignment)
        except SpecError as error:
            message = error.problems[0].message
            if (where, message) not in told:
                told.add((where, message))
                shown = ", ".join(f"{path}={word(value)}" for path, value in assignment.items())
                yield Problem("combination", f"does not make a trial with {shown}: {message}", where, "change the axes, or tie them with `when`")


def _corners(spec: StudySpec) -> Iterator[tuple[str, Assignment]]:
    """Assignments that search may draw, with the place to blame: every arm, and every end of an axis while the others stay at their first value."""
    first = {path: axis.endpoints()[0] for path, axis in spec.nuisance.items()}
    for arm in spec.arms:
        yield "space", _active(spec.space, {**first, **arm})
        for path, axis in spec.nuisance.items():
            for value in axis.endpoints()[1:]:
                yield f"space/{path}", _active(spec.space, {**first, **arm, path: value})


def _active(space: Mapping[str, Axis], values: Assignment) -> Assignment:
    """The values without those of axes whose condition does not hold."""
    held = {path: value for path, value in values.items() if all(values.get(parent, ...) == wanted for parent, wanted in space[path].when.items())}
    return held if held == values else _active(space, held)


@cache
def _fields() -> tuple[str, ...]:
    found: list[str] = []
    for section, info in TrialSpec.model_fields.items():
        inner = getattr(info.annotation, "model_fields", None)
        found += [f"{section}.{field}" for field in inner] if inner else [section]
    return tuple(found)


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
        if (isinstance(tree, Mapping) and part in tree) or (isinstance(tree, list | tuple) and isinstance(part, int)):
            tree = tree[part]  # type: ignore[index]
        elif details["type"] != "missing" or not isinstance(tree, Mapping):
            break
        keys.append(str(part))
    return keys


def _problem(details: ErrorDetails, keys: Sequence[str], model: type[BaseModel]) -> Problem:
    where = "/".join(keys)
    if details["type"] == "extra_forbidden":
        near = get_close_matches(keys[-1], _siblings(keys[:-1], model), n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]!r}?" if near else "remove it; `study schema` lists the keys"
        return Problem("unknown-key", f"unknown key (got {_shown(keys[-1])})", where, remedy)
    if details["type"] == "missing":
        return Problem("missing", "is required", where, "add it")
    sentence, _, remedy = _sentence(details).partition("; ")
    shown = "" if isinstance(details["input"], Mapping) or "(got" in sentence else f" (got {_shown(details['input'])})"
    return Problem("value", f"{sentence}{shown}", where, remedy or "see `study schema` for what it takes")


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
        if key == "space":
            return list(Axis.model_fields) if len(keys) == 2 else []
        model = getattr(getattr(model, "model_fields", {}).get(key), "annotation", None)
    return list(getattr(model, "model_fields", {}))


def _located(problem: Problem, source: str, lines: Mapping[tuple[str, ...], int]) -> tuple[int, Problem]:
    keys = tuple(problem.where.split("/")) if problem.where else ()
    line = next((lines[keys[:depth]] for depth in range(len(keys), 0, -1) if keys[:depth] in lines), 1)
    where = ".".join(keys)
    if line == _OVERRIDDEN:
        where = f"--set {where}"
    elif source:
        where = f"{source}:{line}: {where}".removesuffix(": ")
    return line, replace(problem, where=where)


def _shown(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
        case int() if abs(value) > 10**60:
            return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"
