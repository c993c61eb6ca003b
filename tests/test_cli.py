"""The command line: what it prints where, and the exit code that it ends with."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from study import display, doctor, errors, views
from study.cli import _report, main
from study.home import StudyFolder
from study.measurement import Ending, LayerSample, Measurement, Outcome
from study.results.best import BestConfig, ObjectiveResult, choose_best, read_best
from study.space import arm_label
from study.spec import StudySpec, load_spec
from study.traces import UNFINISHED, TraceFile, write_trace
from study.tracking.outbox import Outbox
from study.tracking.store import connect
from study.tuning.status import status

ROOT = Path(__file__).parents[1]
COMMANDS = {
    *("init", "schema", "validate", "plan", "run", "resume", "extend", "submit", "list", "status", "logs", "stop", "delete"),
    *("best", "verify", "report", "export", "trace", "ui", "doctor"),
}

SPEC = """\
name: gains
question: Which gains should decay?
trial:
  model: {name: mlp, width: 8}
  schedule: {epochs: 2}
  trace: {every: 2}
space:
  optimizer.lr: {low: 1e-3, high: 1.0, log: true}
  optimizer.gamma: {choices: [none, all], role: scientific}
search: {trials: 6, sampler: random}
"""

WRONG = """\
name: Gains
trial:
  model: {name: mlp, widht: 8}
space:
  optimizer.lr: {low: 1.0, high: 1e-3, log: true}
  optimizer.gama: {choices: [none, all]}
search: {trials: 6}
"""

ENDINGS = [
    (Ending(Outcome.COMPLETED), 0.25),
    (Ending(Outcome.COMPLETED), 0.125),
    (Ending(Outcome.STOPPED, "scheduler"), 0.01),
    (Ending(Outcome.DIVERGED, "nan"), None),
    (Ending(Outcome.FAILED, error="boom"), None),
]
"""How the trials of the study `gains` ended; a sixth waits."""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STUDY_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "gains.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def home(tmp_path: Path, spec_file: Path) -> Path:
    """A study home with one study, written as a run writes it."""
    spec = load_spec(spec_file)
    folder = StudyFolder.prepare(tmp_path / "studies", spec)
    outbox = Outbox(folder.path)
    for number, (ending, value) in enumerate(ENDINGS):
        arm = spec.arms[number % 2]
        trial = f"gains-{number:04}"
        outbox.start(trial, arm=arm_label(arm), trial=spec.trial_for({**arm, "optimizer.lr": 0.1 * (number + 1)}).canonical())
        outbox.measure(trial, Measurement(22, 1, {"val/error": value or 1.0}, seconds=30.0))
        outbox.end(trial, ending, value)
    best_of(spec, folder, outbox).save(folder.best)
    folder.update(state="finished")
    outbox.close()
    return tmp_path / "studies"


def best_of(spec: StudySpec, folder: StudyFolder, outbox: Outbox) -> BestConfig:
    record = choose_best(outbox.records(), spec.objective)
    assert record is not None
    assert record.value is not None
    return BestConfig(
        study_id=folder.card().study_id,
        name=spec.name,
        trial_id=record.trial_id,
        run_id="0" * 32,
        arm=record.arm,
        objective=ObjectiveResult(metric="val/error", direction="minimize", at="final", value=record.value),
        spec_hash=spec.spec_hash(),
        git_commit="",
        versions={},
        date="2026-01-01T00:00:00+00:00",
        trial=record.trial,  # type: ignore[arg-type]
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that succeeds prints on stdout."""
    code = main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return re.sub(r"\x1b\[[0-9;]*m", "", out)


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(said(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """What a command that fails prints on stderr; nothing may be on stdout."""
    assert main([str(word) for word in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def python(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(re.findall(r"^│ (\w+) ", said(capsys, "--help"), re.MULTILINE)) == COMMANDS
    assert said(capsys) == said(capsys, "--help")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"study {command}" in said(capsys, command, "--help")


def test_the_schema_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(said(capsys, "schema"))
    optimizer = schema["$defs"]["OptimizerSpec"]["properties"]
    assert "Gamma-decay policy" in optimizer["gamma"]["description"]
    undocumented = {name for name, field in optimizer.items() if "description" not in field}
    assert not undocumented
    assert {"name", "space", "search"} <= set(schema["required"])


def test_a_valid_spec_is_ok_in_one_line(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok, summary = said(capsys, "validate", spec_file).splitlines()
    assert ok == "ok"
    assert summary == "gains: 6 trials over 2 arms, sampler random, 2 epochs, 2 axes: optimizer.lr, optimizer.gamma"
    assert document(capsys, "validate", spec_file)["arms"] == ["optimizer.gamma=none", "optimizer.gamma=all"]


def test_every_error_is_told_at_once_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    lines = refused(capsys, "validate", path).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{path}:1", "name"],
        [f"{path}:3", "trial.model.widht"],
        [f"{path}:5", "space.optimizer.lr"],
        [f"{path}:6", "space.optimizer.gama"],
    ]
    assert "did you mean 'width'?" in lines[1]


def test_errors_are_a_document_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    assert main(["validate", str(path), "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)["errors"]
    assert [set(error) for error in found] == [{"kind", "message", "where", "remedy"}] * 4
    assert found[1]["kind"] == "unknown-key"
    assert err == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["validate"], ["validate", "x.yaml", "--nonsense"], ["export", "x", "--to", "xml"]])
def test_a_command_line_that_cannot_be_read_is_wrong_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in refused(capsys, *arguments)
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["kind"] == "usage"


def test_an_option_that_takes_certain_words_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "export", "x", "--to", "xml").startswith("study: Invalid value for '--to': 'xml' is not one of 'yaml', 'json', ")


def test_a_missing_spec_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "validate", "none.yaml").startswith("none.yaml: no such file")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [("search.trials=10", "trials", 10), ("search={trials: 8, sampler: sobol}", "sampler", "sobol"), ("trial.schedule.epochs=7", "epochs", 7)],
)
def test_set_replaces_fields_and_sections(override: str, field: str, value: object, spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "validate", spec_file, "--set", override)[field] == value


def test_set_is_repeatable_and_its_errors_name_it(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "validate", spec_file, "--set", "name=other", "--set", "space.optimizer.gamma.choices=[none, all, last]")
    assert (found["name"], len(found["arms"])) == ("other", 3)
    assert "--set search.trials: " in refused(capsys, "validate", spec_file, "--set", "search.trials=-1")
    assert "path=value" in refused(capsys, "validate", spec_file, "--set", "search.trials")


def test_a_plan_names_the_decay_of_every_parameter(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = document(capsys, "plan", spec_file, "--set", "trial.optimizer.gamma=all")
    assert set(plan) == {"trials", "arms", "forecast", "parameters", "plan_hash", "compare", "warnings", "engine"}
    assert {frozenset(row) for row in plan["parameters"]} == {frozenset({"name", "role", "place", "rate", "anchor", "constrained", "group"})}
    assert plan["compare"] == {}
    shown = said(capsys, "plan", spec_file)
    assert all(row["name"] in shown for row in plan["parameters"])
    assert "6 trials over 2 arms, 3 each" in shown


def test_a_plan_names_the_engine_and_its_measured_gain(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from study.engines import admission

    monkeypatch.setattr(admission, "MEASURED_STEPS", 2)
    why = "there are too few trials to fill the rows of fused engines"
    told = {"name": "solo", "slots": 1, "engines_per_gpu": 1, "arithmetic": "", "gain": 0.0, "why": why}
    wide = (spec_file, "--set", "resources.slots=99")
    assert document(capsys, "plan", *wide)["engine"] == told
    assert f"engine: solo, as {why}" in said(capsys, "plan", *wide)
    forced = (spec_file, "--set", "resources.engine=fused", "--set", "resources.slots=2", "--home", tmp_path / "kept")
    engine = document(capsys, "plan", *forced)["engine"]
    assert (engine["name"], engine["slots"], engine["arithmetic"]) == ("fused", 2, "converted")
    assert engine["gain"] > 0
    assert f"engine: fused, as 2 trials in one step train {engine['gain']:.1f} times as fast per core" in said(capsys, "plan", *forced)
    widths = "space.model.width={choices: [8, 16]}"
    assert "trials that differ in model.width cannot share a step; use auto or solo" in refused(capsys, "plan", *forced, "--set", widths)


def test_a_plan_sets_the_defaults_of_libraries_beside_the_policy(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = document(capsys, "plan", spec_file, "--compare", "torch, timm")["compare"]
    gains, shifts = ["layer1.norm.weight", "layer2.norm.weight"], ["layer1.norm.bias", "layer2.norm.bias", "head.bias"]
    assert list(compared) == ["torch", "timm"]
    assert {name: compared["torch"][name] for name in ("exempt", "gains_decayed", "differs", "differs_on_gains")} == {
        "exempt": [],
        "gains_decayed": 2,
        "differs": 5,
        "differs_on_gains": 2,
    }
    assert sorted(compared["torch"]["differences"]) == sorted(gains + shifts) == sorted(compared["timm"]["exempt"])
    assert compared["timm"]["differences"] == []
    shown = said(capsys, "plan", spec_file, "--compare", "torch,timm")
    assert re.search(r"layer1\.norm\.weight +gain +inner +0 +- +exempt +decay \* +exempt\b", shown)
    assert "torch: decays 2 of 2 gains; differs from this policy on 2 gains, and on 5 of all 8 parameters" in shown
    assert len(document(capsys, "plan", spec_file, "--compare", "all")["compare"]) == 6


def test_a_plan_refuses_a_library_that_it_does_not_know(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--compare: unknown library (got 'keras'); use torch, timm" in refused(capsys, "plan", spec_file, "--compare", "timm,keras")


def test_the_hash_of_a_plan_changes_with_the_policy_alone(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hash_of(*sets: str) -> str:
        return str(document(capsys, "plan", spec_file, *(word for one in sets for word in ("--set", one)))["plan_hash"])

    assert re.fullmatch("[0-9a-f]{64}", hash_of())
    assert hash_of() == hash_of("trial.schedule.epochs=3", "trial.optimizer.momentum=0.5") != hash_of("trial.optimizer.gamma=all")


def test_what_the_users_code_prints_stays_out_of_the_answer(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talkative.py").write_text("from torch.nn.functional import cross_entropy as loss\nprint('hello')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", str(spec_file), "--set", "trial.loss='import:talkative:loss'", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trials"] == 6
    assert "hello" in err


def test_an_empty_home_has_no_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "list", "--home", tmp_path / "none") == []
    assert "no studies in" in said(capsys, "list", "--home", tmp_path / "none")


def test_a_home_lists_its_studies(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (listed,) = document(capsys, "list", "--home", home)
    assert listed == document(capsys, "status", "gains", "--home", home)
    assert re.search(r"gains +finished +5 of 6 +0\.125 +val/error +gains-0001", said(capsys, "list", "--home", home))
    monkeypatch.setenv("STUDY_HOME", str(home))
    assert document(capsys, "list") == [listed]


def test_a_study_that_cannot_be_read_does_not_hide_the_others(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "gains", home / "other")
    (home / "other" / "spec.yaml").write_text("name: [")
    assert main(["list", "--home", str(home)]) == 0
    out, err = capsys.readouterr()
    assert "gains" in out
    assert "other is left out" in err


def test_the_status_counts_outcomes_by_arm(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "status", "gains", "--home", home)
    assert found["state"] == "finished"
    assert found["trials"] == {"completed": 2, "stopped": 1, "diverged": 1, "failed": 1, "interrupted": 0, "running": 0, "waiting": 1}
    assert found["best"]["trial_id"] == "gains-0001"
    assert found["arms"]["optimizer.gamma=none"]["best"]["value"] == 0.25
    shown = said(capsys, "status", "gains", "--home", home)
    assert re.search(r"optimizer\.gamma=all +1 +0 +1 +0 +1 +0\.125 +gains-0001", shown)
    assert "2:30 of training" in shown


@pytest.fixture
def replicated(home: Path) -> Path:
    """The same home, where the completed trial of each arm was trained again."""
    folder = StudyFolder(home / "gains")
    outbox = Outbox(folder.path)
    for number in (1, 2, 3):
        for trial, arm, value in (("gains-0000", "none", 0.2), ("gains-0001", "all", 0.3)):
            again = f"{trial}-r{number}"
            outbox.start(again, arm=f"optimizer.gamma={arm}", trial=outbox.entries(trial)[0].trial, replicate_of=trial)
            outbox.end(again, Ending(Outcome.COMPLETED), value + 0.01 * number**2 * (1 + (arm == "all")))
    outbox.close()
    return home


def test_the_status_shows_the_verdict_on_the_arms(replicated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "status", "gains", "--home", replicated)
    assert (found["trials"]["completed"], found["replicates"]["completed"]) == (2, 6)
    first, second = found["comparison"]["arms"]
    assert (first["arm"], first["seeds"], second["arm"]) == ("optimizer.gamma=none", 3, "optimizer.gamma=all")
    (gap,) = found["comparison"]["differences"]
    assert gap["estimate"] == pytest.approx(first["mean"] - second["mean"])
    assert (found["best"]["trial_id"], found["best"]["seeds"]) == ("gains-0000", 3)
    assert found["arms"]["optimizer.gamma=all"]["best"]["mean"] == pytest.approx(second["mean"])
    shown = said(capsys, "status", "gains", "--home", replicated)
    assert re.search(r"optimizer.gamma=all +gains-0001 +3 +0\.3933 .*0\.1467 .* yes", shown)
    assert f"P(optimizer.gamma=none wins again) {found['comparison']['wins_again']:.2f}" in shown


def test_a_study_is_resumed_and_extended_by_its_name(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is run has the folder's spec, with more trials; the driver's part is tested elsewhere."""
    ran: list[int] = []

    def run(spec: StudySpec, **options: object) -> None:
        ran.append(spec.search.trials)
        raise errors.Interrupted("stop here")

    monkeypatch.setattr("study.tuning.driver.run", run)
    assert main(["resume", "gains", "--home", str(home)]) == main(["extend", "gains", "--trials", "4", "--home", str(home)]) == 130
    assert ran == [6, 10]
    capsys.readouterr()
    assert "use 2 or 4" in refused(capsys, "extend", "gains", "--trials", 3, "--home", home)
    assert "use 2" in refused(capsys, "extend", "gains", "--trials", 1, "--home", home)
    assert "no study of this name" in refused(capsys, "resume", "gain", "--home", home)


def test_only_a_finished_study_is_confirmed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "gains" / "best.yaml").unlink()
    assert "finish it with: study resume gains" in refused(capsys, "best", "gains", "--confirm", 3, "--home", home)


def test_what_is_about_to_be_confirmed_is_said() -> None:
    known = {"trials": ["gains-0000", "gains-0001"], "seeds": 3}
    line = views.confirming_line({**known, "left": 6, "seconds": 75.0})
    assert line == "training 2 trials again (gains-0000, gains-0001), solo, with 3 fresh seeds: 6 trainings are left, 1:15 of training in all"
    assert views.confirming_line({**known, "left": 0, "seconds": 0.0}) == "confirmed with 3 fresh seeds already: gains-0000, gains-0001"


def test_an_unknown_study_is_wrong_input(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "studies here: gains" in refused(capsys, "status", "gain", "--home", home)
    assert "no study of this name" in refused(capsys, "best", "gain", "--home", home)


def test_the_best_shows_what_was_varied_and_how_to_use_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "best", "gains", "--home", home)
    assert re.search(r"optimizer\.lr +0\.2\b", shown)
    assert re.search(r"optimizer\.gamma +all\b", shown)
    assert "momentum" not in shown
    code = shown.split("In Python:")[1]
    assert [line.split(" = ")[0].strip() for line in code.strip().splitlines()] == ["best", "optimizer", "scheduler"]
    names: dict[str, Any] = {}
    exec(f"import study\n{code.strip().splitlines()[0]}", names)
    assert names["best"].trial_id == "gains-0001"


def test_the_best_is_a_document_with_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = document(capsys, "best", "gains", "--home", home)
    assert {"study_id", "trial_id", "run_id", "value", "metric", "direction", "spec", "confirmed"} <= set(best)
    assert (best["value"], best["spec"]["optimizer"]["gamma"]) == (0.125, "all")
    assert document(capsys, "best", home / "gains" / "best.yaml") == best


def test_a_study_without_a_best_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "gains" / "best.yaml").unlink()
    assert "no best config yet" in refused(capsys, "best", "gains", "--home", home)


CLAIMS = """\
claims:
  - id: decay-helps
    source: arXiv:2205.07260
    says: Decaying all gains lowers the error.
    contrast: {metric: final/val/error, arm: optimizer.gamma, a: all, b: none, statistic: ratio, paired_by: seed}
    expect: {below: 0.7}
  - id: it-does-not
    says: It does not.
    rank: {metric: final/val/error, arm: optimizer.gamma, paired_by: seed}
    expect: {first: none}
"""


@pytest.fixture
def claimed(home: Path) -> Path:
    """The home, whose study claims two things, with five seeds in either arm."""
    import pandas as pd

    folder = home / "gains"
    (folder / "spec.yaml").write_text((folder / "spec.yaml").read_text().replace("claims: []\n", CLAIMS))
    own = {"outcome": "completed", "replicate_of": "", "equilibrated": False}
    rows = [
        {
            "trial_id": f"gains-0000-r{seed}",
            **own,
            "seed": seed,
            "data.seed": seed,
            "optimizer.gamma": gamma,
            "final/val/error": error * (9 + seed) / 10,
        }
        for seed in range(5)
        for gamma, error in (("none", 0.2), ("all", 0.1))
    ]
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    return home


def test_claims_are_tested_on_the_table_of_trials(claimed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "verify", "gains", "--home", claimed)
    assert found["tested"] == 2
    helps, does_not = found["claims"]
    assert {"id", "says", "source", "expected", "estimate", "interval", "n", "verdict"} <= set(helps)
    assert (helps["verdict"], helps["expected"], helps["n"]) == ("confirmed", {"below": 0.7}, 5)
    assert (helps["estimate"], does_not["verdict"]) == (pytest.approx(0.5), "refuted")
    shown = said(capsys, "verify", "gains", "--home", claimed)
    assert re.search(r"decay-helps +below 0\.7 +0\.5 +0\.5 to 0\.5 +5 +confirmed", shown)
    assert re.search(r"it-does-not +first none +-0\.11 +.* +5 +refuted", shown)
    assert "decay-helps: Decaying all gains lowers the error. (arXiv:2205.07260)" in shown
    assert "2 claims were tested" in shown


def test_a_refuted_claim_fails_where_it_must_not(claimed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "gains", "--home", str(claimed), "--strict", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["tested"] == 2
    spec = claimed / "gains" / "spec.yaml"
    spec.write_text(spec.read_text().partition("  - id: it-does-not")[0])
    assert "1 claim was tested" in said(capsys, "verify", "gains", "--home", claimed, "--strict")


def test_a_study_without_claims_or_trials_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "makes no claims" in said(capsys, "verify", "gains", "--home", home, "--strict")
    assert document(capsys, "verify", "gains", "--home", home) == {"claims": [], "tested": 0}
    assert "studies here: gains" in refused(capsys, "verify", "gain", "--home", home)


def test_a_claim_that_cannot_be_tested_is_wrong_input(claimed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd

    table = claimed / "gains" / "trials.parquet"
    rows = pd.read_parquet(table)
    pd.concat([rows, rows.tail(1)]).to_parquet(table)
    assert "claims.decay-helps: pairing is not one-to-one (seed 4 stands more than once in optimizer.gamma=all" in refused(
        capsys, "verify", "gains", "--home", claimed
    )
    table.unlink()
    assert "no table of trials yet; finish it with `study run`" in refused(capsys, "verify", "gains", "--home", claimed)


def test_a_damaged_table_of_trials_is_told_and_can_be_written_again(claimed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from study.tuning.driver import read

    folder = StudyFolder(claimed / "gains")
    folder.table.write_text("PAR1")
    told = refused(capsys, "verify", "gains", "--home", claimed)
    assert f"{folder.table}: cannot be read as the study's table of trials (" in told
    assert "); remove it: `study run` writes it again from the study's ledger" in told
    with pytest.raises(errors.HomeError, match="cannot be read as the study's table"):
        read(folder, folder.load_spec(), "")
    folder.table.unlink()
    unclaimed = folder.load_spec().model_copy(update={"claims": ()})
    assert list(read(folder, unclaimed, "").trials["trial_id"]) == [f"gains-{number:04d}" for number in range(5)]
    assert folder.table.exists()


@pytest.mark.parametrize("to", ["yaml", "json"])
def test_an_export_reads_back_as_the_best(to: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / f"exported.{to}"
    exported.write_text(said(capsys, "export", "gains", "--to", to, "--home", home))
    assert read_best(exported) == read_best(home / "gains" / "best.yaml")
    assert said(capsys, "export", "gains", "--to", to, "--home", home, "-o", tmp_path / "again") == ""
    assert (tmp_path / "again").read_text() == exported.read_text()


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("torch", "def build_optimizer(model):"),
        ("hf", "def training_arguments("),
        ("timm", "opt: momentum"),
        ("torchvision", "torchrun train.py"),
    ],
)
def test_an_export_speaks_of_the_models_parameters_and_warns_on_stderr(
    to: str, line: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "gains", "--to", to, "--home", str(home)]) == 0
    out, err = capsys.readouterr()
    assert any(found.startswith(line) for found in out.splitlines())
    assert out.startswith("# The best trial of the study gains")
    assert ("warning: timm would decay 2 parameters wrongly, 2 of them gains: layer1.norm.weight, layer2.norm.weight" in err) == (to == "timm")
    assert said(capsys, "export", "gains", "--to", to, "--home", home, "-o", tmp_path / "again") == ""
    assert (tmp_path / "again").read_text() == out


def test_an_export_that_cannot_be_written_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written" in refused(capsys, "export", "gains", "--home", home, "-o", home / "none" / "best.yaml")


def samples() -> list[LayerSample]:
    """A layer in equilibrium, with a peak at its fourth sample, and a head of which theory expects nothing."""
    return [
        LayerSample(
            step=step,
            layer=layer,
            role="weight",
            place="inner" if layer == "conv" else "",
            scale_invariant=layer == "conv",
            equilibrated=True,
            lr=0.1,
            weight_decay=5e-3,
            weight_norm=2 + step / 100,
            grad_norm=0.1,
            effective_lr=10.0 if step == 4 else 0.025,
            rotation=0.0202,
            rotation_expected=0.02 if layer == "conv" else None,
            relaxation_time=10.0,
        )
        for step in range(1, 101)
        for layer in ("conv", "head")
    ]


@pytest.fixture
def traced(home: Path) -> Path:
    """The trace of the trial gains-0001."""
    path = home / "gains" / "trials" / "gains-0001" / "trace.parquet"
    path.parent.mkdir()
    write_trace(path, samples())
    return path


def test_a_trace_is_summarized_layer_by_layer(home: Path, traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "trace", "gains-0001", "--home", home)
    first, second = shown.splitlines()[:2]
    assert first == "gains-0001: 100 steps"
    assert second == "1 of 1 scale-invariant layers in equilibrium; median rotation 1.01 of expected"
    spark = "▇" + 23 * "▁"
    assert re.search(rf"conv +inner +✓ +{spark} +0\.025 +3 +0\.0202 +0\.02 +1\.01 +10\.0x +equilibrium", shown)
    assert re.search(rf"head +- +- +{spark} +0\.025 +3 +0\.0202 +- +- +- +free ↗", shown)


def test_a_narrow_terminal_shows_the_states_whole(traced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = said(capsys, "trace", traced)
    assert re.search(r"conv +✓ +▇▁{23} +0\.025 +3 +1\.01 +equilibrium", shown)


def test_a_trace_is_a_document_with_json(home: Path, traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "trace", "gains-0001", "--home", home)
    assert {"trial_id", "steps", "layers", "states"} <= set(found)
    assert (found["trial_id"], found["steps"], found["states"]["equilibrium"], found["states"]["free"]) == ("gains-0001", 100, 1, 1)
    conv, head = found["layers"]
    assert (conv["layer"], conv["role"], conv["place"], conv["scale_invariant"]) == ("conv", "weight", "inner", True)
    assert (conv["weight_norm"], conv["effective_lr"], conv["relaxation_times"]) == pytest.approx((3, 0.025, 10))
    assert (conv["rotation"], conv["rotation_expected"], conv["rotation_ratio"]) == pytest.approx((0.0202, 0.02, 1.01))
    assert head["rotation_ratio"] is None
    assert document(capsys, "trace", traced) == found


def test_a_trace_that_is_being_written_is_read_by_either_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = TraceFile(tmp_path / "mine.parquet")
    for sample in samples():
        trace.append({sample.layer: sample})
    trace.flush()
    for name in ("mine.parquet", f"mine.parquet{UNFINISHED}"):
        assert document(capsys, "trace", tmp_path / name)["steps"] == 100
    trace.close()


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_trace_is_drawn_on_request(suffix: str, traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(traced), "--plot", str(tmp_path / f"drawn{suffix}"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trial_id"] == "gains-0001"
    assert err == f"written to {tmp_path}/drawn{suffix}\n"
    assert (tmp_path / f"drawn{suffix}").stat().st_size > 1000


def test_a_trace_that_the_home_lacks_is_read_from_mlflow(home: Path, traced: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = document(capsys, "trace", "gains-0001", "--home", home)
    store, outbox = connect(tracking_uri), Outbox(home / "gains")
    run = store.create(store.experiment("gains"), "gains-0001", 0, {})
    store.upload(run, traced)
    outbox.remember_run("gains-0001", run)
    outbox.close()
    traced.unlink()
    assert document(capsys, "trace", "gains-0001", "--home", home, "--tracking-uri", tracking_uri) == expected


def test_what_is_no_trace_is_wrong_input(home: Path, spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(source: object, *options: object) -> str:
        return refused(capsys, "trace", source, "--home", home, *options)

    assert "studies here: gains" in told("gain-0001")
    assert "no trial of this id (got 'gains-0099')" in told("gains-0099")
    assert "this trial has no trace yet (got 'gains-0002')" in told("gains-0002")
    assert "not the id of a trial (got 'gains')" in told("gains")
    assert "no such trace" in told(tmp_path / "none.parquet")
    assert str(spec_file) in told(spec_file)
    assert "'.pdf'" in told("gains-0001", "--plot", "drawn.pdf")
    assert main(["trace", "gains-0099", "--home", str(home), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["kind"] == "not-found"


def test_a_picture_that_cannot_be_written_says_so(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(traced), "--plot", str(traced / "drawn.svg")]) == 2
    assert "choose another with --plot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([None, float("nan"), 0.0], ""),
        ([1.0, 10.0, 100.0], "▁▄▇"),
        ([0.1, 0.1001, 0.1], "▄▄▄"),
        ([1.0, None, 100.0], "▁ ▇"),
        ([1.0] * 50 + [1e3] + [1.0] * 49, "▁" * 12 + "▇" + "▁" * 11),
        ([1e3] * 50 + [1.0] + [1e3] * 49, "▇" * 12 + "▁" + "▇" * 11),
    ],
)
def test_a_spark_line_is_logarithmic_and_keeps_extremes(values: list[float | None], line: str) -> None:
    assert views.spark_line(values) == line


def test_a_home_that_cannot_be_written_is_told_before_anything_starts(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(spec_file), "--home", str(spec_file / "studies")]) == 2
    out, err = capsys.readouterr()
    assert out == "gains: 6 trials over 2 arms on this machine\n"
    assert err == f"{spec_file}/studies: the study home cannot be written (Not a directory); choose another with --home or $STUDY_HOME\n"


def test_a_name_that_belongs_to_another_study_is_refused(spec_file: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(spec_file), "--home", str(home), "--set", "search.seed=1", "--json"]) == 2
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert (error["kind"], error["where"]) == ("name-taken", str(home / "gains"))


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("line", "place", "says"),
    [
        ("  data: {train_size: 20, batch_size: 64}", "5: trial.data.batch_size", "is larger than all 20 training images (got 64)"),
        ("  data: {name: npz, path: no.npz}", "5: trial.data.path", "no.npz: cannot be read as an npz archive"),
        ("  data: {name: 'import:no.such:digits'}", "5: trial.data.name", "import:no.such:digits: there is no module 'no'"),
        ("  optimizer: {gamma: down}", "10: space.optimizer.gamma", "the model has no gain at down"),
    ],
)
def test_what_only_data_and_model_show_to_be_wrong_is_told_with_its_line(
    command: str, line: str, place: str, says: str, spec_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = spec_file.read_text().replace("  schedule:", f"{line}\n  schedule:")
    spec_file.write_text(text.replace("[none, all]", "[none, down]") if "gamma" in place else text)
    assert main([command, str(spec_file), "--home", str(spec_file.parent / "studies")]) == 2
    assert f"{spec_file}:{place}: {says}" in capsys.readouterr().err


def test_what_only_data_show_to_be_wrong_with_an_override_names_it(spec_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "plan", spec_file, "--set", "trial.data.batch_size=9999")
    assert told.startswith("--set trial.data.batch_size: is larger than all ")


def test_an_unexpected_error_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(ZeroDivisionError("division by zero"), False, ["list"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "this is a bug in study (ZeroDivisionError: division by zero); run it again with --debug, and report what that shows\n"


def test_an_interrupted_study_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(errors.Interrupted("the study was interrupted", where="gains"), False, ["run", "my spec.yaml", "--debug"]) == 130
    assert capsys.readouterr().err == "gains: the study was interrupted; go on with: study run 'my spec.yaml'\n"


def test_ctrl_c_before_a_study_has_begun_says_how_to_go_on(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(spec: StudySpec, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("study.tuning.driver.run", run)
    assert main(["resume", "gains", "--home", str(home)]) == 130
    assert capsys.readouterr().err.strip() == f"study: interrupted; go on with: study resume gains --home {home}"


def test_a_missing_library_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(ModuleNotFoundError("No module named 'ray'", name="ray"), False, ["run"]) == 2
    assert "pip install 'effective-lr-study[service]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "status", "none"], ["status", "none", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = python("-m", "study", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stdout == ""


def test_reading_commands_import_nothing_heavy(home: Path, spec_file: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from study.cli import main
for words in (["--help"], ["schema"], ["validate", {str(spec_file)!r}], ["list"], ["status", "gains"], ["best", "gains"], ["export", "gains"]):
    assert main([*words, *(["--home", {str(home)!r}] if words[0] in ("list", "status", "best", "export") else [])]) == 0, words
heavy = {{"torch", "ray", "optuna", "mlflow", "pandas", "numpy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_answer_is_alone_on_stdout(home: Path, tmp_path: Path) -> None:
    done = python("-m", "study", "status", "gains", "--home", home, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == "gains"


def test_a_fresh_home_passes_the_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check["name"]: check for check in document(capsys, "doctor", "--home", tmp_path / "studies")["checks"]}
    assert {"core", "torch", "service", "device", "home", "disk", "tracking"} <= set(checks)
    assert not [check for check in checks.values() if check["state"] == "fail"]
    assert "will be created" in checks["tracking"]["message"]
    assert not (tmp_path / "studies").exists()


def test_the_doctor_says_what_to_do(spec_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["doctor", "--home", str(spec_file / "studies"), "--tracking-uri", "http://127.0.0.1:1"]) == 1
    failures = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")}
    assert set(failures) == {"home", "tracking", "ray"}
    assert "choose another with --home" in failures["home"]
    assert "unset RAY_ADDRESS" in failures["ray"]


def test_the_doctor_knows_an_mlflow_server_that_was_not_told_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b"Invalid Host header - possible DNS rebinding attack detected"  # as MLflow 3.17 answers
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        name = f"127.0.0.1:{server.server_address[1]}"
        assert main(["doctor", "--tracking-uri", f"http://me:secret@{name}"]) == 1
        server.shutdown()
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert f"the MLflow server does not let in who calls it '{name}'; start it with --allowed-hosts '{name}'" in told


def test_the_doctor_looks_after_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> tuple[str, str]:
        main(["doctor", "--home", str(tmp_path / "studies"), "--json"])
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
        return checks["token"]["state"], checks["token"]["remedy"]

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert told() == ("fail", "RAY_AUTH_TOKEN_PATH must name the file that holds the cluster's token")
    path.write_text("0" * 64)
    path.chmod(0o644)
    assert told() == ("warn", f"chmod 600 {path}")
    path.chmod(0o600)
    assert told() == ("ok", "")


def test_the_doctor_asks_a_store_that_exists(tracking_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check["name"]: check for check in document(capsys, "doctor", "--tracking-uri", tracking_uri)["checks"]}
    assert "answers, with 1 experiments" in checks["tracking"]["message"]


def test_the_doctor_knows_the_packages_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"core": project["dependencies"], **project["optional-dependencies"]}
    for extra, packages in doctor.EXTRAS.items():
        named = {re.split(r"[\[><=]", line)[0] for line in declared[extra]}
        assert named - {project["name"]} == set(packages)


def test_the_ui_needs_something_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing was recorded here yet" in refused(capsys, "ui", "--home", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "http://user:***@host:5000" in said(capsys, "ui", "--tracking-uri", "http://user:secret@host:5000")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_ui_says_when_its_port_is_taken(tracking_uri: str, busy_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose another with --port" in refused(capsys, "ui", "--tracking-uri", tracking_uri, "--port", busy_port)


def test_the_ui_starts_and_ends_with_all_its_processes(tracking_uri: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "study", "ui", "--tracking-uri", tracking_uri, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}) as ui:
        assert ui.stdout is not None
        assert ui.stdout.readline().startswith(f"http://127.0.0.1:{port} ")
        socket.create_connection(("127.0.0.1", port)).close()
        ui.send_signal(signal.SIGINT)
        assert ui.wait(timeout=30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_progress_is_told_in_lines_where_there_is_no_terminal(home: Path) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, color_system=None, highlight=False, markup=False)
    watcher = display.Watcher(out)
    with watcher(StudyFolder(home / "gains"), threading.Event()):
        pass
    line, behind = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line == (
        "[0:00] 5 of 6 trials (2 completed, 1 stopped, 1 diverged, 1 failed, 1 waiting); "
        "best 0.125 val/error: gains-0001 (optimizer.gamma=all); starting Ray"
    )
    assert behind == "bringing the last 15 events to MLflow"
    assert watcher.watched


def test_the_live_display_shows_every_arm(home: Path) -> None:
    out = Console(file=io.StringIO(), width=200)
    out.print(display.progress_view(status(StudyFolder(home / "gains")), display.Pace(), behind=1000))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"gains +5 of 6 trials", shown)
    assert "1000 events are on their way to MLflow" in shown
    assert set(re.findall(r"optimizer\.gamma=\w+", shown)) == {"optimizer.gamma=none", "optimizer.gamma=all"}


def counts(completed: int, running: int = 0, waiting: int = 0) -> dict[str, int]:
    return {"completed": completed, "stopped": 0, "diverged": 0, "failed": 0, "interrupted": 0, "running": running, "waiting": waiting}


def test_the_pace_counts_from_the_first_running_trial_of_this_start() -> None:
    pace = display.Pace()
    pace.see(counts(4, waiting=8), now=100.0)
    assert (pace.per_minute, pace.left) == (None, None)
    pace.see(counts(4, running=2, waiting=6), now=110.0)
    pace.see(counts(8, running=2, waiting=2), now=130.0)
    assert (pace.per_minute, pace.left, pace.elapsed) == (12.0, 20.0, 30.0)


def test_the_time_left_is_never_more_than_the_budget() -> None:
    pace = display.Pace(wall=60.0)
    pace.see(counts(0, running=1, waiting=99), now=0.0)
    pace.see(counts(1, running=1, waiting=98), now=10.0)
    assert pace.left == 50.0


@pytest.mark.parametrize(("seconds", "shown"), [(None, "-"), (float("inf"), "-"), (0.4, "0:00"), (100.0, "1:40"), (7390.0, "2:03:10")])
def test_durations_are_clocks(seconds: float | None, shown: str) -> None:
    assert views.clock(seconds) == shown


def test_an_ended_study_without_a_best_says_why(home: Path) -> None:
    found = status(StudyFolder(home / "gains"))
    assert "2 completed, 1 stopped, 1 diverged, 1 failed" in views.why_nothing(found)
