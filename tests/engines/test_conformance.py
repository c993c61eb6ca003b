"""Every engine trains a trial as the solo engine does, whoever its neighbours are, wherever its row lies, whenever it came."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from study.engines import course
from study.engines.engine import Engine, Snapshot
from study.engines.fused import FusedEngine
from study.engines.solo import SoloEngine
from study.measurement import Outcome
from study.traces import write_trace
from study.trial import TrialSpec
from tests.engines.conformance import (
    MODELS,
    TOLERANCE,
    TRANSFORMER_TOLERANCE,
    Life,
    advanced,
    assert_agree,
    assert_same_bits,
    completed,
    fused,
    hold,
    resumed,
    solo,
    trial,
    trials,
)

RULES = ("sgd", "adam", "adamw", "lion", "muon")
FORMS = ("coupled", "decoupled")
NORMS = ("batch", "layer", "group", "rms", "weight", "none")
CONVOLUTIONAL = ("resnet post", "resnet pre", "bottleneck")


@pytest.fixture(autouse=True, scope="module")
def more_data() -> Iterator[None]:
    """Data of all trials stays loaded: solo trials come and go."""
    load = course.data_on.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        known: dict[Any, Any] = {}

        def once(*key: Any) -> Any:
            if key not in known:
                known[key] = load(*key)
            return known[key]

        patch.setattr(course, "data_on", once)
        yield


def some(cases: Iterable[str], number: int) -> list[Any]:
    """The first cases always, the others with the long tests."""
    return [pytest.param(case, marks=[pytest.mark.long] if index >= number else []) for index, case in enumerate(cases)]


@pytest.mark.parametrize("norm", some(NORMS, 2))
@pytest.mark.parametrize(("rule", "form"), [(rule, form) for rule in RULES for form in FORMS if (rule, form) != ("muon", "coupled")])
def test_every_rule_form_and_norm_under_many_policies_and_schedules(rule: str, form: str, norm: str) -> None:
    """Eight trials in turn on an MLP; four in turn on a model of convolutions. A group of two units has next to no gradient."""
    width = 32 if norm == "group" else 8
    number = RULES.index(rule) + 2 * FORMS.index(form) + NORMS.index(norm)
    hold(trials(range(number % 2, 16, 2), rule=rule, form=form, model={**MODELS["mlp"], "norm": norm, "width": width}), 16)
    numbers = range(number % 4, 16, 4)
    hold(trials(numbers, rule=rule, form=form, model={**MODELS[CONVOLUTIONAL[number % 3]], "norm": norm}), 4)


@pytest.mark.parametrize("capacity", [1, 4, 16])
@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_rows(rule: str, capacity: int) -> None:
    """Sixteen trials on four rows take over each other's rows, at other ages than their neighbours'; one row is padded."""
    specs = trials(rule=rule, model={"norm": "batch"})
    hold(dict(list(specs.items())[: 3 if capacity == 1 else 16]), capacity)


@pytest.mark.parametrize(
    ("rule", "norm"), [(rule, norm) for rule in ("sgd", "adamw", "muon") for norm in ("layer", "rms", "weight") if (rule, norm) != ("muon", "weight")]
)
@pytest.mark.parametrize("model", ["transformer pre", "transformer post"])
def test_transformers(model: str, norm: str, rule: str) -> None:
    """Not under lion: attention does not see the bias of its keys, whose gradient is rounding alone; nor weight norms under muon, which
    makes large steps of the faint gradients of queries and keys.
    """
    numbers = range(NORMS.index(norm), 16, 2)
    hold(trials(numbers, rule=rule, model={**MODELS[model], "norm": norm}), 4, tolerance=TRANSFORMER_TOLERANCE)


VARIANTS: dict[str, dict[str, Any]] = {
    "nesterov": {"optimizer": {"nesterov": True}},
    "nesterov, decoupled": {"optimizer": {"nesterov": True, "decay": "decoupled"}},
    "nesterov, muon": {"optimizer": {"nesterov": True, "rule": "muon"}},
    "mse": {"loss": "mse", "model": {"norm": "group"}},
    "dropout": {"model": {"dropout": 0.3}},
    "dropout, mlp": {"model": {**MODELS["mlp"], "dropout": 0.5}},
    "dropout, transformer": {"model": {**MODELS["transformer pre"], "dropout": 0.2}},
    "shift": {"data": {"augment": "shift", "pool": 1}, "model": {**MODELS["mlp"]}},
    "flip, dropout": {"data": {"augment": "flip"}, "model": {"dropout": 0.2, "norm": "weight"}},
    "no validation": {"data": {"validation": 0.0}, "probes": ["class_error"]},
    "probes": {"probes": ["branch_ratio", "class_error"]},
    "rescale": {"optimizer": {"constraint": {"name": "rescale", "period": 3, "norm": 2.0}}},
    "rescale filters": {"optimizer": {"constraint": {"name": "rescale", "granularity": "filter"}, "rule": "adamw"}},
    "projection": {"optimizer": {"constraint": {"name": "projection"}}},
    "projection of filters": {"optimizer": {"constraint": {"name": "projection", "granularity": "filter"}, "rule": "lion"}},
    "volumization": {"optimizer": {"constraint": {"name": "volumization", "bound": 0.6, "strength": 0.5}}},
    "projection, muon": {"optimizer": {"constraint": {"name": "projection"}, "rule": "muon"}},
    "volumization, muon": {"optimizer": {"constraint": {"name": "volumization", "bound": 0.6, "strength": 0.5}, "rule": "muon"}},
    "volumization, reflecting": {"optimizer": {"constraint": {"name": "volumization", "bound": 0.9, "strength": -1.0}, "rule": "adam"}},
}


@pytest.mark.parametrize("arithmetic", ["converted", "looped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_else_a_trial_may_ask_for(variant: str, arithmetic: str) -> None:
    sections = VARIANTS[variant]
    rule = sections.get("optimizer", {}).get("rule", "sgd")
    transformer = sections.get("model", {}).get("name") == "transformer"
    hold(trials(range(1, 16, 3), rule=rule, **sections), 4, arithmetic, TRANSFORMER_TOLERANCE if transformer else TOLERANCE)


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
@pytest.mark.parametrize(("rule", "form"), [("sgd", "coupled"), ("sgd", "decoupled"), ("adamw", "decoupled"), ("lion", "decoupled")])
def test_the_rotational_constraint(rule: str, form: str, granularity: str) -> None:
    """Without windows, as all trials decay all the time; under windows there are steps without an angle."""
    optimizer = {"constraint": {"name": "rotational", "granularity": granularity}, "weight_decay": 1e-2}
    level = {"decay": {"window": (0.0, 1.0), "shape": "constant"}}
    hold(trials(range(0, 16, 3), rule=rule, form=form, optimizer=optimizer, schedule=level), 4)


def test_the_rotational_constraint_outside_of_the_window_of_decay() -> None:
    optimizer = {"constraint": {"name": "rotational"}, "weight_decay": 1e-2}
    hold(trials(range(4), optimizer=optimizer, schedule={"decay": {"window": (0.3, 0.7), "shape": "constant"}}), 4)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trace of another trial of the same model."""
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    life = solo(trial(trace={"every": 10}))
    write_trace(path, [sample for progress in life.progress for sample in progress.measurement.samples])
    return str(path)


def test_a_schedule_of_norms(recorded: str) -> None:
    hold(trials(range(1, 16, 3), optimizer={"constraint": {"name": "norm_schedule", "trace": recorded}}), 4)


OWN_CODE = """
import torch

def smooth(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1) + 1e-3 * logits.square().mean()

def confidence(logits, labels):
    return logits.softmax(1).amax(1).mean()

def network(width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.1),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(width, 10))
"""


@pytest.mark.parametrize("arithmetic", ["converted", "looped"])
def test_the_users_own_model_loss_and_metrics(arithmetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conformance_own.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"loss": "import:conformance_own:smooth", "metrics": ["import:conformance_own:confidence"]}
    model = {"name": "import:conformance_own:network", "args": {"width": 4}}
    specs = {str(number): trial(seed=number, model=model, optimizer={"lr": 0.05 + 0.05 * number, "gamma": "all@1"}, **own) for number in range(3)}
    hold(specs, 4, arithmetic)


def test_trials_come_late_into_rows_that_hold_garbage() -> None:
    """The first four rows fill with NaN, are freed, and taken by trials that come one by one, an epoch apart."""
    engine, specs = FusedEngine(4), trials(range(4), model={"norm": "none"}, optimizer={"gamma": "none"})
    for number in range(4):
        engine.admit(f"bad {number}", diverging(seed=number, optimizer={"lr": 1e200}))
    assert all(progress.ending and progress.ending.outcome is Outcome.DIVERGED for progress in engine.advance())
    assert not all(value.isfinite().all() for value in engine.weights("bad 0").values())
    lives = {name: Life() for name in (*specs, *(f"bad {number}" for number in range(4)))}
    for number, (name, spec) in enumerate(specs.items()):
        engine.release(f"bad {number}")
        engine.admit(name, spec)
        advanced(engine, lives)
    for _ in range(5):
        advanced(engine, lives)
    for name, spec in specs.items():
        expected = solo(spec)
        lives[name].progress, lives[name].weights = lives[name].progress[: len(expected.progress)], lives[name].weights[: len(expected.progress)]
        assert_agree(lives[name], expected)


def diverging(**sections: Any) -> TrialSpec:
    """A trial whose parameters are soon no numbers."""
    optimizer = {"lr": 1e4, "weight_decay": 0.0, "momentum": 0.0, **sections.pop("optimizer", {})}
    return trial(**{"model": {"norm": "none"}, **sections}, optimizer=optimizer)


@pytest.mark.parametrize(
    "sections", [{}, {"loss": "mse", "optimizer": {"lr": 30.0}}, {"model": {"norm": "batch"}, "optimizer": {"lr": 1e9, "weight_decay": 1.0}}]
)
def test_a_trial_diverges_when_and_why_it_does_alone(sections: dict[str, Any]) -> None:
    spec = diverging(**sections)
    friend = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"lr": 0.01, "clip": 1.0, "weight_decay": 0.0})})
    found = fused({"bad": spec, "friend": friend}, 2)
    assert [progress.ending for progress in found["bad"].progress] == [progress.ending for progress in solo(spec).progress]
    assert solo(spec).progress[-1].ending is not None and not completed(solo(spec))
    assert_agree(found["friend"], solo(friend))


# In float32: bits.

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("sgd", {"model": MODELS["mlp"]}),
    "mlp, dropout": ("adamw", {"model": {**MODELS["mlp"], "dropout": 0.3, "norm": "batch"}}),
    "resnet, batch": ("sgd", {"model": {"width": 16}}),
    "resnet of few channels": ("sgd", {}),
    "resnet of six channels": ("sgd", {"model": {"width": 6, "order": "pre"}}),
    "resnet, group, shifted": ("adam", {"model": {"norm": "group", "order": "pre", "width": 16}, "data": {"pool": 1, "augment": "shift"}}),
    "resnet of few channels, group, shifted": ("adam", {"model": {"norm": "group", "order": "pre"}, "data": {"pool": 1, "augment": "shift"}}),
    "bottleneck, weight": ("lion", {"model": {**MODELS["bottleneck"], "norm": "weight"}}),
    "transformer": ("lion", {"model": {**MODELS["transformer pre"], "dropout": 0.1}}),
    "transformer, rms": ("sgd", {"model": {**MODELS["transformer post"], "norm": "rms"}}),
    "rotational": (
        "sgd",
        {
            "model": {"width": 16},
            "optimizer": {"constraint": {"name": "rotational"}, "weight_decay": 1e-2},
            "schedule": {"decay": {"window": (0, 1), "shape": "constant"}},
        },
    ),
    "volumization": ("adamw", {"model": {"width": 16}, "optimizer": {"constraint": {"name": "volumization", "bound": 0.6, "strength": 0.5}}}),
    "muon": ("muon", {"model": {"width": 16}}),
    "muon, mlp": ("muon", {"model": {**MODELS["mlp"], "norm": "batch"}}),
    "in bf16": ("sgd", {"precision": "bf16", "model": {"norm": "group"}}),
}


def exact(case: str, numbers: range = range(16)) -> dict[str, TrialSpec]:
    """The trials of a case, in float32, for three epochs."""
    rule, sections = EXACT[case]
    schedule = {"epochs": 3, **sections.get("schedule", {})}
    return trials(numbers, rule=rule, **{"precision": "float32", **sections, "schedule": schedule})


@pytest.mark.parametrize("case", some(EXACT, 4))
def test_the_bits_of_a_trial_do_not_depend_on_rows_neighbours_or_their_number(case: str) -> None:
    """All sixteen in order and in another; four at a time, which are compacted and refilled; three alone."""
    specs = exact(case)
    whole = fused(specs, 16)
    shuffled = {name: specs[name] for name in sorted(specs, key=lambda name: (7 * int(name)) % 16)}
    for capacity, some in ((16, shuffled), (5, shuffled), *((1, {name: specs[name]}) for name in ("0", "5", "14"))):
        found = fused(some, capacity)
        for name, life in found.items():
            assert_same_bits(life, whole[name])


@pytest.mark.parametrize("case", some(EXACT, 4))
def test_a_neighbour_that_leaves_the_numbers_changes_no_bit(case: str) -> None:
    specs = exact(case, range(3))
    alone = fused(specs, 3)
    (_, middle, _) = specs.values()
    bad = middle.model_copy(update={"optimizer": middle.optimizer.model_copy(update={"lr": 1e30, "clip": None})})
    found = fused({"0": specs["0"], "bad": bad, "1": specs["1"], "2": specs["2"]}, 4)
    bad_end = found.pop("bad").progress[-1].ending
    assert case == "rotational" or (bad_end is not None and bad_end.outcome is Outcome.DIVERGED)
    for name, life in found.items():
        assert_same_bits(life, alone[name])


@pytest.mark.parametrize("case", some(EXACT, 4))
def test_a_snapshot_goes_on_bit_for_bit_in_another_row_among_others(case: str, tmp_path: Path) -> None:
    specs = exact(case, range(6))
    whole = fused(specs, 6)
    first, life = FusedEngine(3), {name: Life() for name in ("0", "1")}
    for name in life:
        first.admit(name, specs[name])
    advanced(first, life)
    first.snapshot("1").save(tmp_path / "snapshot.pt")
    second = FusedEngine(5)
    for name in ("3", "4", "5"):
        second.admit(name, specs[name])
    second.advance()
    assert_same_bits(resumed(Snapshot.load(tmp_path / "snapshot.pt"), specs["1"], second, life["1"]), whole["1"])


CROSSINGS: dict[str, Callable[[], tuple[Engine, Engine]]] = {
    "fused to solo": lambda: (FusedEngine(2), SoloEngine()),
    "solo to fused": lambda: (SoloEngine(), FusedEngine(2)),
}
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: case for name, case in EXACT.items() if name not in ("in bf16", "transformer") and "channels" not in name},
    "transformer": ("adamw", EXACT["transformer"][1]),
    "adam": ("adam", {}),
    "nesterov": ("sgd", {"optimizer": {"nesterov": True, "decay": "decoupled"}}),
    "lion": ("lion", {}),
    "norm schedule": ("sgd", {"optimizer": {"constraint": {"name": "norm_schedule"}}}),
}


@pytest.mark.parametrize("crossing", CROSSINGS)
@pytest.mark.parametrize("case", SAVED)
def test_a_snapshot_goes_on_in_another_kind_of_engine(case: str, crossing: str, tmp_path: Path, recorded: str) -> None:
    rule, sections = SAVED[case]
    if case == "norm schedule":
        sections = {"optimizer": {"constraint": {"name": "norm_schedule", "trace": recorded}}}
    for name, spec in trials((2, 7), rule=rule, **sections).items():
        expected, life = solo(spec), Life()
        early, late = CROSSINGS[crossing]()
        early.admit(name, spec)
        advanced(early, {name: life})
        advanced(early, {name: life})
        early.snapshot(name).save(tmp_path / "snapshot.pt")
        resumed(Snapshot.load(tmp_path / "snapshot.pt"), spec, late, life)
        assert_agree(life, expected, TRANSFORMER_TOLERANCE if case.startswith("transformer") else TOLERANCE)


def test_a_trial_can_be_saved_before_its_first_epoch(tmp_path: Path) -> None:
    spec = exact("resnet, batch", range(1))["0"]
    first = FusedEngine(2)
    first.admit("0", spec)
    first.snapshot("0").save(tmp_path / "snapshot.pt")
    life = resumed(Snapshot.load(tmp_path / "snapshot.pt"), spec, FusedEngine(2), Life())
    assert_same_bits(life, fused({"0": spec}, 2)["0"])


def test_a_snapshot_of_another_trial_is_refused_and_takes_no_row() -> None:
    specs = exact("mlp", range(2))
    engine = FusedEngine(1)
    engine.admit("0", specs["0"])
    engine.advance()
    snapshot = engine.snapshot("0")
    engine.release("0")
    with pytest.raises(ValueError, match="another trial"):
        engine.admit("1", specs["1"], snapshot)
    assert len(engine) == 0
    engine.admit("1", specs["1"])
    assert [progress.trial_id for progress in engine.advance()] == ["1"]


@pytest.mark.parametrize("named", [("1",), ("3", "0"), ("2", "3", "1"), ()])
def test_trials_that_are_not_named_are_left_exactly_as_they_were(named: tuple[str, ...]) -> None:
    specs = exact("mlp", range(4))
    engine, lives = FusedEngine(4), {name: Life() for name in specs}
    for name, spec in specs.items():
        engine.admit(name, spec)
    advanced(engine, lives)
    before = {name: engine.snapshot(name) for name in specs}
    assert {progress.trial_id for progress in engine.advance(only=named)} == set(named)
    for name in set(specs) - set(named):
        after = engine.snapshot(name)
        assert (after.step, after.epoch) == (before[name].step, before[name].epoch)
        assert_same_state(after.state, before[name].state)
        assert not named or all(torch.equal(value, engine.weights(name)[key]) for key, value in before[name].state["model"].items())


def assert_same_state(one: Any, other: Any) -> None:
    """Two nested states hold the same."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert_same_state(one[key], value)
    elif isinstance(other, list):
        for mine, its in zip(one, other, strict=True):
            assert_same_state(mine, its)
    else:
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def test_a_trial_that_waits_while_others_are_trained_loses_nothing() -> None:
    """Rungs of a search: now these are trained on, now those."""
    specs = exact("mlp, dropout", range(5))
    whole, engine, lives = fused(specs, 5), FusedEngine(6), {name: Life() for name in specs}
    for name, spec in specs.items():
        engine.admit(name, spec)
    for named in (("0", "1", "2", "3", "4"), ("4", "2"), ("0",), ("1", "3", "0"), ("4", "1", "2", "3")):
        for progress in engine.advance(only=named):
            lives[progress.trial_id].progress.append(progress)
            lives[progress.trial_id].weights.append({key: value.clone() for key, value in engine.weights(progress.trial_id).items()})
    for name, life in lives.items():
        assert_same_bits(life, whole[name])


GRADIENTS: dict[str, dict[str, Any]] = {
    **{name: {"model": model} for name, model in MODELS.items()},
    "bottleneck": {"model": {**MODELS["bottleneck"], "width": 8}},
    **{f"resnet, {norm}": {"model": {"norm": norm}} for norm in NORMS},
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_first_gradients_in_float32(case: str) -> None:
    """One step of SGD: its momentum is the gradient."""
    one_step: dict[str, Any] = {"data": {"train_size": 64, "batch_size": 64}, "schedule": {"epochs": 1}, "precision": "float32"}
    optimizer = {"weight_decay": 0.0, "gamma": "none", "gamma_decay": 0.0, "momentum": 0.9, "clip": None, "shift": "exempt", "embedding": "exempt"}
    specs = trials(range(3), **one_step, **GRADIENTS[case], optimizer=optimizer)
    engine = FusedEngine(3)
    for name, spec in specs.items():
        engine.admit(name, spec)
    engine.advance()
    for name, spec in specs.items():
        alone = SoloEngine()
        alone.admit(name, spec)
        alone.advance()
        expected, found = (each.snapshot(name).state["moments"] for each in (alone, engine))
        apart = torch.stack([(found[parameter]["m"] - moments["m"]).norm() for parameter, moments in expected.items()]).norm()
        size = torch.stack([moments["m"].norm() for moments in expected.values()]).norm()
        assert float(apart) <= 1e-6 * float(size)


def test_bf16_trains_as_alone_up_to_rounding() -> None:
    specs = trials(range(3), precision="bf16", model={"norm": "group"})
    for name, life in fused(specs, 3).items():
        expected = solo(specs[name])
        assert [progress.ending for progress in life.progress] == [progress.ending for progress in expected.progress]
        first, last = (life.progress[0].measurement.values["train/loss"] for life in (life, expected))
        assert first == pytest.approx(last, rel=0.05)


def test_trials_that_cannot_share_an_engine_are_refused_and_take_no_row() -> None:
    engine = FusedEngine(2)
    engine.admit("0", trial())
    for sections in ({"model": {"width": 8}}, {"optimizer": {"rule": "adam"}}, {"data": {"batch_size": 32}}, {"precision": "float32"}):
        with pytest.raises(ValueError, match="cannot be fused"):
            engine.admit("1", trial(**sections))
    with pytest.raises(ValueError, match="holds a slot"):
        engine.admit("0", trial(seed=1))
    engine.admit("1", trial(seed=1))
    with pytest.raises(ValueError, match="slots are taken"):
        engine.admit("2", trial(seed=2))
    assert len(engine) == 2
