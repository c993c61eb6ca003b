"""Best: the trial that a study recommends, with its provenance, as a file that other projects load.

records ─ranking─> TrialRecord ──> BestConfig ─save─> best.yaml ─read_best─> BestConfig.optimizer, .schedule, .model, .data
"""

import math
import operator
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_serializer, model_validator

from study.document import read_document, to_yaml, write_whole
from study.errors import NotFound, Problem, SpecError
from study.home import home_path
from study.measurement import Outcome, TrialRecord
from study.optimizer import PRODUCT, OptimizerSpec
from study.problems import validated
from study.space import Count, Frozen, Real
from study.spec import ObjectiveSpec, StudyName, StudySpec
from study.trial import DataSpec, ModelSpec, ScheduleSpec, TrialSpec

MARKS = ("study_id", "trial_id", "trial")
"""Keys by which a best.yaml is told from other YAML files."""

USE = (
    'best = study.load_best("best.yaml")',
    "optimizer = study.build_optimizer(model, best.optimizer)",
    "scheduler = study.build_scheduler(optimizer, best.schedule, total_steps=10_000)",
)
"""How a best.yaml is used in Python."""

_HEADER = "# The best trial of the study {name}. In Python:\n" + "".join(f"#   {line}\n" for line in USE)


def _iso(value: str) -> str:
    datetime.fromisoformat(value)
    return value


def _sha256(value: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", value) is None:
        raise ValueError("must be a SHA-256 of 64 hexadecimal digits")
    return value


class ObjectiveResult(Frozen):
    """What the trial was ranked by, and how well it did."""

    metric: str
    """The metric that trials were ranked by."""
    direction: Literal["minimize", "maximize"]
    """Which end is better."""
    at: Literal["final", "best"]
    """Which measurement counted: the last one or the best one."""
    value: Real
    """The trial's own value in the search, the winner's of many and so a little too good."""
    seeds: Count = 1
    """How many seeds `mean` is over; 1 until the trial is trained again with fresh ones, by `replicate` or `study best --confirm`."""
    mean: Real | None = None
    """Mean over the fresh seeds; null until confirmed."""
    interval: tuple[Real, Real] | None = None
    """95% confidence interval of `mean`; null until confirmed."""

    @model_validator(mode="after")
    def _is_confirmed_or_not(self) -> "ObjectiveResult":
        if (self.mean is None) != (self.interval is None):
            raise ValueError("mean and interval are both given when the trial is confirmed, and both null before")
        return self


class Mutation(Frozen):
    """Learning rate and decay from an epoch on."""

    epoch: Annotated[int, Field(ge=0)]
    """So many epochs had been trained."""
    values: dict[str, Real]
    """The values of the mutated fields, by dotted path."""


class BestConfig(Frozen):
    """One whole trial, also what was not searched, and where it comes from."""

    version: Literal[1] = 1
    """Version of this format."""
    study_id: str
    """The study that found it."""
    name: StudyName
    """The study's name."""
    trial_id: str
    """The trial within the study."""
    run_id: str
    """The trial's MLflow run; empty where there is none."""
    arm: str
    """The scientific values that the trial stands for; `all` where none were compared."""
    objective: ObjectiveResult
    spec_hash: Annotated[str, AfterValidator(_sha256)]
    """SHA-256 of the part of the study's spec that decides what its trials are."""
    git_commit: str
    """The commit that ran the study; empty outside a repository."""
    versions: dict[str, str]
    """Library versions that the study ran with."""
    date: Annotated[str, AfterValidator(_iso)]
    """When the study ended, in ISO 8601."""
    trial: TrialSpec
    """The whole trial. lr and weight_decay are stored; their product follows."""
    mutations: tuple[Mutation, ...] = Field(default=(), exclude_if=operator.not_)
    """What the trial's weights were trained with, where population based training changed it on the way; `trial` holds the values of the launch."""

    @field_serializer("trial")
    def _canonical(self, trial: TrialSpec) -> dict[str, Any]:
        return trial.canonical()

    @property
    def optimizer(self) -> OptimizerSpec:
        """Update rule, lr and decay, for `study.build_optimizer` and `study.param_groups`."""
        return self.trial.optimizer

    @property
    def schedule(self) -> ScheduleSpec:
        """The learning rate over the steps, for `study.build_scheduler`."""
        return self.trial.schedule

    @property
    def model(self) -> ModelSpec:
        """The network that the values were found for."""
        return self.trial.model

    @property
    def data(self) -> DataSpec:
        """The images that the values were found on."""
        return self.trial.data

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever uses the config has to know."""
        if not self.mutations:
            return ()
        says = f"the trial was mutated as it trained: {', '.join(self.mutations[0].values)} are those of its launch"
        return (f"{says}; what its weights were trained with, from which epoch on, is under `mutations` of best.yaml",)

    def to_yaml(self) -> str:
        """The file's text: how to use it, then every field."""
        return _HEADER.format(name=self.name) + to_yaml(self.model_dump(mode="json"))

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            HomeError: if it cannot be written.
        """
        write_whole(Path(path), self.to_yaml())


def contenders(records: Iterable[TrialRecord], objective: ObjectiveSpec) -> list[TrialRecord]:
    """The completed trials of the search with a finite value, best first, the earlier one of equals; replicates do not compete."""

    def place(record: TrialRecord) -> tuple[float, int, str]:
        assert record.value is not None, f"{record.trial_id} competes without a value"
        # Trial numbers are padded to four digits and grow beyond them, so the shorter name is the earlier one.
        return objective.rank(record.value), len(record.trial_id), record.trial_id

    rivals = (record for record in records if record.outcome is Outcome.COMPLETED and not record.replicate_of)
    return sorted((record for record in rivals if record.value is not None and math.isfinite(record.value)), key=place)


def choose_best(records: Iterable[TrialRecord], objective: ObjectiveSpec) -> TrialRecord | None:
    """The best trial by its own value alone; None without a completed one. `ranking.recommended` knows of fresh seeds, too."""
    return next(iter(contenders(records, objective)), None)


def read_best(path: str | Path) -> BestConfig:
    """Reads a best.yaml, or its JSON form; nothing in it is executed.

    Raises:
        NotFound: if there is no such file.
        SpecError: if it is something else, or was damaged, with every problem and its line.
    """
    path = Path(path)
    if not path.exists():
        raise NotFound("no such file", where=str(path), remedy="a study writes best.yaml into its folder when it ends")
    tree, lines = read_document(path)
    absent = [key for key in MARKS if not isinstance(tree, dict) or key not in tree]
    if absent:
        message = f"is not a best.yaml (it has no {', '.join(absent)})"
        raise SpecError([Problem("not-a-best", message, str(path), "use the best.yaml in a study's folder, or `study export NAME --to yaml`")])
    return validated(BestConfig, tree, str(path), lines)


def load_best(source: str | Path, home: str | Path | None = None) -> BestConfig:
    """The best config of a file or of a study in the home.

    Args:
        source: A file, or the name of a study.
        home: The study home. Default: `$STUDY_HOME`, else `./studies`.

    Raises:
        NotFound: if there is neither.
        SpecError: if the file is not a best.yaml.
    """
    if is_file(source):
        return read_best(source)
    folder = home_path(home) / str(source)
    if (folder / "best.yaml").exists():
        return read_best(folder / "best.yaml")
    if folder.exists():
        raise NotFound("this study has no best config yet", where=str(folder), remedy="finish it with `study run`")
    remedy = "give a best.yaml, or name the study home with home= or $STUDY_HOME"
    raise NotFound(f"no such file, and no study of this name (got {str(source)!r})", where=str(home_path(home)), remedy=remedy)


def is_file(source: str | Path) -> bool:
    """Whether `source` means a file rather than a study or a run: a Path, a file that exists, or anything that no study can be named."""
    return isinstance(source, Path) or re.fullmatch(r"[a-z0-9-]+", source) is None or Path(source).is_file()


def varied(best: BestConfig, spec: StudySpec) -> dict[str, object]:
    """The fields that a study varied, and those that follow from them, with their values in its best trial."""
    fields = best.trial.dotted()
    product = PRODUCT if set(PRODUCT) & set(spec.space) else ()
    return {path: fields.get(path) for path in dict.fromkeys((*spec.space, *product))}


def document(best: BestConfig) -> dict[str, Any]:
    """What `study best --json` prints."""
    objective = best.objective
    confirmed = None if objective.interval is None else {"mean": objective.mean, "interval": list(objective.interval), "seeds": objective.seeds}
    mutations = {"mutations": [mutation.model_dump(mode="json") for mutation in best.mutations]} if best.mutations else {}
    return {
        "study_id": best.study_id,
        "name": best.name,
        "trial_id": best.trial_id,
        "run_id": best.run_id,
        "arm": best.arm,
        "value": objective.value,
        "metric": objective.metric,
        "direction": objective.direction,
        "spec": best.trial.canonical(),
        "confirmed": confirmed,
        **mutations,
    }
