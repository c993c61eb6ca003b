"""`study init` writes specs that are valid and leaves files alone that are there."""

from pathlib import Path
from typing import Any, get_args

import pytest

from study.cli import main
from study.errors import HomeError, SpecError
from study.fields import field_type
from study.spec import load_spec
from study.starter import RANGES, Start, checked, spec_text, write_spec
from study.tuning.preflight import audit


def start(**changes: Any) -> Start:
    return Start("mine", "Which gains should decay?", **changes)


@pytest.mark.parametrize("rule", get_args(field_type("optimizer.rule")))
@pytest.mark.parametrize("model", ["mlp", "resnet", "transformer", "import:my.package:make_model"])
def test_every_rule_and_model_makes_a_valid_spec(rule: str, model: str) -> None:
    spec = checked(spec_text(start(rule=rule, model=model)))
    assert (spec.trial.optimizer.rule, spec.trial.model.name) == (rule, model)
    assert (spec.space["optimizer.lr"].low, spec.space["optimizer.lr"].high) == RANGES[rule][0]
    assert spec.search.trials == 12 * len(spec.arms) == (24 if model.startswith("import:") else 48)


@pytest.mark.parametrize("model", ["mlp", "resnet", "transformer"])
def test_every_arm_fits_its_model(model: str) -> None:
    audit(checked(spec_text(start(model=model))))


@pytest.mark.parametrize("data", ["digits", "mnist5k", "npz", "import:my.package:make_data"])
def test_every_kind_of_data_makes_a_valid_spec(data: str) -> None:
    assert checked(spec_text(start(data=data))).trial.data.name == data


@pytest.mark.parametrize(
    ("scientific", "arms"),
    [
        ((), 1),
        (("optimizer.gamma",), 4),
        (("optimizer.nesterov",), 2),
        (("schedule.shape", "optimizer.gamma=[none, last@1]"), 8),
        (("optimizer.weight_decay=[0, 1e-4, 1e-3]",), 3),
    ],
)
def test_what_is_compared_becomes_arms(scientific: tuple[str, ...], arms: int) -> None:
    spec = checked(spec_text(start(scientific=scientific)))
    assert len(spec.arms) == arms
    assert {"optimizer.lr", "optimizer.weight_decay", *(path.partition("=")[0] for path in scientific)} == set(spec.space)


def test_values_that_nobody_knows_must_be_given() -> None:
    with pytest.raises(SpecError) as refused:
        spec_text(start(scientific=("optimizer.momentum", "model.width=]", "optimizer.gamma")))
    assert [problem.where for problem in refused.value.problems] == ["--scientific"] * 2
    assert refused.value.problems[0].remedy == "give them: --scientific 'optimizer.momentum=[VALUE, VALUE]'"


def test_a_question_is_kept_whatever_it_holds() -> None:
    question = "Is it: \"yes\" # or 'no'?\nReally: {a, b}"
    assert checked(spec_text(Start("mine", question))).question == question


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("mine")
    with pytest.raises(HomeError, match="left as it is"):
        write_spec("other", path)
    assert path.read_text() == "mine"
    with pytest.raises(HomeError, match="cannot be written"):
        write_spec("other", tmp_path / "none" / "study.yaml")


def test_the_command_writes_a_spec_named_like_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "My_Study.yaml"
    assert main(["init", str(path), "--rule", "adamw", "--scientific", "optimizer.gamma=[none, all]"]) == 0
    assert load_spec(path).name == "my-study"
    assert path.read_text().startswith("# A study of your own. Edit it, then:\n")
    assert main(["init", str(path)]) == 2
    assert "left as it is" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "b.yaml"), "--model", "vgg", "--rule", "sga"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["trial.model.name", "trial.optimizer.rule"]
    assert not (tmp_path / "b.yaml").exists()
