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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from study.errors import NotFound, Problem, SpecError
from study.space import Assignment, Axis, Frozen, arms
from study.trial import NonNegative, Seed, TrialSpec

MAX_BYTES = 1_000_000
"""A spec larger than this is refused unread."""

MAX_NODES = 20_000
"""Values in a spec after anchors are expanded; more is refused, so that a small file cannot fill the memory."""

PRODUCT = ("optimizer.lr", "optimizer.weight_decay", "optimizer.intrinsic_lr")
"""Three fields of which two are free."""

LAYER_METRICS = ("effective_lr/median", "rotation/median", "rotation_ratio/median")
"""Summaries of the layers that can serve as an objective."""

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


class SearchSpec(Frozen):
    """How assignments are drawn, and how many."""

    trials: PositiveInt
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
    grace: PositiveInt = 4
    """Epochs that every trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One in so many trials goes on at each rung (asha)."""


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
    cpus_per_trial: PositiveInt = 1
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
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]
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
        return {path: _canonical(path, axis) for path, axis in space.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [*_space_problems(self.space), *_study_problems(self)]
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
        axis, annotation = self.space[path], field_type(path)
        if annotation is Any:
            return all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step or 1))
        return _accepts_only_whole_numbers(annotation)

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
        try:
            return TrialSpec.model_validate(tree)
        except ValidationError as error:
            raise SpecError(_from_pydantic(error, tree)) from error

    def spec_hash(self) -> str:
        """SHA-256 over everything that decides what the trials are; changes elsewhere are allowed on resume."""
        whole = self.model_dump(mode="json", include={"space": True, "search": {"sampler", "seed"}, "objective": True, "stopping": True})
        text = json.dumps({**whole, "trial": self.trial.canonical()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The spec with every default filled in, as YAML that loads back to an equal spec."""
        tree = {**self.model_dump(mode="json", exclude_none=True), "trial": self.trial.canonical()}
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


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
    document = read_document(path)
    tree = document.tree
    for override in overrides:
        tree = _override(tree, override)
    return check(tree, str(path), document.lines)


def check(tree: object, source: str = "", lines: Mapping[tuple[str, ...], int] | None = None) -> StudySpec:
    """Turns plain values into a StudySpec.

    Raises:
        SpecError: with every problem found.
    """
    if not isinstance(tree, Mapping):
        problem = Problem("shape", f"a spec is a mapping of fields (got {_shown(tree)})", source, "start with `name: my-study`")
        raise SpecError([problem])
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        problems = [*_from_pydantic(error, tree), *_space_problems(_valid_axes(tree))]
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
        SpecError: if it is unreadable, too large, not UTF-8, empty, not YAML, or uses tags.
    """

    def refuse(kind: str, message: str, remedy: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(kind, message, f"{path}:{line}" if line else str(path), remedy)])

    try:
        if path.stat().st_size > MAX_BYTES:
            size = path.stat().st_size / 1e6
            raise refuse("too-large", f"a spec has at most {MAX_BYTES / 1e6:g} MB (got {size:.1f} MB)", "is this the right file?")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path), remedy="check the path, or start from one in search_spaces/") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise refuse("encoding", f"is not UTF-8 (byte 0x{byte:02x} at offset {error.start})", "save it as UTF-8 text") from None
    except OSError as error:
        raise refuse("unreadable", f"cannot be read ({error.strerror})", "check that it is a file that you may read") from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise refuse("empty", "is empty", "start with `name: my-study`")
        lines: dict[tuple[str, ...], int] = {}
        for count, (where, node) in enumerate(_walk(root)):
            if count > MAX_NODES:
                raise refuse("too-large", f"holds more than {MAX_NODES} values once anchors are expanded", "write out what you need")
            lines.setdefault(where, node.start_mark.line + 1)
        return Document(loader.construct_document(root), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "cannot be parsed"
        if isinstance(error, yaml.constructor.ConstructorError):
            reason = f"{reason}; a spec holds plain values only, tags are not allowed"
        raise refuse("yaml", f"is not valid YAML: {reason}", "mend the line", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise refuse("yaml", f"is not valid YAML: {error}", "mend the file") from None
    except RecursionError:
        raise refuse("too-deep", "nests too deeply", "a spec needs a handful of levels") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, `no` and `off` as words, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> object:
    """One YAML value, read as a spec reads it."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _walk(node: yaml.Node, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    yield where, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*where, str(key.value)), key
            yield from _walk(value, (*where, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk(value, (*where, str(index)))


def _override(tree: object, override: str) -> object:
    path, equals, text = override.partition("=")
    if not equals or not isinstance(tree, Mapping):
        raise SpecError([Problem("override", f"an override is path=value (got {override!r})", "--set", "for example --set search.trials=10")])
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise SpecError([Problem("override", f"the value is not YAML (got {text!r})", f"--set {path}", "quote it")]) from None
    return _replaced(tree, _keys(tree, path), value)


def _keys(tree: Mapping[str, Any], path: str) -> list[str]:
    if not path.startswith("space."):
        return path.split(".")
    axis = path.removeprefix("space.")
    for name in tree.get("space") or {}:
        if axis.startswith(f"{name}."):
            return ["space", name, *axis.removeprefix(f"{name}.").split(".")]
    return ["space", axis]


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


def _canonical(path: str, axis: Axis) -> Axis:
    annotation = field_type(path)
    if axis.choices is None or annotation is None or annotation is Any or hasattr(annotation, "model_fields"):
        return axis
    try:
        choices = tuple(TypeAdapter(annotation).validate_python(value) for value in axis.choices)
    except ValidationError:
        return axis
    return axis.model_copy(update={"choices": choices})


def _valid_axes(tree: Mapping[str, Any]) -> dict[str, Axis]:
    space = tree.get("space")
    found: dict[str, Axis] = {}
    for path, axis in space.items() if isinstance(space, Mapping) else ():
        try:
            found[str(path)] = Axis.model_validate(axis)
        except ValidationError:
            continue
    return found


def _space_problems(space: Mapping[str, Axis]) -> Iterator[Problem]:
    for path, axis in space.items():
        yield from _axis_problems(path, axis)
        for parent, value in axis.when.items():
            where = f"space/{path}/when"
            if parent not in space:
                yield Problem("condition", f"the condition names no axis (got {parent!r})", where, "name a path of `space`")
            elif space[parent].choices is not None and value not in (space[parent].choices or ()):
                yield Problem(
                    "condition", f"{parent} never takes this value (got {_shown(value)})", where, f"use one of {list(space[parent].choices or ())}"
                )
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
    if annotation is Any:
        return
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    for value in axis.endpoints():
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            yield Problem("choice", f"{_sentence(error.errors()[0])} (got {_shown(value)})", where, f"use values that {path} takes")


def _study_problems(spec: StudySpec) -> Iterator[Problem]:
    number, trials = len(spec.arms), spec.search.trials
    if trials % number:
        below, above = trials - trials % number, trials + number - trials % number
        near = f"{below} or {above}" if below else f"{above}"
        yield Problem("arms", f"trials must divide evenly over {number} arms (got {trials})", "search/trials", f"use {near}")
    known = (*spec.trial.measured(), *LAYER_METRICS)
    if spec.objective.metric not in known:
        yield Problem("metric", f"no trial reports this metric (got {spec.objective.metric!r})", "objective/metric", f"use one of {', '.join(known)}")
    elif spec.objective.metric.startswith("val/") and spec.trial.data.validation == 0 and not spec.trial.data.name.startswith("import:"):
        yield Problem(
            "metric", "a validation metric needs validation images (got data.validation 0)", "objective/metric", "set trial.data.validation above 0"
        )
    if spec.stopping.scheduler != "none" and spec.stopping.grace > spec.trial.schedule.epochs and "schedule.epochs" not in spec.space:
        grace, epochs = spec.stopping.grace, spec.trial.schedule.epochs
        yield Problem("grace", f"grace is longer than a trial (got {grace} of {epochs} epochs)", "stopping/grace", "lower it, or use scheduler: none")
    if spec.search.sampler == "grid":
        for path, axis in spec.nuisance.items():
            if axis.choices is None and axis.step is None and not spec.integer(path):
                yield Problem("grid", "a grid needs choices or a step on every axis", f"space/{path}", "list choices, or use another sampler")


@cache
def _fields() -> tuple[str, ...]:
    found: list[str] = []
    for section, info in TrialSpec.model_fields.items():
        inner = getattr(info.annotation, "model_fields", None)
        found += [f"{section}.{field}" for field in inner] if inner else [section]
    return tuple(found)


def _from_pydantic(error: ValidationError, tree: Mapping[str, Any]) -> list[Problem]:
    found: dict[str, Problem] = {}
    for details in error.errors(include_url=False):
        keys = _known_keys(details, tree)
        where = "/".join(keys)
        found.setdefault(where + details["type"] * (details["type"] == "extra_forbidden"), _problem(details, keys, where))
    return list(found.values())


def _known_keys(details: ErrorDetails, tree: object) -> list[str]:
    """The error's location without the steps that pydantic adds for unions and validators."""
    keys: list[str] = []
    for part in details["loc"]:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, Sequence) and not isinstance(tree, str) and isinstance(part, int):
            tree = tree[part]
        elif details["type"] != "missing" or not isinstance(tree, Mapping):
            break
        keys.append(str(part))
    return keys


def _problem(details: ErrorDetails, keys: Sequence[str], where: str) -> Problem:
    if details["type"] == "extra_forbidden":
        near = get_close_matches(keys[-1], _siblings(keys[:-1]), n=1, cutoff=0.6)
        return Problem(
            "unknown-key",
            f"unknown key (got {keys[-1]!r})",
            where,
            f"did you mean {near[0]!r}?" if near else "remove it; `study schema` lists the keys",
        )
    if details["type"] == "missing":
        return Problem("missing", "is required", where, "add it")
    got = details["input"]
    shown = "" if isinstance(got, Mapping) or "(got" in details["msg"] else f" (got {_shown(got)})"
    return Problem("value", f"{_sentence(details)}{shown}", where, "see `study schema` for what it takes")


def _sentence(details: ErrorDetails) -> str:
    text = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if details["type"] == "string_pattern_mismatch":
        text = "must be lower-case letters, digits and dashes"
    return text[:1].lower() + text[1:]


def _siblings(keys: Sequence[str]) -> list[str]:
    model: Any = StudySpec
    for key in keys:
        if model is Axis or key in ("when",):
            return []
        if key == "space":
            model = {"*": Axis}
            continue
        model = model["*"] if isinstance(model, dict) else getattr(model.model_fields.get(key), "annotation", None)
        if not (isinstance(model, dict) or hasattr(model, "model_fields")):
            return []
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _located(problem: Problem, source: str, lines: Mapping[tuple[str, ...], int]) -> tuple[int, Problem]:
    keys = tuple(problem.where.split("/")) if problem.where else ()
    line = next((lines[keys[:depth]] for depth in range(len(keys), 0, -1) if keys[:depth] in lines), 0)
    where = ".".join(keys)
    if source:
        where = f"{source}:{line or 1}: {where}".removesuffix(": ")
    return line, replace(problem, where=where)


def _shown(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() if len(value) > 60:
            return repr(value[:57] + "...")
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
    return repr(value)
