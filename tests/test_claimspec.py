"""ClaimSpec: which claims a spec may make, and in which words others are refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from study.errors import SpecError
from study.spec import StudySpec, check, load_spec

SLOPE = {"id": "power", "says": "It grows.", "slope": {"y": "final/rotation/median", "x": "optimizer.lr"}, "expect": {"above": 0}}
CONTRAST = {
    "id": "better",
    "says": "It helps.",
    "contrast": {"metric": "final/val/error", "arm": "optimizer.gamma", "a": "last", "b": "none"},
    "expect": {"below": 0},
}
SPREAD = {"id": "flat", "says": "It is flat.", "spread": {"metric": "val/error", "over": "optimizer.lr"}, "expect": {"below": 2}}
RANK = {"id": "rank", "says": "It wins.", "rank": {"metric": "val/error", "arm": "optimizer.gamma"}, "expect": {"first": "last"}}


def tree(*claims: dict[str, Any], **changes: Any) -> dict[str, Any]:
    space = {"optimizer.lr": {"low": 0.001, "high": 1}, "optimizer.gamma": {"choices": ["none", "last", "inner+last"], "role": "scientific"}}
    return {"name": "tiny", "space": space, "search": {"trials": 6}, "claims": list(claims), **changes}


def complaints(*claims: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        check(tree(*claims, **changes))
    return str(caught.value).splitlines()


SCHEMA = "; see `study schema` for what it takes"
WRONG = [
    ({"id": "x"}, ["claims.0.says: is required; add it", "claims.0.expect: is required; add it"]),
    ({**SLOPE, "id": "A b"}, [f"claims.0.id: must be lower-case letters, digits and dashes (got 'A b'){SCHEMA}"]),
    ({**SLOPE, **RANK}, [f"claims.0: a claim is exactly one of level, slope, contrast, spread, rank (got slope, rank){SCHEMA}"]),
    ({**SLOPE, "slope": None}, [f"claims.0: a claim is exactly one of level, slope, contrast, spread, rank (got none){SCHEMA}"]),
    ({**SLOPE, "slop": 1}, ["claims.0.slop: unknown key (got 'slop'); did you mean 'slope'?"]),
    ({**SLOPE, "where": {"seed": {"abov": 1}}}, ["claims.0.where.seed.abov: unknown key (got 'abov'); did you mean 'above'?"]),
    (
        {**SLOPE, "expect": {"above": 0, "below": 1}},
        [f"claims.0.expect: an expectation is exactly one of below, above, between, first, order (got below, above){SCHEMA}"],
    ),
    ({**SLOPE, "expect": {"between": [1, 0]}}, [f"claims.0.expect: between goes from the smaller to the larger number (got [1, 0]){SCHEMA}"]),
    ({**SLOPE, "expect": {"between": [1]}}, ["claims.0.expect.between: has too few values (got a list of 1); give all of them"]),
    ({**SLOPE, "expect": {"first": "last"}}, [f"claims.0: a slope expects below, above or between (got first){SCHEMA}"]),
    ({**RANK, "expect": {"below": 1}}, [f"claims.0: a rank expects first or order (got below){SCHEMA}"]),
    ({**SLOPE, "expect": {"below": "1"}}, [f"claims.0.expect.below: must be a number (got '1'){SCHEMA}"]),
    ({**SLOPE, "slope": {"y": "val/error", "x": []}}, [f"claims.0.slope.x: must not be empty (got a list of 0){SCHEMA}"]),
    (
        {**SLOPE, "slope": {"y": "val/eror", "x": "optimizer.l"}},
        [
            "claims.0.slope.y: the table of trials has no such column (got 'val/eror'); did you mean 'val/error'?",
            "claims.0.slope.x: the table of trials has no such column (got 'optimizer.l'); did you mean 'optimizer.lr'?",
        ],
    ),
    (
        {**SLOPE, "slope": {"y": "final/branch_ratio/layer1.0", "x": "optimizer"}},
        [
            "claims.0.slope.y: no trial measures this (got 'final/branch_ratio/layer1.0'); add branch_ratio to trial.probes",
            "claims.0.slope.x: 'optimizer' is a section, not a field; name a field of it, such as optimizer.rule",
        ],
    ),
    (
        {**SLOPE, "slope": {"y": "best/val/loss", "x": "optimizer.lr"}},
        ["claims.0.slope.y: only the objective has a best value (got 'best/val/loss'); use best/val/error, or final/val/loss"],
    ),
    (
        {**CONTRAST, "contrast": {**CONTRAST["contrast"], "arm": "optimizer.lr"}},
        ["claims.0.contrast.arm: is no scientific axis of the space (got 'optimizer.lr'); use one of optimizer.gamma"],
    ),
    (
        {**CONTRAST, "contrast": {**CONTRAST["contrast"], "a": "all"}},
        ["claims.0.contrast.a: optimizer.gamma never takes this value (got 'all'); use one of 'none', 'last', 'inner+last'"],
    ),
    (
        {**CONTRAST, "contrast": {**CONTRAST["contrast"], "a": "none"}},
        ["claims.0.contrast: compares an arm with itself (got 'none'); name two different arms"],
    ),
    (
        {**SPREAD, "spread": {"metric": "val/error"}},
        ["claims.0.spread: a spread needs several values; name in `over` what varies, or several metrics"],
    ),
    (
        {**SPREAD, "spread": {"metric": "val/error", "over": "optimizer.lr", "against": {"optimizer.l": 1}}},
        ["claims.0.spread.against.optimizer.l: the table of trials has no such column (got 'optimizer.l'); did you mean 'optimizer.lr'?"],
    ),
    (
        {"id": "level", "says": "Low.", "level": {"metric": "val/eror"}, "expect": {"below": 1}},
        ["claims.0.level.metric: the table of trials has no such column (got 'val/eror'); did you mean 'val/error'?"],
    ),
    (
        {**RANK, "expect": {"order": ["last", "all"]}},
        ["claims.0.expect.order.1: optimizer.gamma never takes this value (got 'all'); use one of 'none', 'last', 'inner+last'"],
    ),
    ({**RANK, "expect": {"order": ["last", "none", "last"]}}, ["claims.0.expect.order: the order names an arm twice; keep each once"]),
    (
        {**SLOPE, "where": {"seed": [1, 2]}},
        [f"claims.0.where.seed: a condition on several values is written {{in: [...]}} (got a list of 2){SCHEMA}"],
    ),
    ({**SLOPE, "where": {"seed": {}}}, [f"claims.0.where.seed: a condition needs a value, above, below, between or in{SCHEMA}"]),
    ({**SLOPE, "where": {"replicate": "yes"}}, ["claims.0.where.replicate: replicate is true or false; write replicate: true"]),
    (
        {**SLOPE, "where": {"arm": "last", "optimizer.rule": {"in": ["sgd", "sdg"]}}},
        [
            "claims.0.where.arm: no arm has this label (got 'last'); "
            "use one of 'optimizer.gamma=none', 'optimizer.gamma=last', 'optimizer.gamma=inner+last'",
            "claims.0.where.optimizer.rule: input should be 'sgd', 'adam', 'adamw', 'lion' or 'muon' (got 'sdg'); use values that optimizer.rule takes",
        ],
    ),
]


@pytest.mark.parametrize(("claim", "said"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_a_wrong_claim_says_where_what_and_what_to_do(claim: dict[str, Any], said: list[str]) -> None:
    assert complaints(claim) == said


def test_ids_are_told_apart() -> None:
    assert complaints(SLOPE, RANK, {**SPREAD, "id": "power"}) == ["claims.2.id: two claims have this id (got 'power'); give one of them another"]


def test_claims_are_judged_beside_other_problems_and_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    content = yaml.safe_dump(tree(SLOPE, {**CONTRAST, "contrast": {**CONTRAST["contrast"], "b": "al"}}, question=3), sort_keys=False)
    path.write_text(content)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and any("claims.1.contrast.b: optimizer.gamma never takes this value (got 'al')" in line for line in lines)
    told = next(line for line in lines if "claims" in line)
    assert content.splitlines()[int(told.split(":")[1]) - 1].strip() == "b: al"


@pytest.mark.parametrize(
    ("trial", "axis", "said"),
    [
        ({}, {}, ["schedule.shape: constant (got 'cosine'); set trial.schedule.shape to constant"]),
        ({"shape": "constant", "warmup": 0.1}, {}, ["schedule.warmup: 0 (got 0.1); set trial.schedule.warmup to 0"]),
        ({"shape": "constant"}, {"schedule.shape": {"choices": ["constant", "step"]}}, ["schedule.shape: constant (got 'step'); vary it no more"]),
        ({"shape": "constant"}, {"schedule.warmup": {"low": 0, "high": 0.5}}, ["schedule.warmup: 0 (got 0.5); vary it no more"]),
    ],
)
def test_a_claim_about_equilibrium_needs_a_learning_rate_that_never_changes(trial: dict[str, Any], axis: dict[str, Any], said: list[str]) -> None:
    claim = {**SLOPE, "where": {"equilibrated": True}}
    space = {**tree()["space"], **axis}
    assert complaints(claim, trial={"schedule": trial}, space=space) == [
        f"claims.0.where.equilibrated: trials in equilibrium need {words}, or leave the condition out" for words in said
    ]
    check(tree({**SLOPE, "where": {"equilibrated": False}}, trial={"schedule": trial}, space=space))


def test_claims_about_equilibrium_at_a_constant_rate_are_taken() -> None:
    check(tree({**SLOPE, "where": {"equilibrated": True}}, trial={"schedule": {"shape": "constant"}}))


def test_values_are_kept_as_their_fields_have_them() -> None:
    claim = {**CONTRAST, "contrast": {**CONTRAST["contrast"], "a": "last+inner"}, "where": {"optimizer.gamma": {"in": ["last+inner", "none"]}}}
    contrast, rank = check(tree(claim, {**RANK, "expect": {"order": ["last+inner", "none"]}})).claims
    assert contrast.contrast is not None and contrast.contrast.a == "inner+last"
    assert contrast.where["optimizer.gamma"].one_of == ("inner+last", "none")
    assert rank.expect.order == ("inner+last", "none")


def test_claims_read_back_as_they_were_written() -> None:
    space = {"optimizer.decay": {"choices": [None, "decoupled"], "role": "scientific"}, "optimizer.lr": {"choices": [0.1, 0.2]}}
    contrast = {**CONTRAST, "contrast": {"metric": "val/error", "arm": "optimizer.decay", "a": None, "b": "decoupled", "paired_by": "seed"}}
    rank = {**RANK, "rank": {"metric": "val/error", "arm": "optimizer.decay"}, "expect": {"first": None}}
    where = {"optimizer.decay": None, "replicate": True, "seed": {"in": [1, 2]}, "optimizer.lr": {"above": 0, "between": [0, 1]}}
    spec = check(tree(contrast, rank, SPREAD, {**SLOPE, "where": where}, space=space))
    assert check(yaml.safe_load(spec.to_yaml())) == spec
    assert yaml.safe_load(spec.to_yaml())["claims"][3]["where"] == where


def test_the_schema_describes_claims() -> None:
    definitions = StudySpec.model_json_schema()["$defs"]
    assert {"ClaimSpec", "Slope", "Contrast", "Spread", "Rank", "Expectation", "Condition"} <= set(definitions)
    value, bounds = definitions["Condition"]["anyOf"]
    assert "boolean" in value["type"] and {"above", "below", "between", "in"} <= set(bounds["properties"])
    assert [field["type"] for field in definitions["Slope"]["properties"]["x"]["anyOf"]] == ["string", "array"]
