"""TrialSpec: the words that describe one trial, from its data to its decay.

A trial is a complete, frozen value: two equal specs train bit for bit the same on one machine.

    trial
    ├── data        which images, how many, how noisy          -> training/data.py
    ├── model       which network, which norm                  -> training/models.py
    ├── optimizer   rule, lr, decay, gamma-decay policy        -> training/decay.py
    ├── schedule    lr over the steps                          -> training/schedules.py
    └── trace       how often effective learning rates are sampled
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from study.space import Frozen, not_a_boolean

PLACES = ("stem", "inner", "last", "down", "final", "stream")
"""Where a norm gain can stand in the computation, in the canonical order of policies."""

PROBES = ("branch_ratio", "class_error")
"""What a trial may measure once more at its end."""

IMPORT = "import:"
"""Prefix of a field that names the user's own code, as `import:package.module:function`."""

PRODUCT_TOLERANCE = 1e-9
"""Largest relative disagreement between lr x weight_decay and intrinsic_lr."""


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


def _import_path(value: str) -> str:
    module, _, function = value.removeprefix(IMPORT).partition(":")
    parts = (*module.split("."), function)
    if not value.startswith(IMPORT) or not all(part.isidentifier() for part in parts):
        raise ValueError(f"must be written import:package.module:function (got {value!r})")
    return value


def _name_or_import(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        if value in names:
            return value
        if value.startswith(IMPORT):
            return _import_path(value)
        raise ValueError(f"must be one of {', '.join(names)}, or import:package.module:function (got {value!r})")

    return AfterValidator(check)


def _text(value: object) -> object:
    if value is None or isinstance(value, bool):
        raise ValueError("must be text; quote it")
    return value


Real: TypeAlias = Annotated[float, BeforeValidator(not_a_boolean), Field(allow_inf_nan=False)]
Fraction: TypeAlias = Annotated[Real, Field(ge=0, lt=1)]
Positive: TypeAlias = Annotated[Real, Field(gt=0)]
NonNegative: TypeAlias = Annotated[Real, Field(ge=0)]
Count: TypeAlias = Annotated[int, BeforeValidator(not_a_boolean), Field(gt=0)]
Seed: TypeAlias = Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0, lt=2**32)]
GammaPolicy: TypeAlias = Annotated[str, BeforeValidator(_text), AfterValidator(canonical_gamma)]
Args: TypeAlias = dict[str, JsonValue]


class DataSpec(Frozen):
    """Which images are trained on, and which ones the search sees."""

    name: Annotated[str, _name_or_import("digits", "mnist5k", "npz")] = "digits"
    """`digits` (1,797 images 8x8), `mnist5k` (5,000 MNIST images 28x28), `npz` (your arrays), or `import:package.module:function`."""
    path: str | None = None
    """For `npz`: the file, with arrays `images` (N, channels, height, width) or (N, features), and `labels` (N,) of integers."""
    args: Args = Field(default_factory=dict)
    """Keyword arguments of the imported function."""
    batch_size: Count = 64
    """Images in one optimizer step; the rest of an epoch smaller than this is dropped."""
    label_noise: Fraction = 0.0
    """Share of training labels replaced by another class, drawn from `seed`."""
    train_size: Count | None = None
    """How many training images to keep after the split; none keeps all."""
    validation: Fraction = 0.2
    """Share of images that the search is scored on. Ignored where the imported function brings its own validation set."""
    test: Fraction = 0.0
    """Share of images that search never sees."""
    seed: Seed = 0
    """Draws split, subset and label noise."""
    augment: Literal["none", "shift", "flip"] = "none"
    """What happens to training images: nothing, a shift by up to one eighth of the width, or a left-right flip."""
    pool: Count = 1
    """Average-pools images by this factor on both axes: 2 makes 28x28 into 14x14."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "DataSpec":
        if self.name == "npz" and self.path is None:
            raise ValueError("data.name: npz needs data.path, the file with arrays images and labels")
        if self.name != "npz" and self.path is not None:
            raise ValueError(f"data.path belongs to data.name: npz (got name: {self.name})")
        if self.args and not self.name.startswith(IMPORT):
            raise ValueError("data.args belongs to an imported data.name")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must leave training images (got {self.validation} + {self.test})")
        return self


class ModelSpec(Frozen):
    """Which network is trained, and what normalizes it."""

    name: Annotated[str, _name_or_import("mlp", "resnet", "transformer")] = "resnet"
    """`mlp`, `resnet` (CIFAR-style stem), `transformer` (a small ViT), or `import:package.module:function`."""
    norm: Literal["batch", "layer", "group", "rms", "weight", "none"] = "batch"
    """What normalizes the layers. Default: `batch`; `layer` for the transformer."""
    width: Count = 16
    """Hidden units (mlp), channels of the first stage (resnet), embedding size (transformer)."""
    depth: Count = 2
    """Hidden layers (mlp) or blocks (transformer)."""
    blocks: tuple[Count, ...] = Field(default=(2, 2), min_length=1)
    """Residual blocks of each stage (resnet); each stage after the first doubles the channels and halves the image."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels at its end (resnet)."""
    order: Literal["post", "pre"] = "post"
    """Norms after the weights, as in ResNet v1 and BERT, or before them, as in ResNet v2 and GPT-2."""
    heads: Count = 4
    """Attention heads (transformer)."""
    patch: Count = 2
    """Side of an image patch in pixels (transformer)."""
    dropout: Fraction = 0.0
    """Share of hidden activations dropped while training."""
    args: Args = Field(default_factory=dict)
    """Keyword arguments of the imported function."""
    places: dict[str, Literal["stem", "inner", "last", "down", "final", "stream"]] = Field(default_factory=dict)
    """Places of gains that cannot be read from the computation, by shell-style pattern of the parameter's name."""

    @model_validator(mode="before")
    @classmethod
    def _norm_of_a_transformer(cls, given: object) -> object:
        if isinstance(given, Mapping) and given.get("name") == "transformer":
            return {"norm": "layer", **given}
        return given

    @model_validator(mode="after")
    def _is_consistent(self) -> "ModelSpec":
        if self.args and not self.name.startswith(IMPORT):
            raise ValueError("model.args belongs to an imported model.name")
        if self.name == "transformer":
            if self.norm in ("batch", "group"):
                raise ValueError(f"a transformer's norm is layer, rms, weight or none (got {self.norm!r})")
            if self.width % self.heads:
                raise ValueError(f"width must be a multiple of heads (got width {self.width}, heads {self.heads})")
        return self


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

    rule: Literal["sgd", "adam", "adamw", "lion"] = "sgd"
    """Update rule, with torch's meaning of weight decay: `sgd` and `adam` add it to the gradient, `adamw` and `lion` shrink by lr x weight_decay."""
    lr: Positive = 0.1
    """Peak learning rate."""
    weight_decay: NonNegative = 5.0e-4
    """Decay strength of weights, per unit of learning rate."""
    intrinsic_lr: NonNegative | None = None
    """lr x weight_decay. Give any two of the three, and the third follows."""
    momentum: Fraction = 0.9
    """Heavy-ball momentum (sgd)."""
    nesterov: bool = False
    """Nesterov's variant of momentum (sgd)."""
    beta1: Fraction = 0.9
    """Decay of the first moment (adam, adamw); share of the old moment in the update (lion)."""
    beta2: Fraction = 0.999
    """Decay of the second moment (adam, adamw), or of the moment itself (lion)."""
    eps: Positive = 1.0e-8
    """Added to the root of the second moment (adam, adamw)."""
    decay: Literal["coupled", "decoupled"] | None = None
    """`coupled` adds decay to the gradient, `decoupled` shrinks parameters by lr x weight_decay beside the step. Default: the rule's own."""
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
        if self.nesterov and (self.rule != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs rule sgd with momentum above 0")
        if self.constraint.name == "rotational" and (self.nesterov or not has_equilibrium(self.rule, self.form)):
            raise ValueError(f"constraint rotational needs a rule whose rotation at equilibrium is known (got {self.rule}, {self.form})")
        return self

    @property
    def form(self) -> Literal["coupled", "decoupled"]:
        """How decay enters: as `decay` says, else as the rule does in torch."""
        return self.decay or ("decoupled" if self.rule in ("adamw", "lion") else "coupled")


def has_equilibrium(rule: str, form: str) -> bool:
    """Whether theory gives the rotation at equilibrium: not for adaptive rules with decay in the gradient."""
    return rule == "sgd" or form == "decoupled"


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


class DecayScheduleSpec(Frozen):
    """The decay strength over a trial's steps; whatever the shape, its mean over the window is the strength that the optimizer states."""

    window: tuple[Annotated[Real, Field(ge=0, le=1)], Annotated[Real, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Shares of all steps between which decay acts."""
    shape: Literal["constant", "linear_down", "linear_up", "with_lr", "inverse_lr"] = "constant"
    """How it runs inside the window: level, falling to 0, rising from 0, in proportion to lr, or to 1/lr."""

    @model_validator(mode="after")
    def _is_a_window(self) -> "DecayScheduleSpec":
        if not self.window[0] < self.window[1]:
            raise ValueError(f"window must begin before it ends (got {list(self.window)})")
        return self


class ScheduleSpec(Frozen):
    """The learning rate over a trial's steps, as a multiple of its peak, and the decay strength beside it."""

    epochs: Count = 20
    """Passes over the training images."""
    warmup: Fraction = 0.0
    """Share of all steps in which lr rises linearly from 0 to its peak."""
    shape: Literal["constant", "cosine", "linear", "step"] = "cosine"
    """What follows the warmup: no change, half a cosine or a line down to `end`, or drops by `factor` at `milestones`."""
    end: Fraction = 0.0
    """Last lr over the peak (cosine, linear)."""
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """Shares of all steps at which lr drops (step)."""
    factor: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """What lr is multiplied by at each milestone (step)."""
    decay: DecayScheduleSpec = Field(default_factory=DecayScheduleSpec)
    """When decay acts, and how its strength runs."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "ScheduleSpec":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise (got {list(self.milestones)})")
        return self


class TraceSpec(Frozen):
    """How often the effective learning rates are sampled."""

    every: Count = 20
    """Optimizer steps between samples."""


class TrialSpec(Frozen):
    """One complete trial: everything that decides what is trained."""

    seed: Seed = 0
    """Draws initial weights, order of images, augmentation and dropout."""
    data: DataSpec = Field(default_factory=DataSpec)
    model: ModelSpec = Field(default_factory=ModelSpec)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    trace: TraceSpec = Field(default_factory=TraceSpec)
    loss: Annotated[str, _name_or_import("cross_entropy", "mse")] = "cross_entropy"
    """`cross_entropy`, `mse` (on one-hot labels), or `import:package.module:function` of (logits, labels)."""
    metrics: tuple[Annotated[str, AfterValidator(_import_path)], ...] = ()
    """More metrics of the validation set: `import:package.module:function` of (logits, labels), reported as `val/<function>`."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """Arithmetic of a step; `bf16` is automatic mixed precision."""
    probes: tuple[Literal["branch_ratio", "class_error"], ...] = ()
    """What else to measure at the end, as `final/<probe>/...`: branch over shortcut variance of each residual sum; error of each class."""

    def measured(self) -> tuple[str, ...]:
        """The metrics that every measurement of this trial holds, beside those of its layers."""
        own = tuple(f"val/{path.rpartition(':')[2]}" for path in self.metrics)
        return ("train/loss", "train/error", "val/loss", "val/error", "lr", "weight_decay", "intrinsic_lr", *own)

    def canonical(self) -> dict[str, Any]:
        """The spec as plain values, defaults filled in, without what follows from the rest."""
        return self.model_dump(mode="json", exclude={"optimizer": {"intrinsic_lr"}})

    def dotted(self) -> dict[str, Any]:
        """Every field by dotted path: `{"optimizer.lr": 0.1, ...}`."""
        return flatten(self.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted paths; lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat
