"""Secrets in specs: refused wherever they stand, never repeated, and words that only sound like one are not."""

from pathlib import Path
from typing import Any

import pytest

from study.cli import main
from study.credentials import credential_problems
from study.errors import SpecError
from study.spec import check, load_spec

ROOT = Path(__file__).parents[1]

SECRETS: list[dict[str, Any]] = [
    {"password": "hunter2"},
    {"db_password": "hunter2"},
    {"nested": {"list": [{"api_key": "hunter2"}]}},
    {"hf_token": "hunter2"},
    {"aws_secret": "hunter2"},
    {"aws-access-key": "hunter2"},
    {"token": "a9f3c1d2e4b5a697hunter2"},
    {"url": "https://me:hunter2@host/data.npz"},
    {"url": "postgresql://me:hunter2@host/db"},
    {"url": "https://host/data?sig=hunter2"},
    {"anything": "AKIA" + "HUNTER2HUNTER2XX"},
    {"anything": "ghp_" + "hunter2" * 6},
    {"anything": ["hf_" + "hunter2" * 6]},
    {"anything": "-----BEGIN RSA PRIVATE KEY-----\nhunter2"},
]


@pytest.mark.parametrize("args", SECRETS, ids=str)
def test_a_secret_is_refused_and_not_shown(args: dict[str, Any]) -> None:
    model = {"name": "import:nets:wide", "args": args}
    with pytest.raises(SpecError) as caught:
        check({"name": "tiny", "trial": {"model": model}, "space": {"optimizer.lr": {"low": 0.1, "high": 1}}, "search": {"trials": 2}})
    [problem] = caught.value.problems
    assert problem.kind == "credential"
    assert problem.where.startswith("trial.model.args.")
    assert "os.environ" in problem.remedy
    assert "hunter2" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "args",
    [
        {"num_tokens": "16", "tokenizer": "bpe", "pad_token": "<pad>", "cls_token": True, "token": "cls", "mask_token": "[MASK]"},
        {"key": "images", "secrets": 3, "password_length": 8, "passwords": 5, "author": "me", "monkey": "see", "use_auth": "no"},
        {"url": "https://host:8080/data.npz", "mail": "me@host", "sha": "9f86d081884c7d659a2feaa0c55ad015", "password": ""},
    ],
    ids=str,
)
def test_what_only_sounds_like_a_secret_is_fine(args: dict[str, Any]) -> None:
    assert [*credential_problems({"trial": {"model": {"args": args}}})] == []


def test_secrets_are_found_beside_other_mistakes_in_axes_and_in_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(
        "name: Tiny\ntrial:\n  data: {name: npz, path: 'http://me:hunter2@host/x.npz'}\n"
        "space:\n  model.args.password: {choices: [hunter2]}\n  optimizer.lr: {low: 0.1, high: 1}\nsearch: {trials: 2}\n"
    )
    assert main(["validate", str(tmp_path / "spec.yaml"), "--set", "trial.model.args.token=hunter2hunter2hunter2"]) == 2
    printed = capsys.readouterr().err
    assert "spec.yaml:1: name: must be lower-case" in printed
    assert "spec.yaml:3: trial.data.path: holds what looks like a credential" in printed
    assert "spec.yaml:5: space.model.args.password: looks like a credential" in printed
    assert "--set trial.model.args.token: looks like a credential" in printed
    assert "hunter2" not in printed


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("**/*.yaml")), ids=lambda path: path.name)
def test_our_own_specs_hold_none(path: Path) -> None:
    load_spec(path)
