"""StudySpec: what is read, what is rejected and in which words, and how assignments become trials."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from study.document import parse_value, to_yaml
from study.errors import NotFound, SpecError
from study.spec import StudySpec, check, load_spec
from study.trial import TrialSpec

MINIMAL = """\
name: tiny
space:
  optimizer.lr: {low: 1e-3, high: 1, log: true}
search: {trials: 6}
"""


def tree(**changes: Any) -> dict[str, Any]:
    """A small valid study as plain values, with changed sections."""
    space = {"optimizer.lr": {"low": 0.001, "high": 1, "log": True}}
    return {"name": "tiny", "space": space, "search": {"trials": 6}, **changes}


def complaints(given: object) -> list[str]:
    with pytest.raises(SpecError) as caught:
        check(given)
    return str(caught.value).splitlines()


def complaints_about(folder: Path, content: str | bytes, sets: Sequence[str] = (), name: str = "s.yaml") -> list[str]:
    """What is said of a file, its folder left out."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as caught:
        load_spec(path, sets)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def loaded(folder: Path, content: str, sets: Sequence[str] = (), name: str = "s.yaml") -> StudySpec:
    (folder / name).write_text(content, encoding="utf-8")
    return load_spec(folder / name, sets)


WRONG = [
    (tree(extra=1), "extra: unknown key (got 'extra'); remove it; `study schema` lists the keys"),
    (tree(trial={"optimizer": {"learning_rate": 1}}), "trial.optimizer.learning_rate: unknown key (got 'learning_rate'); did you mean 'lr'?"),
    (tree(trial={"optimizer": {"name": "sgd"}}), "trial.optimizer.name: unknown key (got 'name'); did you mean 'rule'?"),
    (
        tree(space={"optimizer.learning_rate": {"low": 1e-3, "high": 1}}),
        "space.optimizer.learning_rate: a trial has no such field (got 'optimizer.learning_rate'); did you mean 'optimizer.lr'?",
    ),
    (tree(space={"lr": {"low": 1e-3, "high": 1}}), "space.lr: a trial has no such field (got 'lr'); did you mean 'optimizer.lr'?"),
    (tree(space={"trial.seed": {"choices": [0]}}), "space.trial.seed: a trial has no such field (got 'trial.seed'); did you mean 'seed'?"),
    (
        tree(resources={"gpus_per_trial": 1.5}),
        "resources.gpus_per_trial: must be a share of one GPU, or a whole number of them (got 1.5); use 0.5 for two trials on each GPU",
    ),
    (tree(nme="x"), "nme: unknown key (got 'nme'); did you mean 'name'?"),
    (tree(trial={"optimizer": {"momentun": 0}}), "trial.optimizer.momentun: unknown key (got 'momentun'); did you mean 'momentum'?"),
    (tree(trial={"zzz": 0}), "trial.zzz: unknown key (got 'zzz'); remove it; `study schema` lists the keys"),
    (tree(space={"optimizer.lr": {"low": 1, "hgh": 2}}), "space.optimizer.lr.hgh: unknown key (got 'hgh'); did you mean 'high'?"),
    (
        tree(space={"optimizer.gama": {"choices": ["none", "all"]}}),
        "space.optimizer.gama: a trial has no such field (got 'optimizer.gama'); did you mean 'optimizer.gamma'?",
    ),
    (tree(space={"x.y.z": {"choices": [1]}}), "space.x.y.z: a trial has no such field (got 'x.y.z'); see `study schema`"),
    (
        tree(space={"optimizer": {"choices": ["sgd"]}}),
        "space.optimizer: 'optimizer' is a section, not a field; vary a field of it, such as optimizer.rule",
    ),
    (
        tree(space={"optimizer.lr": {"low": 1, "high": 1}}),
        "space.optimizer.lr: `low < high` must hold (got low=1, high=1); see `study schema` for what it takes",
    ),
    (
        tree(space={"optimizer.lr": {"low": 0, "high": 1, "log": True}}),
        "space.optimizer.lr: a log axis needs `low > 0` (got low=0); see `study schema` for what it takes",
    ),
    (
        tree(space={"optimizer.lr": {"low": 0, "high": 1}}),
        "space.optimizer.lr: input should be greater than 0 (got 0); use values that optimizer.lr takes",
    ),
    (
        tree(space={"optimizer.rule": {"choices": ["sgd", "sdg"]}}),
        "space.optimizer.rule: input should be 'sgd', 'adam', 'adamw', 'lion' or 'muon' (got 'sdg'); use values that optimizer.rule takes",
    ),
    (
        tree(space={"model.width": {"low": 8, "high": 32.5}}),
        "space.model.width: input should be a valid integer, got a number with a fractional part (got 32.5); use values that model.width takes",
    ),
    (
        tree(space={"model.width": {"low": 8, "high": 32, "step": 0.5}}),
        "space.model.width: model.width takes whole numbers only (got step 0.5); use a whole step",
    ),
    (
        tree(space={"optimizer.gamma": {"choices": ["inner+last", "last+inner"]}}),
        "space.optimizer.gamma: choices repeat a value (got 'inner+last', 'inner+last'); keep each once",
    ),
    (
        tree(space={"optimizer.gamma": {"choices": ["none", "tail"]}}),
        "space.optimizer.gamma: 'tail' is not a place of gains (got 'tail'); "
        "use none, all, or places joined by + out of stem, inner, last, down, final, stream",
    ),
    (
        tree(trial={"optimizer": {"gamma": "tail"}}),
        "trial.optimizer.gamma: 'tail' is not a place of gains (got 'tail'); "
        "use none, all, or places joined by + out of stem, inner, last, down, final, stream",
    ),
    (
        tree(trial={"optimizer": {"gamma": False}}),
        "trial.optimizer.gamma: must be text (got false); quote it",
    ),
    (
        tree(trial={"optimizer": {"lr": 0.5, "weight_decay": 0.1, "intrinsic_lr": 0.06}}),
        "trial.optimizer.intrinsic_lr: lr x weight_decay = 0.05 contradicts intrinsic_lr "
        "(got lr 0.5, weight_decay 0.1, intrinsic_lr 0.06); give two of the three",
    ),
    (
        tree(space={f"optimizer.{name}": {"low": 0.1, "high": 1} for name in ("lr", "weight_decay", "intrinsic_lr")}),
        "space: lr, weight_decay and intrinsic_lr cannot all be axes: any two fix the third; remove one of them",
    ),
    (
        tree(objective={"metric": "val/acuracy"}),
        "objective.metric: no trial reports this metric (got 'val/acuracy'); use one of train/loss, train/error, val/loss, val/error, lr, "
        "weight_decay, intrinsic_lr, effective_lr/median, rotation/median, rotation_ratio/median",
    ),
    (
        tree(trial={"data": {"validation": 0}}),
        "objective.metric: a validation metric needs validation images (got data.validation 0); set trial.data.validation above 0",
    ),
    (
        tree(stopping={"scheduler": "asha", "grace": 21}),
        "stopping.grace: grace is longer than a trial (got 21 of 20 epochs); lower it, or use scheduler: none",
    ),
    (
        tree(search={"trials": 6, "sampler": "grid"}),
        "space.optimizer.lr: a grid needs choices or a step on every axis; list choices, or use another sampler",
    ),
    (tree(search={}), "search.trials: is required; add it"),
    (tree(search={"trials": 0}), "search.trials: input should be greater than 0 (got 0); see `study schema` for what it takes"),
    (tree(search={"trials": True}), "search.trials: must be a number, not a boolean (got true); see `study schema` for what it takes"),
    (tree(space={}), "space: must not be empty; see `study schema` for what it takes"),
    (tree(trial=[1, 2]), "trial: must be a mapping of fields (got a list of 2); see `study schema` for what it takes"),
    (tree(version=2), "version: input should be 1 (got 2); see `study schema` for what it takes"),
    (
        tree(budget={"wall": "3 weeks"}),
        "budget.wall: a duration is a number and a unit, such as 90s, 15m, 4h or 2d (got '3 weeks'); see `study schema` for what it takes",
    ),
    (
        tree(space={"optimizer.momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer.rule": "sgd"}}}),
        "space.optimizer.momentum.when: the condition names no other axis (got 'optimizer.rule'); name a path of `space`",
    ),
    (
        tree(
            space={
                "optimizer.rule": {"choices": ["sgd", "adam"]},
                "optimizer.momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer.rule": "adamw"}},
            }
        ),
        "space.optimizer.momentum.when: optimizer.rule never takes this value (got 'adamw'); use one of 'sgd', 'adam'",
    ),
    (
        tree(
            space={
                "optimizer.rule": {"choices": ["sgd", "adam"]},
                "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific", "when": {"optimizer.rule": "sgd"}},
            }
        ),
        "space.optimizer.gamma.when: a scientific axis cannot be conditional: its values are arms; remove `when`",
    ),
    (
        tree(space={"optimizer.momentum": {"choices": [0.9, 0]}}, trial={"optimizer": {"nesterov": True}}),
        "space.optimizer.momentum: does not make a trial with optimizer.momentum=0.0: nesterov needs rule sgd or muon with momentum above 0; "
        "change the axes, or tie them with `when`",
    ),
]


@pytest.mark.parametrize(("given", "complaint"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_a_wrong_spec_says_where_what_and_what_to_do(given: dict[str, Any], complaint: str) -> None:
    assert complaints(given) == [complaint]


@pytest.mark.parametrize("name", ["Tiny", "a_b", "-a", "a-", "", "a b", "a/b", "..", "ü", "a" * 65, "a\n"])
def test_a_name_is_a_folder_that_every_system_takes(name: str) -> None:
    [complaint] = complaints(tree(name=name))
    assert complaint.startswith("name: ")


@pytest.mark.parametrize(("trials", "near"), [(7, "6 or 9"), (8, "6 or 9"), (2, "3")])
def test_trials_that_do_not_divide_over_the_arms_name_the_nearest_two(trials: int, near: str) -> None:
    space = {"optimizer.gamma": {"choices": ["none", "last", "all"], "role": "scientific"}}
    assert complaints(tree(space=space, search={"trials": trials})) == [
        f"search.trials: trials must divide evenly over 3 arms (got {trials}); use {near}"
    ]


def test_every_problem_is_told_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
    content = """\
name: Tiny
trial:
  optimizer:
    lr: 1
    weight_decay: 0.5
    intrinsic_lr: 3
    gama: none
  model: {norm: bach, blocks: [2, 0]}
space:
  optimizer.lr: {low: 2, high: 1}
  optimizer.gamma: {choices: [none, al, last], role: scientific}
  data.batch: {choices: [16, 32]}
search: {trials: 7, seed: -1}
objective: {metric: val/acc, direction: min}
"""
    assert [complaint.split("; ")[0] for complaint in complaints_about(tmp_path, content)] == [
        "s.yaml:1: name: must be lower-case letters, digits and dashes (got 'Tiny')",
        "s.yaml:6: trial.optimizer.intrinsic_lr: lr x weight_decay = 0.5 contradicts intrinsic_lr (got lr 1, weight_decay 0.5, intrinsic_lr 3)",
        "s.yaml:7: trial.optimizer.gama: unknown key (got 'gama')",
        "s.yaml:8: trial.model.norm: input should be 'batch', 'layer', 'group', 'rms', 'weight' or 'none' (got 'bach')",
        "s.yaml:8: trial.model.blocks.1: input should be greater than 0 (got 0)",
        "s.yaml:10: space.optimizer.lr: `low < high` must hold (got low=2, high=1)",
        "s.yaml:11: space.optimizer.gamma: 'al' is not a place of gains (got 'al')",
        "s.yaml:12: space.data.batch: a trial has no such field (got 'data.batch')",
        "s.yaml:13: search.seed: input should be greater than or equal to 0 (got -1)",
        "s.yaml:14: objective.direction: input should be 'minimize' or 'maximize' (got 'min')",
    ]


def test_problems_between_sections_are_told_beside_those_within_one(tmp_path: Path) -> None:
    content = MINIMAL.replace("lr: {low: 1e-3, high: 1, log: true}", "gamma: {choices: [none, all], role: scientific}").replace("6", "5")
    found = complaints_about(tmp_path, content + "objective: {metric: val/acc}\nbudget: {wall: soon}\n")
    assert [complaint.split(" (got")[0] for complaint in found] == [
        "s.yaml:4: search.trials: trials must divide evenly over 2 arms",
        "s.yaml:5: objective.metric: no trial reports this metric",
        "s.yaml:6: budget.wall: a duration is a number and a unit, such as 90s, 15m, 4h or 2d",
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "s.yaml:1: is empty; start with `name: my-study`"),
        ("# nothing\n", "s.yaml:1: is empty; start with `name: my-study`"),
        ("null", "s.yaml:1: must be a mapping of fields (got null); start with `name: my-study`"),
        ("- name: x\n", "s.yaml:1: must be a mapping of fields (got a list of 1); start with `name: my-study`"),
        ("name: x\nsearch: {trials: 1\n", "s.yaml:3: is not valid YAML: expected ',' or '}', but got '<stream end>'; mend the line"),
        ("name: x\n\tspace: 1\n", "s.yaml:2: is not valid YAML: found character '\\t' that cannot start any token; mend the line"),
        ("name: x\n---\nname: y\n", "s.yaml:2: is not valid YAML: but found another document; mend the line"),
        ("name: x\nname: y\n", "s.yaml:2: the key 'name' stands twice; keep one of them"),
        ("trial:\n  seed: 1\n  'seed': 2\n", "s.yaml:3: the key 'seed' stands twice; keep one of them"),
        (
            "name: x\nspace: !!python/object/apply:os.system [ls]\n",
            "s.yaml:2: tags are not allowed (got '!!python/object/apply:os.system'); write plain values",
        ),
        ("name: !!str 5\n", "s.yaml:1: tags are not allowed (got '!!str'); write plain values"),
        ("name: !mine x\n", "s.yaml:1: tags are not allowed (got '!mine'); write plain values"),
        ("? [a, b]\n: 1\n", "s.yaml:1: a key must be a word, not a list or a mapping; mend the line"),
        ("name: x\0y\n", "s.yaml:1: is not valid YAML: a control character (got '\\x00'); remove it"),
        ("name: *missing\n", "s.yaml:1: is not valid YAML: found undefined alias 'missing'; mend the line"),
        ("[" * 3000, "s.yaml:1: nests too deeply; a spec needs a handful of levels"),
        ("a: &a [*a]\n", "s.yaml:1: nests too deeply; a spec needs a handful of levels"),
        ("seed: 0x_\n", "s.yaml:1: cannot be read as a number (got '0x_'); mend the line"),
        (b"name: \xff\n", "s.yaml: is not UTF-8 (byte 0xff at offset 6); save it as UTF-8 text"),
        ("name: x\n".encode("utf-16"), "s.yaml: is not UTF-8 (byte 0xff at offset 0); save it as UTF-8 text"),
        (b"#" * 10_000_000, "s.yaml: is larger than 1 MB (got 10.0 MB); is this the right file?"),
    ],
)
def test_a_file_that_is_no_spec_says_why(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    assert complaints_about(tmp_path, content) == [complaint]


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    laughs = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert complaints_about(tmp_path, laughs) == ["s.yaml:1: holds more than 20000 values once anchors are expanded; write out what you need"]
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    assert "once anchors are expanded" in complaints_about(tmp_path, merges)[0]


def test_a_number_with_too_many_digits_is_told(tmp_path: Path) -> None:
    [complaint] = complaints_about(tmp_path, f"seed: {'9' * 5000}\n")
    assert complaint.startswith("s.yaml:1: cannot be read as a number (got '9999")
    assert len(complaint) < 200


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no\.yaml: no such file; check the path, or start from one in search_spaces/"):
        load_spec(tmp_path / "no.yaml")
    with pytest.raises(SpecError, match=r"cannot be read .*; check that it is a file that you may read"):
        load_spec(tmp_path)


def test_anchors_and_merges_that_stay_small_are_read(tmp_path: Path) -> None:
    content = """\
name: tiny
trial:
  schedule: &base {epochs: 3}
  optimizer: {clip: &one 1}
space:
  optimizer.lr: &decades {low: 1e-3, high: *one, log: true}
  optimizer.weight_decay: {<<: *decades, low: 1e-5}
search: {trials: 6}
"""
    spec = loaded(tmp_path, content)
    assert spec.space["optimizer.weight_decay"].endpoints() == (1e-5, 1)
    assert spec.space["optimizer.weight_decay"].log


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("+1e3", 1e3),
        ("-2e-1", -0.2),
        ("1.e2", 100.0),
        (".5", 0.5),
        (".5e1", 5.0),
        ("1.0e-3", 1e-3),
        ("10", 10),
        ("1_000", 1000),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("=", "="),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_json_is_read_as_json(tmp_path: Path) -> None:
    given = tree(question="é 😀 \t /", search={"trials": 6, "seed": 3}, trial={"optimizer": {"eps": 1e-7}})
    for text in (json.dumps(given), json.dumps(given, indent="\t"), json.dumps(given, separators=(",", ":")), json.dumps(given, ensure_ascii=False)):
        assert loaded(tmp_path, text, name="s.json") == check(given)


def test_problems_in_json_have_lines(tmp_path: Path) -> None:
    content = json.dumps(tree(search={"trials": 6, "sed": 3}), indent=2)
    line = content.splitlines().index('    "sed": 3') + 1
    assert complaints_about(tmp_path, content, name="s.json") == [f"s.json:{line}: search.sed: unknown key (got 'sed'); did you mean 'seed'?"]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("search.trials=12", "search.trials", 12),
        ("trial.optimizer.lr=1e-2", "trial.optimizer.lr", 0.01),
        ("trial.model={norm: layer, width: 4}", "trial.model.norm", "layer"),
        ("question=why = not", "question", "why = not"),
        ("trial.optimizer.gamma=last+inner", "trial.optimizer.gamma", "inner+last"),
    ],
)
def test_any_field_or_section_can_be_set(tmp_path: Path, override: str, path: str, value: object) -> None:
    found: Any = loaded(tmp_path, MINIMAL, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_axis_can_be_set_whole_or_in_part(tmp_path: Path) -> None:
    spec = loaded(tmp_path, MINIMAL, ["space.optimizer.lr.high=2", "space.model.width={choices: [4, 8]}"])
    assert spec.space["optimizer.lr"].endpoints() == (1e-3, 2)
    assert spec.space["model.width"].choices == (4, 8)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("search.trails=3", "--set search.trails: unknown key (got 'trails'); did you mean 'trials'?"),
        ("serch.trials=3", "--set serch: unknown key (got 'serch'); did you mean 'search'?"),
        (
            "trial.optimizer.rule=sdg",
            "--set trial.optimizer.rule: input should be 'sgd', 'adam', 'adamw', 'lion' or 'muon' (got 'sdg'); see `study schema` for what it takes",
        ),
        ("search.trials", "--set: an override is path=value (got 'search.trials'); for example --set search.trials=10"),
        ("=3", "--set: an override is path=value (got '=3'); for example --set search.trials=10"),
        ("name=[1,", "--set name: the value is not valid YAML: expected the node content, but found '<stream end>' (got '[1,'); quote it"),
        ("name=!!str x", "--set name: the value tags are not allowed (got '!!str') (got '!!str x'); quote it"),
    ],
)
def test_a_wrong_override_is_told_as_one(tmp_path: Path, override: str, complaint: str) -> None:
    assert complaints_about(tmp_path, MINIMAL, [override])[:1] == [complaint]


@pytest.mark.parametrize("content", ["- a\n", "space: 5\nname: x\n", "space: [1]\n"])
def test_an_override_of_a_file_that_is_no_spec_is_told(tmp_path: Path, content: str) -> None:
    assert complaints_about(tmp_path, content, ["space.optimizer.lr.low=1", "trial.seed=1"])


def test_choices_and_conditions_are_written_canonically() -> None:
    space = {
        "optimizer.gamma": {"choices": ["none", "last+inner"]},
        "optimizer.gamma_decay": {"low": 0.1, "high": 1, "when": {"optimizer.gamma": "last+inner"}},
    }
    spec = check(tree(space=space))
    assert spec.space["optimizer.gamma"].choices == ("none", "inner+last")
    assert spec.space["optimizer.gamma_decay"].when == {"optimizer.gamma": "inner+last"}


def test_a_condition_makes_room_for_values_that_only_fit_together() -> None:
    trial = {"optimizer": {"rule": "sgd", "momentum": 0.9}}
    rules = {"choices": ["adamw", "sgd"]}
    nesterov = {"choices": [True, False]}
    assert complaints(tree(trial=trial, space={"optimizer.rule": rules, "optimizer.nesterov": nesterov}))
    check(tree(trial=trial, space={"optimizer.rule": rules, "optimizer.nesterov": {**nesterov, "when": {"optimizer.rule": "sgd"}}}))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ({}, (0.1, 1e-3)),
        ({"optimizer.lr": 0.5}, (0.5, 1e-3)),
        ({"optimizer.weight_decay": 0.5}, (0.1, 0.5)),
        ({"optimizer.intrinsic_lr": 1e-3}, (0.1, 1e-2)),
        ({"optimizer.lr": 0.5, "optimizer.weight_decay": 0.2}, (0.5, 0.2)),
        ({"optimizer.lr": 0.5, "optimizer.intrinsic_lr": 1e-3}, (0.5, 2e-3)),
        ({"optimizer.weight_decay": 0.5, "optimizer.intrinsic_lr": 1e-3}, (2e-3, 0.5)),
    ],
)
def test_axes_take_precedence_and_the_rest_of_the_product_follows(assignment: dict[str, float], expected: tuple[float, float]) -> None:
    base = {"optimizer": {"lr": 0.1, "intrinsic_lr": 1e-4}}
    space = {path: {"low": 1e-4, "high": 1} for path in assignment} or {"seed": {"choices": [0]}}
    optimizer = check(tree(trial=base, space=space)).trial_for(assignment).optimizer
    assert (optimizer.lr, optimizer.weight_decay) == pytest.approx(expected, rel=1e-12)
    assert optimizer.intrinsic_lr == optimizer.lr * optimizer.weight_decay


def test_an_assignment_replaces_its_fields_and_no_others() -> None:
    spec = check(tree(space={"model.width": {"choices": [4, 8]}, "seed": {"choices": [0, 1]}}))
    assert spec.trial_for({"model.width": 8, "seed": 1}) == TrialSpec.model_validate({"model": {"width": 8}, "seed": 1})
    assert spec.trial_for({}) == spec.trial


def test_fields_that_an_axis_names_take_its_value() -> None:
    plain = check(tree(space={"seed": {"choices": [0, 7]}}))
    both = check(tree(space={"seed": {"choices": [0, 7], "also": ["data.seed"]}}))
    trial = both.trial_for({"seed": 7})
    assert (trial.seed, trial.data.seed) == (7, 7) and plain.trial_for({"seed": 7}).data.seed == 0
    assert "also" not in plain.to_yaml() and both.spec_hash() != plain.spec_hash()
    assert check(yaml.safe_load(both.to_yaml())) == both


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"seed": {"choices": [0], "also": ["data.sed"]}}, "space.seed.also: a trial has no such field (got 'data.sed'); did you mean 'data.seed'?"),
        (
            {"optimizer.lr": {"choices": [0.1], "also": ["data.batch_size"]}},
            "space.optimizer.lr.also: input should be a valid integer, got a number with a fractional part (got 0.1); use values that data.batch_size takes",
        ),
        (
            {"seed": {"choices": [0], "also": ["data.seed"]}, "data.seed": {"choices": [0]}},
            "space.seed.also: data.seed takes the values of two axes; leave it to one of them",
        ),
    ],
)
def test_fields_that_an_axis_names_must_take_its_value(space: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        check(tree(space=space))
    assert str(caught.value) == complaint


@pytest.mark.parametrize("share", [2, 0, -1, 0.001, True, "half", None, float("nan")])
def test_an_engine_takes_one_gpu_or_a_share_of_one(share: object) -> None:
    [complaint] = complaints(tree(resources={"gpus_per_engine": share}))
    assert complaint.startswith("resources.gpus_per_engine: must be auto or a number from 0.01 to 1, as an engine trains on one GPU (got ")
    assert complaint.endswith("; use 1, or 0.5 for two engines on each GPU")


@pytest.mark.parametrize(("share", "engines"), [("auto", 1), (1, 1), (0.6, 1), (0.5, 2), (1 / 3, 3), (0.33, 3), (0.2, 5), (0.1, 10), (0.01, 100)])
def test_as_many_engines_as_fit_share_a_gpu(share: float | str, engines: int) -> None:
    spec = check(tree(resources={"gpus_per_trial": 1, "gpus_per_engine": share}))
    assert spec.resources.engines_per_gpu == engines
    assert check(yaml.safe_load(spec.to_yaml())) == spec
    assert check(tree(resources={"gpus_per_engine": share})).resources.engines_per_gpu == 1  # on the CPU


def test_an_assignment_reaches_into_the_arguments_of_the_users_own_code() -> None:
    trial = {"model": {"name": "import:own.nets:build", "args": {"depth": 2, "width": 8}}}
    spec = check(tree(trial=trial, space={"model.args.depth": {"low": 1, "high": 4}}))
    assert spec.trial_for({"model.args.depth": 3}).model.args == {"depth": 3, "width": 8}
    assert spec.integer("model.args.depth")


def test_an_assignment_that_is_no_trial_says_why() -> None:
    spec = check(tree())
    with pytest.raises(SpecError, match=r"^model\.width: input should be greater than 0 \(got 0\)"):
        spec.trial_for({"model.width": 0})


def test_whole_numbers_are_known_from_the_field() -> None:
    space = {"model.width": {"low": 4, "high": 8}, "optimizer.lr": {"low": 1, "high": 2}, "data.train_size": {"low": 100, "high": 200}}
    spec = check(tree(space=space))
    assert {path: spec.integer(path) for path in space} == {"model.width": True, "optimizer.lr": False, "data.train_size": True}


def test_the_hash_does_not_see_defaults_that_are_written_out() -> None:
    plain = check(tree())
    assert check(yaml.safe_load(plain.to_yaml())).spec_hash() == plain.spec_hash()
    assert check(tree(trial=plain.trial.model_dump(mode="json"))).spec_hash() == plain.spec_hash()
    assert check(tree(trial={"optimizer": {"intrinsic_lr": 5e-5}})).spec_hash() == plain.spec_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"question": "why?"},
        {"budget": {"wall": "2h"}},
        {"resources": {"cpus_per_trial": 2}},
        {"keep": {"weights": "none"}},
        {"claims": [{"id": "x", "says": "x", "slope": {"y": "val/error", "x": "optimizer.lr"}, "expect": {"below": 0}}]},
        {"search": {"trials": 60}},
        {"name": "other"},
    ],
)
def test_the_hash_does_not_see_what_leaves_every_trial_as_it_was(change: dict[str, Any]) -> None:
    assert check(tree(**change)).spec_hash() == check(tree()).spec_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"trial": {"seed": 1}},
        {"space": {"optimizer.lr": {"low": 0.002, "high": 1, "log": True}}},
        {"search": {"trials": 6, "sampler": "random"}},
        {"search": {"trials": 6, "seed": 1}},
        {"objective": {"metric": "val/loss"}},
        {"stopping": {"scheduler": "median"}},
    ],
)
def test_the_hash_sees_what_decides_the_trials(change: dict[str, Any]) -> None:
    assert check(tree(**change)).spec_hash() != check(tree()).spec_hash()


def test_a_spec_written_as_yaml_reads_back_equal(tmp_path: Path) -> None:
    spec = check(
        tree(
            question="no: why? 1e-3 # ü 😀",
            trial={
                "optimizer": {"lr": 0.3, "intrinsic_lr": 1e-5},
                "data": {"name": "import:a.b:c", "args": {"x": "1e-3", "y": None, "z": ["no", "on"]}},
            },
            space={
                "optimizer.decay": {"choices": [None, "coupled"]},
                "optimizer.lr": {"low": 1e-7, "high": 1, "when": {"optimizer.decay": None}},
                "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"},
            },
            budget={"wall": "90s"},
        )
    )
    assert loaded(tmp_path, spec.to_yaml()) == spec
    assert check(yaml.safe_load(spec.to_yaml())) == spec


def test_durations_have_units() -> None:
    walls = [check(tree(budget={"wall": wall})).budget.wall for wall in ("90s", "15m", "4h", "2d", "1.5 h", 60)]
    assert walls == [90, 900, 14_400, 172_800, 5_400, 60]


@pytest.mark.parametrize(
    ("wall", "fits"),
    [("90s", True), ("15m", True), (" 4h ", True), ("2d", True), ("1.5 h", True), ("3 weeks", False), ("90", False), ("-1h", False), ("", False)],
)
def test_an_editor_takes_the_durations_that_a_spec_takes(wall: str, fits: bool) -> None:
    number, text, _ = StudySpec.model_json_schema()["$defs"]["BudgetSpec"]["properties"]["wall"]["anyOf"]
    assert number == {"type": "number", "exclusiveMinimum": 0}
    assert text["type"] == "string"
    assert bool(re.search(text["pattern"], wall)) is fits
    if fits:
        check(tree(budget={"wall": wall}))
    else:
        assert complaints(tree(budget={"wall": wall}))


def test_the_schema_documents_every_field() -> None:
    definitions = StudySpec.model_json_schema()
    sections = {"trial", "data", "model", "optimizer", "schedule", "trace", "objective", "search", "stopping", "budget", "resources", "keep"}
    fields = {
        f"{title}.{name}": field
        for title, definition in [("StudySpec", definitions), *definitions["$defs"].items()]
        for name, field in definition.get("properties", {}).items()
        if name not in sections
    }
    assert [name for name, field in fields.items() if not field.get("description")] == []


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["none", "last", "sgd", "import:a:b", "1e-3", "2h"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def described(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mappings that use a model's own keys, with values that may or may not fit."""
    fields = {}
    for name, field in schema["properties"].items():
        reference = field.get("$ref", "").rpartition("/")[2]
        fields[name] = PLAIN | described(definitions[reference], definitions) if reference else PLAIN
    return st.fixed_dictionaries({}, optional=fields)


SCHEMA = StudySpec.model_json_schema()


@pytest.mark.parametrize(
    "wrong",
    [
        {"search": {"trials": 0}},
        {"trial": {"seed": -1}},
        {"trial": {"optimizer": {"momentum": 1}}},
        {"trial": {"data": {"label_noise": -0.1}}},
        {"stopping": {"reduction": 1}},
        {"resources": {"slots": 0}},
    ],
)
def test_an_editor_sees_what_is_out_of_range(wrong: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(tree())
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(tree(**wrong))
    assert complaints(tree(**wrong))


AXES = st.dictionaries(
    st.sampled_from(["optimizer.lr", "optimizer.gamma", "model.width", "optimizer.intrinsic_lr", "model", "data.args.x", "seed.x", ""])
    | st.text(max_size=8),
    described(SCHEMA["$defs"]["Axis"], SCHEMA["$defs"]) | PLAIN,
    max_size=3,
)
STUDIES = st.builds(lambda study, space: {"name": "tiny", "space": space, "search": {"trials": 4}, **study}, described(SCHEMA, SCHEMA["$defs"]), AXES)


@settings(max_examples=300, deadline=None)
@given(PLAIN | STUDIES)
def test_whatever_is_given_becomes_a_study_or_a_list_of_problems(given: object) -> None:
    try:
        spec = check(given)
    except SpecError:
        return
    assert check(yaml.safe_load(spec.to_yaml())).spec_hash() == spec.spec_hash()


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_plain_values_survive_being_written_as_yaml(value: object) -> None:
    def same(a: object, b: object) -> bool:
        return repr(a) == repr(b)

    text = to_yaml({"value": value})
    assert same(parse_value(text), {"value": value})


CONTRACT = """
version: 1
name: gamma-roles
question: Which norm gains should weight decay touch?
trial:
  seed: 0
  data: {name: digits, batch_size: 64, label_noise: 0.1, validation: 0.2}
  model: {name: resnet, norm: batch, width: 16, blocks: [2, 2]}
  optimizer: {rule: sgd, momentum: 0.9, lr: 0.1, weight_decay: 5.0e-4, gamma: none, shift: exempt}
  schedule: {epochs: 20, warmup: 0.05, shape: cosine}
  trace: {every: 20}
space:
  optimizer.lr:           {low: 1.0e-3, high: 1.0, log: true}
  optimizer.weight_decay: {low: 1.0e-5, high: 1.0e-1, log: true}
  optimizer.gamma:        {choices: [none, all, last, inner, inner+last], role: scientific}
search: {sampler: tpe, trials: 60, seed: 0}
objective: {metric: val/error, direction: minimize}
stopping:  {scheduler: asha, grace: 4, reduction: 3}
replicate: {top: 3, seeds: 5}
budget:    {wall: 2h, gpu_hours: 1.5}
resources: {engine: auto, slots: auto, gpus_per_engine: auto}
claims:    []
"""


def test_the_published_example_is_a_valid_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(CONTRACT)
    spec = load_spec(tmp_path / "spec.yaml")
    assert (len(spec.arms), spec.budget.wall, spec.replicate.top) == (5, 7200, 3)
