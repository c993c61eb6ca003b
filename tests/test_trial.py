"""TrialSpec: gamma policies, the product of lr and weight decay, and what is rejected."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from study.optimizer import PLACES, OptimizerSpec, canonical_gamma, gamma_terms
from study.trial import TrialSpec, flatten


def optimizer(**fields: Any) -> OptimizerSpec:
    return OptimizerSpec.model_validate(fields)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("none", "none"),
        ("all", "all"),
        ("all@1", "all@1"),
        ("last", "last"),
        ("last+inner", "inner+last"),
        ("stream+final+down+last+inner+stem", "stem+inner+last+down+final+stream"),
        ("last@1+inner", "inner+last@1"),
        ("inner + last@1", "inner+last@1"),
        (" last ", "last"),
    ],
)
def test_places_of_a_policy_stand_in_canonical_order(written: str, canonical: str) -> None:
    assert canonical_gamma(written) == canonical
    assert optimizer(gamma=written).gamma == canonical


def test_an_anchor_binds_to_its_own_place_only() -> None:
    assert gamma_terms("inner+last@1") == {"inner": 0.0, "last": 1.0}
    assert gamma_terms("all@1") == dict.fromkeys(PLACES, 1.0)
    assert gamma_terms("none") == {}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("decayed", r"'decayed' is not a place of gains \(got 'decayed'\); use none, all, or places .* stem, inner, last, down, final, stream"),
        ("last+", r"'' is not a place of gains \(got 'last\+'\)"),
        ("", "'' is not a place of gains"),
        ("last+last", r"'last' is named twice \(got 'last\+last'\)"),
        ("last+last@1", "'last' is named twice"),
        ("all+last", r"'all' stands alone, it cannot be joined by '\+' \(got 'all\+last'\)"),
        ("none+last", "'none' stands alone"),
        ("none@1", "'none' stands alone"),
        ("last@2", r"an anchor is written '@1' \(got 'last@2'\)"),
        ("last@", "an anchor is written '@1'"),
        (None, "must be text; quote it"),
        (False, "must be text; quote it"),
    ],
)
def test_a_policy_that_is_none_says_why(policy: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        optimizer(gamma=policy)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.1, 5e-4)),
        ({"lr": 0.5}, (0.5, 5e-4)),
        ({"lr": 0.5, "weight_decay": 1e-2}, (0.5, 1e-2)),
        ({"lr": 0.5, "intrinsic_lr": 1e-3}, (0.5, 2e-3)),
        ({"weight_decay": 1e-2, "intrinsic_lr": 1e-3}, (0.1, 1e-2)),
        ({"intrinsic_lr": 1e-3}, (0.1, 1e-2)),
        ({"lr": 0.5, "intrinsic_lr": 0}, (0.5, 0.0)),
        ({"lr": 0.5, "weight_decay": 0.2, "intrinsic_lr": 0.1 * (1 + 1e-10)}, (0.5, 0.2)),
    ],
)
def test_two_of_lr_weight_decay_and_their_product_give_the_third(given: dict[str, float], expected: tuple[float, float]) -> None:
    found = optimizer(**given)
    assert (found.lr, found.weight_decay) == pytest.approx(expected, rel=1e-12)
    assert found.intrinsic_lr == found.lr * found.weight_decay


def test_three_that_disagree_are_an_error() -> None:
    message = r"lr x weight_decay = 0.05 contradicts intrinsic_lr \(got lr 0.5, weight_decay 0.1, intrinsic_lr 0.06\); give two of the three"
    with pytest.raises(ValidationError, match=message):
        optimizer(lr=0.5, weight_decay=0.1, intrinsic_lr=0.06)
    with pytest.raises(ValidationError, match="contradicts"):
        optimizer(lr=0.5, weight_decay=0.2, intrinsic_lr=0.1 * (1 + 1e-8))


def test_a_product_without_decay_leaves_lr_unknown() -> None:
    with pytest.raises(ValidationError, match="intrinsic_lr with weight_decay 0 leaves lr unknown; give lr"):
        optimizer(weight_decay=0, intrinsic_lr=1e-3)


@pytest.mark.parametrize("fields", [{"lr": True}, {"lr": 0}, {"lr": -1}, {"lr": math.nan}, {"lr": math.inf}, {"lr": None}, {"lr": 10**400}])
def test_a_learning_rate_is_a_positive_finite_number(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="lr"):
        optimizer(**fields)


@given(lr=st.floats(1e-6, 1e4), product=st.floats(1e-12, 1e2))
def test_lr_and_weight_decay_alone_restore_a_spec(lr: float, product: float) -> None:
    trial = TrialSpec.model_validate({"optimizer": {"lr": lr, "intrinsic_lr": product}})
    assert "intrinsic_lr" not in trial.canonical()["optimizer"]
    assert TrialSpec.model_validate(trial.canonical()) == trial
    assert TrialSpec.model_validate(trial.model_dump(mode="json")) == trial
    assert TrialSpec.model_validate_json(trial.brief()) == trial


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"optimizer": {"rule": "muon", "aux_lr": 1e-3, "gamma": "inner+last@1", "constraint": {"name": "projection"}}},
        {
            "data": {"name": "npz", "path": "x.npz"},
            "model": {"name": "mlp", "norm": "none", "depth": 3},
            "schedule": {"shape": "step", "milestones": [0.3]},
        },
        {"data": {"name": "import:a.b:c", "args": {"n": 1}}, "loss": "mse", "metrics": ["import:a.b:d"], "precision": "float64"},
    ],
)
def test_a_brief_spec_is_the_same_spec(tree: dict[str, Any]) -> None:
    trial = TrialSpec.model_validate(tree)
    assert TrialSpec.model_validate_json(trial.brief()) == trial
    assert len(trial.brief()) < len(trial.model_dump_json()) / 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"name": "cifar"}}, r"must be one of digits, mnist5k, npz, or import:package.module:function \(got 'cifar'\)"),
        ({"data": {"name": "import:pkg.module"}}, r"must be written import:package.module:function \(got 'import:pkg.module'\)"),
        ({"data": {"name": "import:pkg.module:f(1)"}}, "must be written import:package.module:function"),
        ({"data": {"name": "npz"}}, "data.name: npz needs data.path"),
        ({"data": {"path": "x.npz"}}, "data.path belongs to data.name: npz"),
        ({"data": {"args": {"n": 1}}}, "data.args belongs to an imported data.name"),
        ({"data": {"validation": 0.5, "test": 0.5}}, r"validation \+ test must leave training images \(got 0.5 \+ 0.5\)"),
        ({"data": {"batch_size": True}}, "batch_size"),
        ({"model": {"args": {"n": 1}}}, "model.args belongs to an imported model.name"),
        ({"model": {"name": "transformer", "norm": "batch"}}, r"a transformer's norm is layer, rms, weight or none \(got 'batch'\)"),
        ({"model": {"name": "transformer", "width": 10}}, r"width must be a multiple of heads \(got width 10, heads 4\)"),
        ({"model": {"blocks": []}}, "blocks"),
        ({"optimizer": {"rule": "adam", "nesterov": True}}, "nesterov needs rule sgd or muon with momentum above 0"),
        ({"optimizer": {"rule": "adamw", "aux_lr": 1e-3}}, r"aux_lr needs rule muon \(got adamw\)"),
        ({"optimizer": {"rule": "muon", "decay": "coupled"}}, "muon cannot couple decay into the gradient"),
        ({"optimizer": {"rule": "muon", "constraint": {"name": "rotational"}}}, r"whose rotation at equilibrium is known \(got muon, decoupled\)"),
        ({"schedule": {"milestones": [0.5, 0.2]}}, r"milestones must rise \(got \[0.5, 0.2\]\)"),
        ({"loss": "hinge"}, "must be one of cross_entropy, mse, or import"),
    ],
)
def test_a_trial_that_cannot_be_says_why(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrialSpec.model_validate(tree)


def test_a_transformer_is_normalized_by_layer_unless_told_otherwise() -> None:
    assert TrialSpec.model_validate({"model": {"name": "transformer"}}).model.norm == "layer"
    assert TrialSpec.model_validate({"model": {"name": "transformer", "norm": "rms"}}).model.norm == "rms"
    assert TrialSpec().model.norm == "batch"


def test_decay_is_coupled_as_in_torch_unless_told_otherwise() -> None:
    assert [optimizer(rule=rule).form for rule in ("sgd", "adam", "adamw")] == ["coupled", "coupled", "decoupled"]
    assert optimizer(rule="adamw", decay="coupled").form == "coupled"


def test_a_trial_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrialSpec().seed = 1  # type: ignore[misc]


def test_own_metrics_are_measured_under_the_name_of_their_function() -> None:
    assert TrialSpec.model_validate({"metrics": ["import:pkg.scores:top3"]}).measured()[-1] == "val/top3"


def test_every_field_has_a_dotted_path() -> None:
    dotted = TrialSpec().dotted()
    assert dotted["optimizer.lr"] == 0.1
    assert dotted["model.blocks"] == [2, 2]
    assert dotted["data.args"] == {}
    assert flatten({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1, "d": {}}


def test_what_muon_leaves_to_adamw_has_a_peak_of_its_own() -> None:
    default, given = optimizer(rule="muon", lr=0.02), optimizer(rule="muon", lr=0.02, aux_lr=1e-3, nesterov=True)
    assert (default.form, default.aux_lr) == ("decoupled", None)
    assert (default.peak(aux=False), default.peak(aux=True)) == (0.02, 3e-4)
    assert (given.peak(aux=False), given.peak(aux=True)) == (0.02, 1e-3)
