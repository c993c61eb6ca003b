"""TrialSpec: the words that describe one trial, from its data to its decay.

A trial is a complete, frozen value: two equal specs train bit for bit the same on one machine.

    trial
    ├── data        which images, how many, how noisy          -> training/data.py
    ├── model       which network, which norm                  -> training/models.py
    ├── optimizer   rule, lr, decay, gamma-decay policy        -> optimizer.py
    ├── schedule    lr over the steps                          -> training/schedules.py
    └── trace       how often effective learning rates are sampled
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, JsonValue, model_validator

from study.optimizer import OptimizerSpec
from study.space import Count, Fraction, Frozen, Real, Seed

PROBES = ("branch_ratio", "class_error")
"""What a trial may measure once more at its end."""

IMPORT = "import:"
"""Prefix of a field that names the user's own code, as `import:package.module:function`."""


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

    def brief(self) -> str:
        """The spec as JSON, without what is as by default: for the same version of this program to read."""
        return self.model_dump_json(exclude_defaults=True, exclude={"optimizer": {"intrinsic_lr"}})

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
