"""Names: how a study and its trials read in MLflow. Pure translations; those of a trial's spec go both ways.

trial spec ──params_of──> {"optimizer.lr": "0.1", "optimizer.gamma": "none", ...} ──trial_of──> trial spec
outcome    ──ending_tags──> {"study.outcome": "stopped", "study.stop_reason": "scheduler"}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study.measurement import Ending, Measurement, Outcome
from study.tracking.outbox import Entry

MOST_PARAM = 6000
"""Characters that MLflow keeps of a param."""

MOST_TAG = 8000
"""Characters that MLflow keeps of a tag."""

MOST_KEY = 250
"""Characters of a name in MLflow."""

CUT = " [...cut]"
"""Marks a text that was longer than MLflow keeps."""

STATUS = {
    Outcome.COMPLETED: "FINISHED",
    Outcome.STOPPED: "KILLED",
    Outcome.DIVERGED: "FAILED",
    Outcome.FAILED: "FAILED",
    Outcome.INTERRUPTED: "KILLED",
}
"""MLflow's word for each outcome."""

ENDING_TAGS = ("study.outcome", "study.stop_reason", "study.divergence", "study.failure", "study.value")
"""What a run says of its end, and no longer says once it is reopened."""

PLANNED = "study.trials"
"""The tag that only a study's own run has: how many trials it plans."""

VERDICT = "study.claim."
"""How the tags of a study's run begin that hold the verdicts of its claims; a claim's id follows."""

_KEY = re.compile(r"[A-Za-z0-9_\- :]+")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_\-. /:]")
_USER = re.compile(r"(?<=://)([^\s/?#]*)@")
_SECRET = re.compile(r"((?:password|passwd|pwd|token|secret|key)=)[^&\s]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StudyIdentity:
    """What every run of a study says about it."""

    study_id: str
    name: str
    spec_hash: str
    git_commit: str
    engine: str

    def tags(self) -> dict[str, str]:
        """The study's tags; its trials carry them too, as a search for one would otherwise miss the other."""
        return {
            "study.id": self.study_id,
            "study.name": self.name,
            "study.spec_hash": self.spec_hash,
            "study.git_commit": self.git_commit,
            "study.engine": self.engine,
            "mlflow.source.git.commit": self.git_commit,
        }


def trial_tags(identity: StudyIdentity, entry: Entry, parent: str) -> dict[str, str]:
    """The tags of a trial's run, below the run *parent* of its study."""
    replicate = {"study.replicate_of": entry.replicate_of} if entry.replicate_of else {}
    own = {"study.trial_id": entry.trial_id, "study.arm": entry.arm, "mlflow.parentRunId": parent, **replicate}
    return {name: shortened(text, MOST_TAG) for name, text in {**identity.tags(), **entry.tags, **own}.items()}


def ending_tags(ending: Ending, value: float | None, measurements: Sequence[Measurement]) -> dict[str, str]:
    """How a trial ended, where, and with which value."""
    last = measurements[-1] if measurements else Measurement(0, 0, {})
    seconds = sum(measurement.seconds for measurement in measurements)
    tags = {"study.outcome": str(ending.outcome), "study.step": str(last.step), "study.epoch": str(last.epoch), "study.seconds": repr(seconds)}
    if ending.outcome is Outcome.STOPPED:
        tags["study.stop_reason"] = ending.reason
    elif ending.outcome is Outcome.DIVERGED:
        tags["study.divergence"] = ending.reason
    elif ending.outcome is Outcome.FAILED and ending.reason:
        tags["study.failure"] = ending.reason
    if value is not None:
        tags["study.value"] = repr(value)
    return tags


def params_of(trial: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A spec as MLflow's params: dotted paths, values as YAML writes them on one line.

    Text stands as it is, unless it would read back as another kind of value: it is then quoted. Keys that a name in MLflow cannot
    hold, such as the patterns of `model.places`, keep their section together.
    """
    params: dict[str, str] = {}
    for key, value in trial.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and all(_KEY.fullmatch(inner) and len(path) + len(inner) < MOST_KEY for inner in value):
            params |= params_of(value, f"{path}.")
        else:
            params[path] = shortened(_written(value), MOST_PARAM)
    return params


def trial_of(params: Mapping[str, str]) -> dict[str, Any] | None:
    """The spec that `params_of` wrote; None where a value was too long to be kept."""
    tree: dict[str, Any] = {}
    for path, text in params.items():
        if text.endswith(CUT):
            return None
        *sections, key = path.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[key] = _read(text)
    return tree


def metric_name(name: str) -> str:
    """A name that MLflow takes: other characters become `_`."""
    return _NOT_IN_A_NAME.sub("_", name)[:MOST_KEY]


def shortened(text: str, most: int) -> str:
    """The text, cut and marked where it is longer than *most* characters."""
    return text if len(text) <= most else text[: most - len(CUT)] + CUT


def masked(text: str) -> str:
    """The text with the credentials of every URI in it hidden.

    >>> masked("http://user:secret@host/path")
    'http://user:***@host/path'
    """
    hidden = _USER.sub(lambda found: f"{found[1].partition(':')[0]}:***@" if ":" in found[1] else "***@", text)
    return _SECRET.sub(r"\1***", hidden)


def _written(value: object) -> str:
    if isinstance(value, str) and isinstance(_read(value), str) and not value.startswith('"'):
        return value
    return json.dumps(value, ensure_ascii=False)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
