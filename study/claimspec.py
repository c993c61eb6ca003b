"""ClaimSpec: a falsifiable statement about the study's own table of trials, and whether it fits the study.

    claim ─┬─ where      which trials count                              {equilibrated: true, optimizer.weight_decay: {above: 0}}
           ├─ level      how large a column is                           {metric: final/rotation_ratio/median}
           ├─ slope      how one column grows with another               {y: final/rotation/median, x: optimizer.lr, log: true}
           │  contrast   one arm against another                         {metric: val/error, arm: optimizer.gamma, a: last, b: none}
           │  spread     how far the values of a group lie apart         {metric: val/error, over: optimizer.lr, by: seed}
           │  rank       the order of all arms                           {metric: val/error, arm: optimizer.gamma}
           └─ expect     what must then hold                             {between: [0.45, 0.55]}, {below: 0.7}, {first: last}

`study.results.claims` tests them. Claims decide nothing about the trials: they are no part of the spec hash and may be added later.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from study.errors import Problem
from study.fields import all_fields, field_type, refusal, stored
from study.problems import shown
from study.space import Axis, Frozen, Number, Scalar, arm_label, arms
from study.trial import PROBES, TrialSpec

OWN_COLUMNS = ("trial_id", "arm", "outcome", "reason", "replicate_of", "equilibrated", "value", "step", "epoch", "seconds", "run_id")
"""Columns of the table of trials beside the fields of a trial and its metrics."""

REPLICATE = "replicate"
"""The condition that selects replicates."""

EQUILIBRATED = "equilibrated"
"""The condition that selects trials in equilibrium."""

FAMILIES = ("effective_lr", "rotation", "rotation_ratio", "weight_norm", "gamma_rms", "gamma_distance", "gamma_dead")
"""Metrics by layer or place, such as `rotation/<layer>`: which layers there are is not known before a trial runs."""

FORMS = ("level", "slope", "contrast", "spread", "rank")
"""What a claim may measure."""

COMPARISONS = ("below", "above", "between")
"""Expectations of a number."""


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Column: TypeAlias = Annotated[str, Field(min_length=1)]
_ONE_OR_MORE = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
Columns: TypeAlias = Annotated[tuple[Column, ...], BeforeValidator(_listed), WithJsonSchema(_ONE_OR_MORE)]
"""Columns by name; a single one needs no list."""


def _given(model: Frozen, nullable: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields that say something, by the names that a spec has for them: of *nullable* ones a null that was given says something, too."""
    fields = type(model).model_fields
    values = {name: getattr(model, name) for name in fields}
    kept = {name: value for name, value in values.items() if value is not None or (name in nullable and name in model.model_fields_set)}
    return {fields[name].alias or name: value for name, value in kept.items()}


class Condition(Frozen):
    """Which values of a column count: one value (written by itself), or all that fit every bound that is given."""

    equals: Scalar = None
    """This value; `column: value` says the same."""
    above: Number | None = None
    """Numbers greater than this."""
    below: Number | None = None
    """Numbers smaller than this."""
    between: tuple[Number, Number] | None = None
    """Numbers from the first to the second, both included."""
    one_of: tuple[Scalar, ...] | None = Field(default=None, alias="in", min_length=1)
    """Any of these values."""

    @model_validator(mode="before")
    @classmethod
    def _value_by_itself(cls, given: object) -> object:
        if isinstance(given, list | tuple):
            raise ValueError("a condition on several values is written {in: [...]}")
        return given if isinstance(given, Mapping | Condition) else {"equals": given}

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if not self.given:
            raise ValueError("a condition needs a value, above, below, between or in")
        _check_order(self.between)
        return self

    @model_serializer
    def _as_written(self) -> Any:
        return self.equals if list(self.given) == ["equals"] else self.given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        whole = handler.resolve_ref_schema(handler(schema))
        plain = {"type": ["boolean", "number", "string", "null"]}
        description = whole.pop("description", "")
        return {"description": description, "anyOf": [plain, dict(whole)]}

    @property
    def given(self) -> dict[str, Any]:
        """What was given, by the names that a spec has for it."""
        return _given(self, nullable=("equals",))

    def values(self) -> tuple[Scalar, ...]:
        """The values that it names one by one."""
        return (*((self.equals,) if "equals" in self.given else ()), *(self.one_of or ()))

    def translated(self, change: Callable[[Scalar], Scalar]) -> "Condition":
        """The same condition with every named value changed."""
        given = self.given
        named = {"equals": change(self.equals)} if "equals" in given else {}
        several = {"in": [change(value) for value in self.one_of]} if self.one_of else {}
        return Condition.model_validate({**given, **named, **several})


class Level(Frozen):
    """How large a column is, on average over each seed's trials."""

    metric: Columns = Field(min_length=1)
    """The column that is looked at; of a list, what `statistic` says of each trial's values, such as those of several layers."""
    statistic: Literal["mean", "min", "max"] = "mean"
    """Which number stands for several metrics of one trial."""


class Slope(Frozen):
    """The slope of a straight line through the trials of each seed."""

    y: Columns = Field(min_length=1)
    """The column that is explained; of a list, the mean, such as that of several layers (of logarithms, where these are fitted)."""
    x: Columns = Field(min_length=1)
    """The column that explains it; of a list, the product."""
    log: bool = False
    """Fit logarithms: the slope is then an exponent."""


class Contrast(Frozen):
    """One arm against another: how much larger a metric is in arm `a` than in arm `b`."""

    metric: Column
    """The column that is compared."""
    arm: Column
    """The scientific axis whose values are compared."""
    a: Scalar
    """The value whose trials come first: `a - b`, or `a / b`."""
    b: Scalar
    """The value that it is compared with."""
    statistic: Literal["difference", "ratio"] = "difference"
    """`difference` of means, or `ratio` of geometric means."""
    paired_by: Columns = ()
    """Fields in which the two trials of a pair agree, such as `seed`; each trial needs exactly one partner. None compares unpaired."""

    @model_serializer
    def _as_written(self) -> Any:
        return _given(self, nullable=("a", "b"))


class Spread(Frozen):
    """How far the values of a group lie apart, in each seed."""

    metric: Columns = Field(min_length=1)
    """The column whose values are looked at; of a list, all of them together, such as the rotations of several layers."""
    over: Columns = ()
    """Columns that vary within a group: trials that agree in them are averaged first."""
    by: Columns = ()
    """Columns that are the same within a group; the spreads of a seed's groups are averaged."""
    statistic: Literal["max_over_min", "relative_range", "std"] = "max_over_min"
    """Largest over smallest value, their distance over the mean's size, or the standard deviation."""
    against: dict[Column, Condition] = Field(default_factory=dict, exclude_if=operator.not_)
    """The spread is divided by the same seed's spread of the trials that meet these conditions, in place of the claim's `where`."""

    @model_validator(mode="after")
    def _has_a_group(self) -> "Spread":
        if not self.over and len(self.metric) < 2:
            raise ValueError("a spread needs several values; name in `over` what varies, or several metrics")
        return self


class Rank(Frozen):
    """The order of the arms by a metric."""

    metric: Column
    """The column that arms are ranked by."""
    arm: Column
    """The scientific axis whose values are ranked."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which end is better."""
    paired_by: Columns = ()
    """Fields in which trials of different arms are paired, as in a contrast."""


class Expectation(Frozen):
    """What must hold of the measured number, or of the order of the arms; exactly one of these."""

    below: Number | None = None
    """It is smaller than this."""
    above: Number | None = None
    """It is greater than this."""
    between: tuple[Number, Number] | None = None
    """It lies between these, both included."""
    first: Scalar = None
    """This arm is better than every other one (rank)."""
    order: tuple[Scalar, ...] | None = Field(default=None, min_length=2)
    """These arms, each better than the next (rank)."""

    @model_validator(mode="after")
    def _is_one(self) -> "Expectation":
        if len(self.given) != 1:
            got = ", ".join(self.given) or "none"
            raise ValueError(f"an expectation is exactly one of below, above, between, first, order (got {got})")
        _check_order(self.between)
        return self

    @model_serializer
    def _as_written(self) -> Any:
        return self.given

    @property
    def given(self) -> dict[str, Any]:
        """The one that was given, by its name."""
        return _given(self, nullable=("first",))


class ClaimSpec(Frozen):
    """One claim: which trials, what is measured on them, and what is expected of it."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]
    """Lower-case letters, digits and dashes; once in a study."""
    says: Annotated[str, Field(min_length=1)]
    """The claim in one sentence."""
    source: str = ""
    """Where it comes from, such as arXiv:1706.05350."""
    where: dict[Column, Condition] = Field(default_factory=dict)
    """Which completed trials count: column to value, or to `{above, below, between, in}`. `replicate: true` selects replicates, `equilibrated: true` trials whose scale-invariant layers all had five relaxation times."""
    level: Level | None = None
    """How large a column is."""
    slope: Slope | None = None
    """How a column grows with another."""
    contrast: Contrast | None = None
    """How much one arm differs from another."""
    spread: Spread | None = None
    """How far the values of a group lie apart."""
    rank: Rank | None = None
    """Which arm is best."""
    expect: Expectation
    """What must hold."""

    @model_validator(mode="after")
    def _is_one_form(self) -> "ClaimSpec":
        forms = [name for name in FORMS if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"a claim is exactly one of {', '.join(FORMS)} (got {', '.join(forms) or 'none'})")
        (expected,) = self.expect.given
        if forms == ["rank"] and expected in COMPARISONS:
            raise ValueError(f"a rank expects first or order (got {expected})")
        if forms != ["rank"] and expected not in COMPARISONS:
            raise ValueError(f"a {forms[0]} expects below, above or between (got {expected})")
        return self

    @property
    def form(self) -> Level | Slope | Contrast | Spread | Rank:
        """What is measured."""
        form = self.level or self.slope or self.contrast or self.spread or self.rank
        assert form is not None, f"the claim {self.id} has no form"
        return form


def canonical_claim(claim: ClaimSpec) -> ClaimSpec:
    """The claim with every value of a field written as the field stores it: `last+inner` becomes `inner+last`."""
    where = _canonical_conditions(claim.where)
    form, expect = claim.form, claim.expect
    if isinstance(form, Contrast):
        changed = form.model_copy(update={"a": stored(form.arm, form.a), "b": stored(form.arm, form.b)})
        return claim.model_copy(update={"where": where, "contrast": changed})
    if isinstance(form, Rank):
        named = {"first": stored(form.arm, expect.first)} if "first" in expect.given else {}
        several = {"order": tuple(stored(form.arm, value) for value in expect.order)} if expect.order else {}
        return claim.model_copy(update={"where": where, "expect": expect.model_copy(update={**named, **several})})
    if isinstance(form, Spread):
        changed_spread = form.model_copy(update={"against": _canonical_conditions(form.against)})
        return claim.model_copy(update={"where": where, "spread": changed_spread})
    return claim.model_copy(update={"where": where})


def _canonical_conditions(conditions: Mapping[str, Condition]) -> dict[str, Condition]:
    return {path: condition.translated(partial(stored, path)) for path, condition in conditions.items()}


def claim_problems(claims: Mapping[int, ClaimSpec], space: Mapping[str, Axis], trial: TrialSpec | None, objective: str | None) -> Iterator[Problem]:
    """What is wrong between claims and the study that they speak of.

    Args:
        claims: The claims by their position.
        space: The axes by path.
        trial: The base trial; None where it is not valid, and not looked at.
        objective: The objective's metric; None where it is not known.
    """
    seen: set[str] = set()
    for position, claim in claims.items():
        at = f"claims/{position}"
        if claim.id in seen:
            yield Problem("claim", f"two claims have this id (got {claim.id!r})", f"{at}/id", "give one of them another")
        seen.add(claim.id)
        against = claim.spread.against if claim.spread is not None else {}
        for name, conditions in (("where", claim.where), ("spread/against", against)):
            for path, condition in conditions.items():
                yield from _condition_problems(path, condition, f"{at}/{name}/{path}", space, trial, objective)
            if trial is not None and True in (conditions[EQUILIBRATED].values() if EQUILIBRATED in conditions else ()):
                yield from _equilibrium_problems(f"{at}/{name}/{EQUILIBRATED}", space, trial)
        yield from _form_problems(claim, at, space, trial, objective)


def _check_order(bounds: tuple[Number, Number] | None) -> None:
    if bounds is not None and bounds[0] > bounds[1]:
        raise ValueError(f"between goes from the smaller to the larger number (got {list(bounds)})")


def _condition_problems(
    path: str, condition: Condition, where: str, space: Mapping[str, Axis], trial: TrialSpec | None, objective: str | None
) -> Iterator[Problem]:
    if path in (REPLICATE, EQUILIBRATED):
        if any(not isinstance(value, bool) for value in condition.values()) or list(condition.given) != ["equals"]:
            yield Problem("claim", f"{path} is true or false", where, f"write {path}: true")
        return
    yield from _column_problems(path, where, trial, objective)
    labels = [arm_label(arm) for arm in arms(space)]
    for value in condition.values():
        if path == "arm" and value not in labels:
            yield Problem("claim", f"no arm has this label (got {shown(value)})", where, f"use one of {', '.join(map(repr, labels))}")
        elif (said := refusal(path, value)) is not None:
            yield Problem("claim", said[0], where, said[1] or f"use values that {path} takes")


def _form_problems(claim: ClaimSpec, at: str, space: Mapping[str, Axis], trial: TrialSpec | None, objective: str | None) -> Iterator[Problem]:
    name = next(name for name in FORMS if getattr(claim, name) is not None)
    form, where = claim.form, f"{at}/{name}"
    columns = {field: getattr(form, field, ()) for field in ("y", "x", "metric", "over", "by", "paired_by")}
    for field, named in columns.items():
        for column in (named,) if isinstance(named, str) else named:
            yield from _column_problems(column, f"{where}/{field}", trial, objective)
    if isinstance(form, Contrast):
        yield from _arm_problems(form.arm, {"a": form.a, "b": form.b}, where, f"{where}/", space)
    elif isinstance(form, Rank):
        order = dict.fromkeys(claim.expect.order or ())
        if len(order) < len(claim.expect.order or ()):
            yield Problem("claim", "the order names an arm twice", f"{at}/expect/order", "keep each once")
        named = {"first": claim.expect.first} if "first" in claim.expect.given else {f"order/{index}": value for index, value in enumerate(order)}
        yield from _arm_problems(form.arm, named, where, f"{at}/expect/", space)


def _arm_problems(arm: str, named: Mapping[str, Scalar], where: str, values: str, space: Mapping[str, Axis]) -> Iterator[Problem]:
    axis = space.get(arm)
    scientific = [path for path, other in space.items() if other.role == "scientific"]
    if axis is None or axis.role != "scientific":
        remedy = f"use one of {', '.join(scientific)}" if scientific else "give an axis of `space` the role scientific"
        yield Problem("claim", f"is no scientific axis of the space (got {arm!r})", f"{where}/arm", remedy)
        return
    choices = axis.choices or ()
    for field, value in named.items():
        if value not in choices:
            remedy = f"use one of {', '.join(map(shown, choices))}"
            yield Problem("claim", f"{arm} never takes this value (got {shown(value)})", f"{values}{field}", remedy)
    if len(named) > len(set(named.values())):
        yield Problem("claim", f"compares an arm with itself (got {shown(next(iter(named.values())))})", where, "name two different arms")


def _equilibrium_problems(where: str, space: Mapping[str, Axis], trial: TrialSpec) -> Iterator[Problem]:
    """A learning rate that changes leaves no trial in equilibrium."""
    for field, wanted in (("shape", "constant"), ("warmup", 0)):
        path = f"schedule.{field}"
        values = space[path].endpoints() if path in space else (getattr(trial.schedule, field),)
        wrong = [value for value in values if value != wanted]
        if wrong:
            remedy = f"{'vary it no more' if path in space else f'set trial.{path} to {wanted}'}, or leave the condition out"
            yield Problem("claim", f"trials in equilibrium need {path}: {wanted} (got {shown(wrong[0])})", where, remedy)


def _column_problems(name: str, where: str, trial: TrialSpec | None, objective: str | None) -> Iterator[Problem]:
    """Whether the table of trials will have a column of this name, as far as that is known before any trial has run."""
    kind = field_type(name)
    if hasattr(kind, "model_fields"):
        yield Problem("claim", f"{name!r} is a section, not a field", where, f"name a field of it, such as {name}.{next(iter(kind.model_fields))}")
    elif kind is None and name not in OWN_COLUMNS and trial is not None:
        yield from _metric_problems(name, where, trial, objective)


def _metric_problems(name: str, where: str, trial: TrialSpec, objective: str | None) -> Iterator[Problem]:
    measured = trial.measured()
    base, probe = name.removeprefix("final/").removeprefix("best/"), name.removeprefix("final/").partition("/")[0]
    if name.startswith("best/") and objective is not None and base != objective:
        yield Problem("claim", f"only the objective has a best value (got {name!r})", where, f"use best/{objective}, or final/{base}")
    elif name.startswith("final/") and probe in PROBES and "/" in base:
        if probe not in trial.probes:
            yield Problem("claim", f"no trial measures this (got {name!r})", where, f"add {probe} to trial.probes")
    elif base not in (*measured, EQUILIBRATED) and not (base.partition("/")[0] in FAMILIES and "/" in base) and not _is_tested(base, measured):
        known = (*all_fields(), *OWN_COLUMNS, *measured, *(f"final/{metric}" for metric in measured), *(f"{family}/median" for family in FAMILIES))
        near = get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "name a field of a trial, or a metric such as final/val/error"
        yield Problem("claim", f"the table of trials has no such column (got {name!r})", where, remedy)


def _is_tested(metric: str, measured: tuple[str, ...]) -> bool:
    """Whether replicates measure it on the test images."""
    return metric.startswith("test/") and f"val/{metric.removeprefix('test/')}" in measured
