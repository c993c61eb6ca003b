"""OptimizerSpec: the words that describe one optimizer, its decay and gamma-decay policy among them.

    optimizer
    ├── rule, lr, aux_lr, ...            how weights move              -> training/updates.py
    ├── weight_decay, gamma, shift, ...  what decay does to which      -> training/decay.py
    └── constraint                       what holds weights instead

lr, weight_decay and their product intrinsic_lr say the same: any two give the third.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from study.space import Count, Fraction, Frozen, NonNegative, Positive, Real

PLACES = ("stem", "inner", "last", "down", "final", "stream")
"""Where a norm gain can stand in the computation, in the canonical order of policies."""

PRODUCT = ("optimizer.lr", "optimizer.weight_decay", "optimizer.intrinsic_lr")
"""Three fields of which two are free; those that population based training mutates."""

PRODUCT_TOLERANCE = 1e-9
"""Largest relative disagreement between lr x weight_decay and intrinsic_lr."""

AUX_LR = 3.0e-4
"""Peak learning rate of what muon leaves to adamw, where `aux_lr` does not say."""


def gamma_terms(policy: str) -> dict[str, float]:
    """The anchor (0 or 1) of every place that a gamma-decay policy lets weight decay touch.

    >>> gamma_terms("inner+last@1")
    {'inner': 0.0, 'last': 1.0}

    Raises:
        ValueError: if the policy is not `none`, `all[@1]` or distinct places joined by `+`.
    """
    if policy == "none":
        return {}
    terms: dict[str, float] = {}
    for term in policy.split("+"):
        place, at, anchor = term.strip().partition("@")
        if at and anchor != "1":
            raise ValueError(f"an anchor is written '@1' (got {policy!r})")
        if place == "none" or (place == "all" and "+" in policy):
            raise ValueError(f"{place!r} stands alone, it cannot be joined by '+' (got {policy!r})")
        if place not in (*PLACES, "all"):
            raise ValueError(f"{place!r} is not a place of gains (got {policy!r}); use none, all, or places joined by + out of {', '.join(PLACES)}")
        if place in terms:
            raise ValueError(f"{place!r} is named twice (got {policy!r})")
        terms[place] = 1.0 if at else 0.0
    if "all" in terms:
        return dict.fromkeys(PLACES, terms["all"])
    return {place: terms[place] for place in PLACES if place in terms}


def canonical_gamma(policy: str) -> str:
    """A policy with its places in canonical order: `last+inner` becomes `inner+last`."""
    terms = gamma_terms(policy)
    if policy.startswith("all") or not terms:
        return policy.strip()
    return "+".join(place + ("@1" if anchor else "") for place, anchor in terms.items())


def _text(value: object) -> object:
    if value is None or isinstance(value, bool):
        raise ValueError("must be text; quote it")
    return value


GammaPolicy: TypeAlias = Annotated[str, BeforeValidator(_text), AfterValidator(canonical_gamma)]


class ConstraintSpec(Frozen):
    """What holds weights in place after every optimizer step, instead of decay."""

    name: Literal["none", "rescale", "projection", "volumization", "rotational", "norm_schedule"] = "none"
    """`rescale` sets the norm of scale-invariant weights to `norm`, `projection` to 1; `volumization` pulls coordinates beyond a box back;
    `rotational` turns weights by the angle that decay would give at equilibrium; `norm_schedule` gives scale-invariant weights another trial's norms."""
    norm: Positive = 1.0
    """Norm of each weight (rescale)."""
    period: Count = 1
    """Optimizer steps between rescalings (rescale)."""
    granularity: Literal["tensor", "filter"] = "tensor"
    """Whose norm is held: the whole weight's, or that of each output channel (rescale, projection, rotational)."""
    bound: NonNegative = 0.5
    """Half the side of the box, in units of the weight's largest initial coordinate (volumization)."""
    strength: Annotated[Real, Field(ge=-1, le=1)] = 0.0
    """What a coordinate's distance beyond the box is multiplied by: 1 does nothing, 0 clips, -1 reflects (volumization)."""
    trace: str | None = None
    """The trace.parquet of the trial whose norms are taken over (norm_schedule)."""

    @model_validator(mode="after")
    def _has_a_trace(self) -> "ConstraintSpec":
        if (self.name == "norm_schedule") != (self.trace is not None):
            raise ValueError(f"trace belongs to name: norm_schedule, which needs it (got name {self.name}, trace {self.trace or 'null'})")
        return self


class OptimizerSpec(Frozen):
    """The update rule, its step size, and what weight decay does to which parameters.

    `gamma` is the gain of a norm layer (its `weight` in torch), never a learning-rate factor or a discount.
    """

    rule: Literal["sgd", "adam", "adamw", "lion", "muon"] = "sgd"
    """Update rule, with torch's meaning of weight decay: `sgd` and `adam` add it to the gradient, `adamw`, `lion` and `muon` shrink by lr x weight_decay.
    `muon` is for hidden weights, kernels as matrices; the output layer's weight and all that is no weight go by `adamw` at `aux_lr`."""
    lr: Positive = 0.1
    """Peak learning rate."""
    aux_lr: Positive | None = None
    """Peak learning rate of what muon leaves to adamw. Default: 3e-4 (muon)."""
    weight_decay: NonNegative = 5.0e-4
    """Decay strength of weights, per unit of learning rate."""
    intrinsic_lr: NonNegative | None = None
    """lr x weight_decay. Give any two of the three, and the third follows."""
    momentum: Fraction = 0.9
    """Heavy-ball momentum (sgd); decay of the moment (muon; torch.optim.Muon itself defaults to 0.95)."""
    nesterov: bool = False
    """Nesterov's variant of momentum (sgd, muon); torch.optim.Muon itself defaults to true."""
    beta1: Fraction = 0.9
    """Decay of the first moment (adam, adamw, muon's adamw); share of the old moment in the update (lion)."""
    beta2: Fraction = 0.999
    """Decay of the second moment (adam, adamw, muon's adamw), or of the moment itself (lion)."""
    eps: Positive = 1.0e-8
    """Added to the root of the second moment (adam, adamw, muon's adamw)."""
    decay: Literal["coupled", "decoupled"] | None = None
    """`coupled` adds decay to the gradient (not under muon), `decoupled` shrinks parameters by lr x weight_decay beside the step. Default: the rule's own."""
    gamma: GammaPolicy = "none"
    """Gamma-decay policy: which norm gains decay touches. `none`, `all`, or places joined by `+` out of stem, inner, last, down, final, stream; `@1` pulls a term's gains to 1 instead of 0."""
    gamma_decay: NonNegative | None = None
    """Decay strength of the gains that `gamma` names. Default: `weight_decay`."""
    shift: Literal["exempt", "decayed"] = "exempt"
    """Whether decay touches norm shifts and biases."""
    shift_decay: NonNegative | None = None
    """Decay strength of shifts and biases, where decay touches them. Default: `weight_decay`."""
    embedding: Literal["decayed", "exempt"] = "decayed"
    """Whether decay touches embeddings, tokens and position tables."""
    embedding_decay: NonNegative | None = None
    """Decay strength of embeddings, where decay touches them. Default: `weight_decay`."""
    target: Literal["zero", "init"] = "zero"
    """What decay pulls weights, shifts, biases and embeddings towards: zero, or where they were when the optimizer was built."""
    constraint: ConstraintSpec = Field(default_factory=ConstraintSpec)
    """What holds weights in place of decay."""
    clip: Positive | None = None
    """Largest global gradient norm; none does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _two_give_the_third(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        return {**given, **resolve_product(given)}

    @field_validator("intrinsic_lr")
    @classmethod
    def _is_the_product(cls, given: float | None, info: ValidationInfo) -> float | None:
        if given is None or not {"lr", "weight_decay"} <= info.data.keys():
            return given
        lr, decay = info.data["lr"], info.data["weight_decay"]
        if not _agree(lr * decay, given):
            got = f"got lr {lr:g}, weight_decay {decay:g}, intrinsic_lr {given:g}"
            raise ValueError(f"lr x weight_decay = {lr * decay:g} contradicts intrinsic_lr ({got}); give two of the three")
        return given

    @model_validator(mode="after")
    def _is_consistent(self) -> "OptimizerSpec":
        if self.nesterov and (self.rule not in ("sgd", "muon") or self.momentum == 0):
            raise ValueError("nesterov needs rule sgd or muon with momentum above 0")
        if self.aux_lr is not None and self.rule != "muon":
            raise ValueError(f"aux_lr needs rule muon (got {self.rule})")
        if self.rule == "muon" and self.form == "coupled":
            raise ValueError("muon cannot couple decay into the gradient, whose size it discards; leave decay out or use decoupled")
        if self.constraint.name == "rotational" and (self.nesterov or not has_equilibrium(self.rule, self.form)):
            raise ValueError(f"constraint rotational needs a rule whose rotation at equilibrium is known (got {self.rule}, {self.form})")
        return self

    @property
    def form(self) -> Literal["coupled", "decoupled"]:
        """How decay enters: as `decay` says, else as the rule does in torch."""
        return self.decay or ("coupled" if self.rule in ("sgd", "adam") else "decoupled")

    def peak(self, *, aux: bool) -> float:
        """Peak learning rate: of all parameters, or under muon of those that are left to adamw, its auxiliary rule."""
        return (AUX_LR if self.aux_lr is None else self.aux_lr) if aux else self.lr


def has_equilibrium(rule: str, form: str) -> bool:
    """Whether theory gives the rotation at equilibrium: not for adaptive rules with decay in the gradient, nor for muon."""
    return rule == "sgd" or (form == "decoupled" and rule != "muon")


def resolve_product(given: Mapping[str, Any]) -> dict[str, Any]:
    """What follows of lr, weight_decay and their product from the ones that are given; nothing where they contradict or are no numbers.

    The product is always that of the two factors to the last bit, however it came about, so that lr and weight_decay alone restore a spec.

    Raises:
        ValueError: if intrinsic_lr and weight_decay leave lr unknown.
    """
    if any(isinstance(given.get(key), bool) for key in ("lr", "weight_decay", "intrinsic_lr")):
        return {}
    try:
        lr, decay, product = (None if given.get(key) is None else float(given[key]) for key in ("lr", "weight_decay", "intrinsic_lr"))
    except (TypeError, ValueError, OverflowError):
        return {}
    if product is not None and lr is None and decay is not None:
        if decay == 0:
            raise ValueError("intrinsic_lr with weight_decay 0 leaves lr unknown; give lr")
        lr = product / decay
    lr = _default("lr") if lr is None else lr
    if decay is None:
        decay = product / lr if product is not None and lr > 0 else _default("weight_decay")
    if lr <= 0 or decay < 0 or not math.isfinite(lr * decay) or (product is not None and not _agree(lr * decay, product)):
        return {}
    factors = {"lr": lr, "weight_decay": decay}
    return {**{key: value for key, value in factors.items() if key not in given}, "intrinsic_lr": lr * decay}


def _agree(product: float, given: float) -> bool:
    return abs(product - given) <= PRODUCT_TOLERANCE * max(abs(product), abs(given))


def _default(field: str) -> float:
    return float(OptimizerSpec.model_fields[field].default)
