"""Axes: how one field may vary. An axis knows nothing of the trial whose field it varies.

optimizer.lr:    {low: 1.0e-3, high: 1.0, log: true}                an interval
model.width:     {low: 8, high: 32, step: 8}                        a grid on an interval
optimizer.gamma: {choices: [none, all, last], role: scientific}     a list; its values are arms
"""

import operator
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Scalar: TypeAlias = bool | int | float | str | None
Assignment: TypeAlias = dict[str, Any]
"""One value per active axis, by dotted path."""


class Frozen(BaseModel):
    """An immutable value that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def not_a_boolean(value: object) -> object:
    """Keeps YAML's `true` from counting as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


Number: TypeAlias = Annotated[int | float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Real: TypeAlias = Annotated[float, BeforeValidator(not_a_boolean), Field(allow_inf_nan=False)]
Fraction: TypeAlias = Annotated[Real, Field(ge=0, lt=1)]
Positive: TypeAlias = Annotated[Real, Field(gt=0)]
NonNegative: TypeAlias = Annotated[Real, Field(ge=0)]
Count: TypeAlias = Annotated[int, BeforeValidator(not_a_boolean), Field(gt=0)]
Seed: TypeAlias = Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0, lt=2**32)]


class Axis(Frozen):
    """How one field of the trial varies: an interval (`low`, `high`) or a list (`choices`)."""

    low: Number | None = None
    """Smallest value, included."""
    high: Number | None = None
    """Largest value, included."""
    log: bool = False
    """Draw uniformly in the logarithm. Needs `low` above 0."""
    step: Number | None = Field(default=None, gt=0)
    """Distance between neighbouring values; none means every value."""
    choices: tuple[Scalar, ...] | None = Field(default=None, min_length=1)
    """The allowed values, instead of an interval."""
    role: Literal["nuisance", "scientific"] = "nuisance"
    """`scientific`: each value is an arm, to be compared with equal trials. `nuisance`: tuned, not compared."""
    when: dict[str, Scalar] = Field(default_factory=dict)
    """Paths of other axes and the values at which this axis exists; elsewhere the trial's own value holds."""
    also: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Other fields that take the same value, such as `data.seed` beside `seed`."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Axis":
        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("takes either choices or low and high, not both")
            if len({(type(value), value) for value in self.choices}) < len(self.choices):
                raise ValueError(f"choices repeat a value (got {list(self.choices)})")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        if self.role == "scientific":
            raise ValueError("a scientific axis needs choices: each value is an arm")
        if not self.low < self.high:
            raise ValueError(f"`low < high` must hold (got low={self.low}, high={self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a log axis needs `low > 0` (got low={self.low})")
        if self.log and self.step is not None:
            raise ValueError("log and step cannot be combined")
        return self

    def endpoints(self) -> tuple[Scalar, ...]:
        """The values whose validity implies that of the whole axis."""
        return self.choices if self.choices is not None else (self.low, self.high)


def arms(space: Mapping[str, Axis]) -> list[Assignment]:
    """Every combination of the scientific axes' values, paths in sorted order; one empty arm without any."""
    scientific = {path: axis.choices or () for path, axis in sorted(space.items()) if axis.role == "scientific"}
    return [dict(zip(scientific, values, strict=True)) for values in product(*scientific.values())]


def arm_label(arm: Assignment) -> str:
    """`optimizer.gamma=last`; crossed arms are joined by `,` in path order; `all` without scientific axes."""
    return ",".join(f"{path}={word(value)}" for path, value in sorted(arm.items())) or "all"


def word(value: object) -> str:
    """A scalar as YAML spells it: `true`, `null`, `0.1`, `last`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case _:
            return str(value)
