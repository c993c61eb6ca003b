"""Conformance: sixteen trials that differ in all that trials of one engine may differ in, and what it means that two engines agree.

trials(rule, form, norm, ...) ──live──> Life of each trial, an epoch at a time ──differences──> largest relative difference of each kind
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from study.engines.engine import Engine, Snapshot
from study.engines.fused import FusedEngine
from study.engines.recordings import Recorder
from study.engines.solo import SoloEngine
from study.measurement import LayerSample, Outcome, Progress
from study.training import updates
from study.training.models import build_model
from study.training.roles import Role, parameter_roles
from study.trial import ModelSpec, TrialSpec

TOLERANCE, TRANSFORMER_TOLERANCE = 1e-12, 1e-11
"""Of float64 after 50 steps, relative to the largest value of each tensor; softmax and GELU round more often."""

SAMPLES = 1e-8
"""Of what is sampled of layers: inverse roots of second moments lose a digit where gradients cancel."""

ROTATION, SMALLEST_ROTATION = 1e-6, 1e-7
"""Of angles, relative and in radians: solo measures them on weights, fused on the update."""

FAINT_SHARE = 0.02
"""Coordinates of lion that may be left out at most."""

FAINT = 1e-10
"""Share of its tensor's RMS below which rounding decides the sign of an update."""

PEAK = {"sgd": 0.05, "adam": 0.002, "adamw": 0.002, "lion": 0.001, "muon": 0.02}
"""Learning rates at which a trial learns without amplifying rounding."""

SMALL: dict[str, dict[str, Any]] = {
    "data": {"name": "digits", "train_size": 160, "batch_size": 16, "validation": 0.04, "pool": 2},
    "model": {"name": "resnet", "width": 4, "blocks": [1, 1]},
    "schedule": {"epochs": 5},
    "trace": {"every": 7},
}
"""Fifty steps on images of 4 x 4 pixels."""

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 8, "depth": 2},
    "resnet post": {},
    "resnet pre": {"order": "pre"},
    "bottleneck": {"block": "bottleneck", "width": 4},
    "transformer pre": {"name": "transformer", "width": 8, "heads": 2, "order": "pre", "patch": 1},
    "transformer post": {"name": "transformer", "width": 8, "heads": 2, "order": "post", "patch": 2},
}

Sections = Mapping[str, Any]


def trial(**sections: Any) -> TrialSpec:
    """A small trial with fields of its own, by section; in float64 unless it says otherwise."""
    return TrialSpec.model_validate({"precision": "float64", **_merged(SMALL, sections)})


def trials(numbers: Iterable[int] = range(16), *, rule: str = "sgd", form: str | None = None, **sections: Any) -> dict[str, TrialSpec]:
    """Trials by their numbers' names that share rule, form and the given sections, and differ in everything that an engine lets differ."""
    model = ModelSpec.model_validate(_merged(SMALL, sections)["model"])
    shared = {**sections, "optimizer": {"rule": rule, "decay": form, **sections.get("optimizer", {})}}
    return {str(number): trial(**_merged(_own(number, rule, policies(model.model_dump_json())), shared)) for number in numbers}


def _merged(first: Sections, second: Sections) -> dict[str, Any]:
    """Sections of both, the second's fields over the first's."""
    joined = {**first, **second}
    return {name: {**first.get(name, {}), **value} if isinstance(value, dict) else value for name, value in joined.items()}


def _own(number: int, rule: str, gammas: tuple[str, ...]) -> dict[str, Any]:
    """What only this trial has. Lists of different lengths, so that few pairs of values always come together."""
    return {
        "seed": number,
        "data": {"seed": number % 3, "label_noise": (0.0, 0.1, 0.2)[number % 3]},
        "optimizer": {
            "lr": PEAK[rule] * (1.0, 0.5, 0.2, 0.7, 0.05)[number % 5],
            "weight_decay": (1e-2, 0.0, 1e-3, 5e-2, 1e-4, 2e-2)[number % 6],
            "momentum": (0.9, 0.5, 0.1, 0.8)[number % 4],
            "beta1": (0.9, 0.8, 0.95)[number % 3],
            "beta2": (0.999, 0.99, 0.95, 0.98)[number % 4],
            "eps": (1e-8, 1e-6)[number % 2],
            "gamma": gammas[number % len(gammas)],
            "gamma_decay": (None, 3e-2, None)[number % 3],
            "shift": ("exempt", "decayed")[number // 2 % 2],
            "shift_decay": (None, 2e-2)[number // 4 % 2],
            "embedding": ("decayed", "exempt")[number // 3 % 2],
            "embedding_decay": (None, 4e-2)[number % 2],
            "target": ("zero", "zero", "init")[number // 2 % 3],
            "clip": (None, 1.0, 0.3)[number % 3],
            **({"aux_lr": (None, 5e-3, 1e-3, 2e-3)[number % 4]} if rule == "muon" else {}),
        },
        "schedule": {
            "epochs": (5, 5, 4, 5, 5, 3)[number % 6],
            "shape": ("cosine", "constant", "linear", "step")[number % 4],
            "warmup": (0.0, 0.1, 0.25)[number % 3],
            "end": (0.0, 0.1)[number // 4 % 2],
            "milestones": ((0.5, 0.75), (0.3,), ())[number % 3],
            "factor": (0.1, 0.5)[number // 4 % 2],
            "decay": {
                "window": ((0.0, 1.0), (0.2, 0.9), (0.0, 0.5), (0.0, 1.0))[number % 4],
                "shape": ("constant", "linear_down", "with_lr", "linear_up", "inverse_lr")[number % 5],
            },
        },
        "trace": {"every": (7, 5, 10, 3)[number % 4]},
    }


@lru_cache
def policies(model: str) -> tuple[str, ...]:
    """Gamma-decay policies that do different things to a model given in JSON."""
    roles = parameter_roles(build_model(ModelSpec.model_validate_json(model), (1, 4, 4), 10))
    places = sorted({role.place for role in roles if role.role is Role.GAIN})
    mixed = ["+".join(places[:-1]) + f"+{places[-1]}@1"] if len(places) > 1 else []
    return ("none", "all", "all@1", *places, *(f"{place}@1" for place in places), *mixed)


@dataclass
class Life:
    """What became of one trial, epoch by epoch."""

    progress: list[Progress] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    trained: frozenset[str] = frozenset()
    """The parameters among its weights."""
    faint: dict[str, Tensor] = field(default_factory=dict)
    """Of lion: the coordinates of each parameter whose sign rounding decided."""


def live(engine: Engine, waiting: Mapping[str, TrialSpec], capacity: int) -> dict[str, Life]:
    """Trains trials as a study does: whoever ends makes room for who waits."""
    found = {name: Life() for name in waiting}
    queue, admitted = list(waiting), set[str]()
    while queue or admitted:
        while queue and len(admitted) < capacity:
            admitted.add(queue[0])
            engine.admit(queue[0], waiting[queue.pop(0)])
        for progress in advanced(engine, found):
            if progress.ending:
                engine.release(progress.trial_id)
                admitted.remove(progress.trial_id)
    return found


def advanced(engine: Engine, lives: Mapping[str, Life]) -> list[Progress]:
    """One epoch of all admitted trials, written down in their lives."""
    seen = engine.advance()
    for progress in seen:
        lives[progress.trial_id].progress.append(progress)
        lives[progress.trial_id].weights.append({name: value.clone() for name, value in engine.weights(progress.trial_id).items()})
    return seen


def fused(specs: Mapping[str, TrialSpec], capacity: int, arithmetic: str = "auto", recorder: Recorder | None = None) -> dict[str, Life]:
    """The lives of trials in one fused engine, which has fewer rows than there are trials or more."""
    return live(FusedEngine(capacity, arithmetic=arithmetic, recorder=recorder), specs, capacity)


@lru_cache(maxsize=64)
def _solo(spec: str) -> Life:
    """The life of a trial, given in JSON, by itself: what every engine is held against."""
    engine, life = SoloEngine(), Life()
    given = TrialSpec.model_validate_json(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(updates.RULES, "lion", _watched_lion)
        engine.admit("", given)
        while not advanced(engine, {"": life})[0].ending:
            pass
    moments = engine.snapshot("").state["moments"]
    life.trained = frozenset(moments)
    life.faint = {name: own["faint"] for name, own in moments.items() if "faint" in own}
    return life


def solo(spec: TrialSpec) -> Life:
    """The life of a trial by itself; nobody may write to it, as it is trained once for all who ask."""
    return _solo(spec.model_dump_json(exclude={"optimizer": {"intrinsic_lr"}}))


def _watched_lion(gradient: Tensor, state: updates.State, group: dict[str, Any]) -> Tensor:
    """Lion, which remembers where the number whose sign it takes was ever next to nothing."""
    size = (group["betas"][0] * state.get("m", torch.zeros_like(gradient)) + (1 - group["betas"][0]) * gradient).abs()
    # An update of exactly 0 is one in every engine.
    state["faint"] = ((size > 0) & (size < FAINT * size.square().mean().sqrt())) | state.get("faint", torch.zeros_like(gradient, dtype=torch.bool))
    return updates.lion(gradient, state, group)


def assert_agree(life: Life, oracle: Life, tolerance: float = TOLERANCE) -> None:
    """Two engines made the same of one trial."""
    limits = {"rotation": 1.0, "samples": max(SAMPLES, tolerance)}
    found = {kind: value for kind, value in differences(life, oracle).items() if value > limits.get(kind, tolerance)}
    assert not found, found


def hold(
    specs: dict[str, TrialSpec], capacity: int, arithmetic: str = "auto", tolerance: float = TOLERANCE, recorder: Recorder | None = None
) -> None:
    """Trials in a fused engine become what each becomes alone."""
    found = fused(specs, capacity, arithmetic, recorder)
    for name, spec in specs.items():
        assert_agree(found[name], solo(spec), tolerance)
        assert sources(found[name]) == {"update"} and sources(solo(spec)) == {"weights"}
    faint = [mask for spec in specs.values() for mask in solo(spec).faint.values()]
    assert sum(int(mask.sum()) for mask in faint) <= FAINT_SHARE * sum(mask.numel() for mask in faint)
    assert any(completed(life) for life in found.values())


def sources(life: Life) -> set[str]:
    """What rotations were measured on."""
    return {sample.source for progress in life.progress for sample in progress.measurement.samples}


def differences(life: Life, oracle: Life) -> dict[str, float]:
    """The largest difference of each kind: relative to the largest value of a tensor; of angles, in units of what they may differ by."""
    found: dict[str, float] = {}

    def note(kind: str, value: float) -> None:
        found[kind] = max(found.get(kind, 0.0), value if value == value else float("inf"))

    assert [progress.ending for progress in life.progress] == [progress.ending for progress in oracle.progress]
    for one, other in zip(life.progress, oracle.progress, strict=True):
        assert (one.measurement.step, one.measurement.epoch) == (other.measurement.step, other.measurement.epoch)
        assert one.measurement.values.keys() == other.measurement.values.keys(), one.measurement.values.keys() ^ other.measurement.values.keys()
        for name, value in other.measurement.values.items():
            kind = "rotation" if name.startswith("rotation") else "metrics"
            note(kind, _apart(kind, one.measurement.values[name], value))
        steepest = _steepest(other.measurement.samples)
        for mine, its in zip(one.measurement.samples, other.measurement.samples, strict=True):
            for kind, apart in _samples_apart(mine, its, steepest[its.step]):
                note(kind, apart)
    for own, right in zip(life.weights, oracle.weights, strict=True):
        assert list(own) == list(right)
        for name, tensor in right.items():
            kind = "parameters" if name in oracle.trained else "buffers"
            kept = ~oracle.faint[name] if name in oracle.faint else torch.ones_like(tensor, dtype=torch.bool)
            note(kind, _tensors_apart(own[name][kept], tensor[kept]))
    return found


def _steepest(samples: Iterable[LayerSample]) -> dict[int, float]:
    """The largest gradient norm of any layer, by step."""
    found: dict[int, float] = {}
    for sample in samples:
        found[sample.step] = max(found.get(sample.step, 0.0), sample.grad_norm)
    return found


def _samples_apart(one: LayerSample, other: LayerSample, steepest: float) -> Iterable[tuple[str, float]]:
    """The difference of each number of two samples of one layer at one step; everything else but their source is the same.

    A gradient's is relative to the steepest layer's: what flows into a layer's own may cancel.
    """
    for column in fields(LayerSample):
        mine, its = getattr(one, column.name), getattr(other, column.name)
        if column.name == "grad_norm":
            yield "samples", abs(mine - its) / steepest
        elif isinstance(its, float) and isinstance(mine, float):
            kind = "rotation" if column.name == "rotation" else "samples"
            yield kind, _apart(kind, mine, its)
        elif column.name != "source":
            assert mine == its, (column.name, mine, its)


def _apart(kind: str, one: float, other: float) -> float:
    if kind == "rotation":
        return abs(one - other) / max(ROTATION * abs(other), SMALLEST_ROTATION)
    return abs(one - other) / max(abs(other), 1e-9)


def _tensors_apart(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors over the largest value, which counts as 1 at least."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max())) if len(other.flatten()) else 0.0


def assert_same_bits(one: Life, other: Life) -> None:
    """Two engines made the same of one trial, to the last bit; only time may differ."""
    for own, right in zip(one.weights, other.weights, strict=True):
        changed = [name for name, value in right.items() if not torch.equal(own[name], value)]
        assert not changed, changed
    for mine, its in zip(one.progress, other.progress, strict=True):
        assert mine.ending == its.ending, (mine.ending, its.ending)
        values, expected = mine.measurement.values, its.measurement.values
        changed = [name for name in values.keys() | expected.keys() if values.get(name) != expected.get(name)]
        assert not changed, [(name, values.get(name), expected.get(name)) for name in changed]
        assert list(mine.measurement.samples) == list(its.measurement.samples), "samples"


def completed(life: Life) -> bool:
    """Whether a trial came to its regular end."""
    ending = life.progress[-1].ending
    return ending is not None and ending.outcome is Outcome.COMPLETED


def resumed(snapshot: Snapshot, spec: TrialSpec, engine: Engine, life: Life) -> Life:
    """A life that goes on from a snapshot to its end, in an engine that may hold others, who are trained with it."""
    engine.admit("resumed", spec, snapshot)
    while not (life.progress and life.progress[-1].ending):
        for progress in engine.advance():
            if progress.trial_id == "resumed":
                life.progress.append(progress)
                life.weights.append({name: value.clone() for name, value in engine.weights("resumed").items()})
    return life
