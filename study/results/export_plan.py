"""What exports are written from: the best config, and what decay does to each parameter of its model.

best.yaml ──> BestConfig ─┐
                          ├──> export ──> text in another project's terms, warnings
model ─audit─> ModelPlan ─┘
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from study.errors import NotExpressible
from study.results.best import BestConfig
from study.space import Frozen

SAID = {
    "optimizer": (
        *("rule", "lr", "weight_decay", "intrinsic_lr", "momentum", "nesterov", "beta1", "beta2", "eps", "decay", "clip"),
        *("gamma", "gamma_decay", "shift", "shift_decay", "embedding", "embedding_decay", "target"),
    ),
    "schedule": ("epochs", "warmup", "shape", "end", "milestones", "factor"),
}
"""The fields that exports put into other projects' terms; any other that is not at its default cannot be said there."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What decay does to one parameter, and which libraries would not decay it by default."""

    name: str
    role: str
    rate: float
    anchor: float | str = 0.0
    """0, 1, or `init`: the value that it had when the optimizer was built."""
    constrained: bool = False
    frozen: bool = False
    """Whether nothing trains it, so that nothing decays it either."""
    spared_by: frozenset[str] = frozenset()
    """The libraries whose default exempts it; see `study.training.compare`."""

    @property
    def own_name(self) -> str:
        """Its name in the module that holds it."""
        return self.name.rpartition(".")[2]

    def is_decayed_as(self, rate: float) -> bool:
        """Whether decay of this rate to 0 is what the plan says."""
        return self.frozen or (not self.constrained and self.rate == rate and (rate == 0 or self.anchor == 0))


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The decay plan of a best config's model, and how long one of its epochs is."""

    rows: tuple[PlanRow, ...]
    steps_per_epoch: int


@dataclass(frozen=True, slots=True)
class Export:
    """A text in another project's terms, and what it does not say by itself."""

    text: str
    warnings: tuple[str, ...] = field(default=())


def header(best: BestConfig) -> list[str]:
    """Where an export comes from: study, trial, value, and what it was trained on."""
    objective, data, model = best.objective, best.data, best.model
    value = f"{objective.metric} {objective.value:.6g} ({objective.direction}d)"
    if objective.mean is not None and objective.interval is not None:
        low, high = objective.interval
        value += f", {objective.mean:.6g} over {objective.seeds} fresh seeds (95% interval {low:.6g} to {high:.6g})"
    more = "".join(f", {name} {told}" for name, told in best.trial.model_dump(exclude_defaults=True, include={"loss", "precision"}).items())
    return [
        f"The best trial of the study {best.name} ({best.study_id}): {best.trial_id}, {value}.",
        f"Trained on: data {_told(data)}; model {_told(model)};",
        f"batches of {data.batch_size}, {best.schedule.epochs} epochs, seed {best.trial.seed}{more}.",
        f"Decay policy: gamma {best.optimizer.gamma}, shift {best.optimizer.shift}, embedding {best.optimizer.embedding}, {best.optimizer.form}.",
    ]


def _told(spec: Frozen) -> str:
    """A section of the trial in one line: its name, then every field that is not at its default."""
    told = spec.model_dump(mode="json", exclude_defaults=True, exclude={"name", "batch_size"})
    return f"{getattr(spec, 'name', '')}{''.join(f', {key} {value}' for key, value in told.items())}"


def commented(lines: Iterable[str], prefix: str = "# ") -> str:
    """Lines as comments."""
    return "".join(f"{prefix}{line}".rstrip() + "\n" for line in lines)


def refuse_what_cannot_be_said(best: BestConfig, plan: ModelPlan, target: str) -> None:
    """Constraints, decay windows, muon and whatever else only this package can do.

    Raises:
        NotExpressible: with the field, its value, and the parameters that it holds.
    """
    if best.optimizer.rule == "muon":
        raise not_expressible(f"{target} has no rule that moves hidden weights, kernels too, by muon and all else by adamw", "optimizer.rule")
    for section, said in SAID.items():
        spec: Frozen = getattr(best.trial, section)
        for name, value in spec.model_dump(mode="json", exclude_defaults=True).items():
            if name not in said:
                held = [row.name for row in plan.rows if row.constrained]
                whom = f" for {len(held)} parameters: {', '.join(held)}" if held else ""
                raise not_expressible(f"{target} has nothing that does this{whom} (got {value})", f"{section}.{name}")


def not_expressible(message: str, where: str) -> NotExpressible:
    """The refusal of an export, with what can do it."""
    return NotExpressible(message, where=where, remedy="use study.build_optimizer and study.build_scheduler with `study export NAME --to yaml`")


def wrongly_decayed(rows: Sequence[PlanRow], rates: Sequence[float]) -> list[PlanRow]:
    """The parameters that a target would decay otherwise than the plan, given the rate that it has for each; it knows no anchor but 0."""
    return [row for row, rate in zip(rows, rates, strict=True) if not row.is_decayed_as(rate)]


def wrong_sentence(target: str, wrong: Sequence[PlanRow]) -> str:
    """Which parameters a target would decay wrongly, all of them by name."""
    gains = sum(row.role == "gain" for row in wrong)
    parameters = "1 parameter" if len(wrong) == 1 else f"{len(wrong)} parameters"
    return f"{target} would decay {parameters} wrongly, {gains} of them gains: {', '.join(row.name for row in wrong)}"
