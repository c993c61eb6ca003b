"""StudySpec: a trial with holes. Reads a spec, checks all of it at once, and turns assignments into trials.

YAML or JSON ─read─> tree and line numbers ─override─> tree ─check─> StudySpec ─trial_for(assignment)─> TrialSpec
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator, model_validator

from study.claimspec import ClaimSpec, canonical_claim, claim_problems
from study.credentials import credential_problems
from study.document import Document, overridden, read_document, to_yaml
from study.errors import Problem, SpecError
from study.fields import canonical, space_problems, takes_whole_numbers
from study.optimizer import PRODUCT
from study.problems import Lines, Model, validated
from study.space import Assignment, Axis, Count, Frozen, NonNegative, Real, Seed, arms, not_a_boolean, word
from study.stoppingspec import StoppingSpec, population_problems
from study.trial import TrialSpec, flatten

MAX_COMBINATIONS = 1_000
"""How many trials are tried out when a space is checked."""

LAYER_METRICS = ("effective_lr/median", "rotation/median", "rotation_ratio/median")
"""Summaries of the layers that can serve as an objective."""

LEAST_SHARE = 0.01
"""Of a GPU, that an engine may take."""

LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""What pydantic calls limits, in words of JSON Schema."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        return float(match[1]) * _SECONDS[match[2]]
    if isinstance(value, str | bool):
        raise ValueError("a duration is a number and a unit, such as 90s, 15m, 4h or 2d")
    return value


def _share_of_a_gpu(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and LEAST_SHARE <= value <= 1):
        return value
    raise ValueError(f"must be auto or a number from {LEAST_SHARE} to 1, as an engine trains on one GPU; use 1, or 0.5 for two engines on each GPU")


_NUMBER_OR_TEXT = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": rf"^\s*{_DURATION.pattern}\s*$"}]}
"""What an editor that reads the JSON Schema takes for a duration."""
Duration: TypeAlias = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False), WithJsonSchema(_NUMBER_OR_TEXT)]
EngineShare: TypeAlias = Annotated[Literal["auto"] | Annotated[float, Field(ge=LEAST_SHARE, le=1)], BeforeValidator(_share_of_a_gpu)]
StudyName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]


class SearchSpec(Frozen):
    """How assignments are drawn, and how many; within an arm no assignment is tried twice."""

    model_config = ConfigDict(serialize_by_alias=True)

    trials: Count
    """Trials in all, over all arms; replicates are not counted."""
    sampler: Literal["tpe", "random", "sobol", "grid", "gp", "cmaes"] = "tpe"
    """How values are proposed. `grid` tries every combination once, or as many of them as there are trials."""
    seed: Seed = 0
    """Draws the proposals."""
    from_: str | None = Field(default=None, alias="from")
    """Another study to learn from: its name in the home, or its folder. Those of its trials that this study could propose, equal in every
    field, are added as results; the best completed ones of the others lend their values on shared axes to the first trials."""


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


class ReplicateSpec(Frozen):
    """Which trials are trained again with fresh seeds, so that the winner is not the luckiest; with the same ones in every arm."""

    top: Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0)] = 0
    """How many of the best completed trials of each arm; 0 replicates none."""
    seeds: Count = 5
    """How often each, at most: those that are settled to be behind get no more, and none do once the order of the arms is settled."""


class BudgetSpec(Frozen):
    """When the whole study ends, whatever is left of it."""

    wall: Duration | None = None
    """Time since the study was started or resumed, in seconds or as 90s, 15m, 4h, 2d."""
    gpu_hours: NonNegative | None = None
    """Hours of GPU, shares of a GPU counted as such, over all trials and all starts of the study: time spent training."""
    target: Real | None = None
    """The study ends with the first completed trial whose value is this good."""
    no_improvement: Count | None = None
    """The study ends when so many trials in a row have ended without a new best one."""
    same_failures: Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0)] = 3
    """The study is stopped when the first so many trials of a start all fail the same way: the others would, too. 0 never stops it."""


class ResourcesSpec(Frozen):
    """What a trial runs on."""

    engine: Literal["auto", "solo", "fused"] = "auto"
    """`solo`: one trial in one process. `fused`: many trials in one step. `auto` chooses by a self-test of the model and the measured gain."""
    cpus_per_trial: Count = 1
    """Cores that a trial reserves; each trial computes on one thread whatever this says."""
    gpus_per_trial: NonNegative = 0.0
    """Share of a GPU that a trial reserves, or a whole number of GPUs; 0 trains on the CPU."""
    slots: Literal["auto"] | Annotated[int, BeforeValidator(not_a_boolean), Field(ge=1)] = "auto"
    """How many trials one fused engine trains at once; the solo engine has one slot."""
    gpus_per_engine: EngineShare = "auto"
    """How much of a GPU one fused engine takes: 1, which is `auto`, or less, so that as many as fit share each GPU; two with 0.5. The solo
    engine takes `gpus_per_trial`."""
    max_failures: Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0)] = 3
    """How often in a row, without a new epoch in between, a trial may lose its process or node; each time it goes on from its latest snapshot."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a share of one GPU, or a whole number of them; use 0.5 for two trials on each GPU")
        return gpus

    @property
    def engines_per_gpu(self) -> int:
        """How many fused engines share one GPU; 1 where trials train on the CPU."""
        share = 1.0 if self.gpus_per_engine == "auto" or not self.gpus_per_trial else self.gpus_per_engine
        return int(1 / share + 1e-9)


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
    replicate: ReplicateSpec = Field(default_factory=ReplicateSpec)
    """Trained once the search has ended: the arms are compared by these, with common seeds."""
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    keep: KeepSpec = Field(default_factory=KeepSpec)
    claims: tuple[ClaimSpec, ...] = ()
    """Falsifiable statements about the table of trials, tested when the study ends and by `study verify`; they may be changed at any time."""

    @field_validator("claims")
    @classmethod
    def _canonical_claims(cls, claims: tuple[ClaimSpec, ...]) -> tuple[ClaimSpec, ...]:
        return tuple(map(canonical_claim, claims))

    @field_validator("space")
    @classmethod
    def _canonical_choices(cls, space: dict[str, Axis]) -> dict[str, Axis]:
        return canonical(space)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [*space_problems(self.space), *_study_problems(self.space, self.trial, self.search, self.objective, self.stopping)]
        problems += _population_problems(self.space, self.trial, self.search, self.stopping, self.replicate)
        problems += claim_problems(dict(enumerate(self.claims)), self.space, self.trial, self.objective.metric)
        problems += credential_problems(self.model_dump(mode="json", exclude_defaults=True))
        problems = problems or [*_combination_problems(self)]
        if problems:
            raise SpecError(problems)
        return self

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The JSON Schema of a spec; where a validator comes before a limit, pydantic (2.14) itself leaves `gt` there, which no editor knows."""
        schema: dict[str, Any] = _standard(super().model_json_schema(*arguments, **options))
        return schema

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
        return takes_whole_numbers(path, self.space[path])

    def trial_for(self, assignment: Mapping[str, Any]) -> TrialSpec:
        """The complete trial with the assigned fields replaced.

        Axes take precedence over the base trial: of lr, weight_decay and intrinsic_lr, the one that is not assigned follows.

        Raises:
            SpecError: if the combination is not a valid trial.
        """
        tree = self.trial.canonical()
        assignment = {**assignment, **{other: value for path, value in assignment.items() if path in self.space for other in self.space[path].also}}
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
        text = json.dumps(self._hashed(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: "StudySpec") -> list[str]:
        """The dotted paths by which the spec hashes of two studies differ."""
        ours, theirs = flatten(self._hashed()), flatten(other._hashed())
        return [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]

    def _hashed(self) -> dict[str, Any]:
        whole = self.model_dump(mode="json", include={"space": True, "search": {"sampler", "seed"}, "objective": True})
        return {**whole, "stopping": self.stopping.hashed(), "trial": self.trial.canonical()}

    def to_yaml(self) -> str:
        """The spec with every default filled in, as YAML that loads back to an equal spec."""
        tree = {**self.model_dump(mode="json", exclude_none=True), "trial": self.trial.canonical()}
        return to_yaml(tree)


def _standard(schema: Any) -> Any:
    """A JSON Schema, or a part of one, with its limits in the standard's words."""
    if isinstance(schema, list):
        return [_standard(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {LIMITS.get(key, key) if isinstance(part, int | float) else key: _standard(part) for key, part in schema.items()}


def load_spec(source: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Reads and checks a spec.

    Args:
        source: A YAML or JSON file.
        overrides: `path=value` with a YAML value, replacing any field or section.

    Raises:
        NotFound: if there is no such file.
        SpecError: with every problem of the spec, each with file, line and path.
    """
    document = document_of(source, overrides)
    return check(document.tree, str(source), document.lines)


def document_of(source: str | Path, overrides: Sequence[str]) -> Document:
    """The tree of a spec's file, and the line of each of its keys, with overrides as in `load_spec`."""
    document = read_document(Path(source))
    for override in overrides:
        document = overridden(document, override)
    return document


def check(tree: object, source: str = "", lines: Lines | None = None) -> StudySpec:
    """Turns plain values into a StudySpec; arguments and errors as in `validated`."""
    return validated(StudySpec, tree, source, lines, _problems_of_valid_parts)


def _problems_of_valid_parts(tree: Mapping[str, Any]) -> list[Problem]:
    """What pydantic does not get to when a field is wrong: how the other parts fit together."""

    def part(model: type[Model], key: str) -> Model | None:
        try:
            return model.model_validate(tree.get(key, {}))
        except ValidationError:
            return None

    space, claims = tree.get("space"), tree.get("claims")
    space = space if isinstance(space, Mapping) else {}
    axes = canonical({str(path): axis for path, axis in _valid(Axis, space).items()})
    whole = len(axes) == len(space)
    trial, objective = part(TrialSpec, "trial"), part(ObjectiveSpec, "objective")
    search = part(SearchSpec, "search") if axes and whole else None
    known = _valid(ClaimSpec, dict(enumerate(claims)) if whole and isinstance(claims, list | tuple) else {})
    return [
        *space_problems(axes, whole),
        *_study_problems(axes, trial, search, objective, part(StoppingSpec, "stopping")),
        *(_population_problems(axes, trial, search, part(StoppingSpec, "stopping"), part(ReplicateSpec, "replicate")) if whole else ()),
        *claim_problems({place: canonical_claim(claim) for place, claim in known.items()}, axes, trial, objective.metric if objective else None),
        *credential_problems(tree),
    ]


def _valid(model: type[Model], values: Mapping[Any, object]) -> dict[Any, Model]:
    """Those of the values that make a model."""
    found = {}
    for key, value in values.items():
        try:
            found[key] = model.model_validate(value)
        except ValidationError:
            continue
    return found


def _study_problems(
    space: Mapping[str, Axis], trial: TrialSpec | None, search: SearchSpec | None, objective: ObjectiveSpec | None, stopping: StoppingSpec | None
) -> Iterator[Problem]:
    """How the parts of a study fit together; parts that are None are not valid yet, and not looked at."""
    if all(path in space for path in PRODUCT):
        yield Problem("product", "lr, weight_decay and intrinsic_lr cannot all be axes: any two fix the third", "space", "remove one of them")
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


def _population_problems(
    space: Mapping[str, Axis], trial: TrialSpec | None, search: SearchSpec | None, stopping: StoppingSpec | None, replicate: ReplicateSpec | None
) -> Iterator[Problem]:
    """How the parts of a study fit population based training; None as in `_study_problems`."""
    if stopping is not None:
        epochs = None if trial is None or "schedule.epochs" in space else trial.schedule.epochs
        yield from population_problems(space, stopping, search.trials if search else None, epochs, replicate.top if replicate else 0)


def _search_problems(space: Mapping[str, Axis], search: SearchSpec) -> Iterator[Problem]:
    number, trials = len(arms(space)), search.trials
    if trials % number:
        below, above = trials - trials % number, trials + number - trials % number
        near = f"{below} or {above}" if below else f"{above}"
        yield Problem("arms", f"trials must divide evenly over {number} arms (got {trials})", "search/trials", f"use {near}")
    for path, axis in space.items() if search.sampler == "grid" else ():
        if axis.choices is None and axis.step is None and not takes_whole_numbers(path, axis):
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
