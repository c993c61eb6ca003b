"""A report says what a study found in words that its numbers carry, as a document and as a page of its own."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from study.home import StudyFolder
from study.measurement import LayerSample
from study.results import page as pages
from study.results.answer import answer
from study.results.arms import compare_arms
from study.results.best import BestConfig, ObjectiveResult
from study.results.page import Figures, draw_figures, page
from study.results.report import findings, report_document
from study.traces import write_trace
from study.trial import TrialSpec
from tests.results.tables import ALL, NONE, replicates, spec, table, trial

AHEAD, BEHIND = [0.10, 0.11, 0.12, 0.10, 0.11], [0.13, 0.14, 0.16, 0.13, 0.14]
CLAIM = {
    "id": "none-is-better",
    "says": "Decaying no gains is better.",
    "source": "arXiv:2205.07260",
    "where": {"replicate": True},
    "contrast": {"metric": "final/val/error", "arm": "optimizer.gamma", "a": "none", "b": "all", "paired_by": "seed"},
    "expect": {"below": 0},
}
UNTESTABLE = {**CLAIM, "id": "untestable", "where": {}}


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, its ids, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


def trials() -> list[dict[str, Any]]:
    return [trial(number, (NONE, ALL)[number % 2], 0.1 + number / 100, **{"optimizer.lr": 0.01 * (1 + number)}) for number in range(8)] + [
        trial(8, NONE, None, "diverged", reason="nan"),
        trial(9, ALL, None, "failed"),
    ]


def samples() -> list[LayerSample]:
    layers = (("conv", True), ("head", False))
    return [
        LayerSample(step, layer, "weight", "inner", invariant, True, 0.1, 5e-3, 2 + step / 100, 0.1, 0.025, 0.0202, 0.02 if invariant else None)
        for step in range(1, 101)
        for layer, invariant in layers
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study with the trace of its best trial, and the traceback of its failed one."""
    folder = StudyFolder.prepare(tmp_path_factory.mktemp("home"), spec())
    traced, failed = (folder.path / "trials" / name for name in ("gains-0000", "gains-0009"))
    traced.mkdir()
    write_trace(traced / "trace.parquet", samples())
    (failed / "artifacts").mkdir(parents=True)
    (failed / "artifacts" / "traceback.txt").write_text("Traceback (most recent call last):\n  ...\nValueError: <b>bad</b> & worse\n")
    return folder


def report(folder: StudyFolder, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    studied = spec(**changes)
    return report_document(findings(folder, studied, table(*rows), {}, "finished"))


def compared(first: list[float], second: list[float]) -> list[dict[str, Any]]:
    rows = trials()
    return [*rows, *replicates(rows[0], first), *replicates(rows[1], second)]


def test_without_replicates_the_answer_is_that_there_is_none(folder: StudyFolder) -> None:
    found = report(folder, trials())
    assert found["answer"] == (
        f"The lowest val/error, 0.1, is that of {NONE}, then {ALL} with 0.11. Each value is the best of several trials with one seed, "
        "so these differences are not findings: nothing here says that an arm is better."
    )
    assert (found["differences"], found["wins_again"]) == ([], None)
    assert [(arm["arm"], arm["best"]["trial_id"], arm["mean"]) for arm in found["arms"]] == [(NONE, "gains-0000", None), (ALL, "gains-0001", None)]
    assert "one-seed" in {warning["kind"] for warning in found["warnings"]}


def test_a_winner_is_ahead_where_its_interval_says_so(folder: StudyFolder) -> None:
    found = report(folder, compared(AHEAD, BEHIND))
    assert found["answer"].startswith(f"{NONE} is ahead of {ALL}: its mean val/error is 0.108 (95% interval ")
    assert (
        f"The difference to the runner-up {ALL}, paired by seed, is -0.032 (95% interval -0.03755 to -0.02645, which leaves out 0)."
        in found["answer"]
    )
    assert re.search(r"it would win again with probability (0\.9\d|1\.00)\.$", found["answer"])
    assert [(pair["a"], pair["b"], pair["n"]) for pair in found["differences"]] == [(NONE, ALL, 5)]
    assert [(arm["mean"], arm["seeds"]) for arm in found["arms"]] == [(pytest.approx(0.108), 5), (pytest.approx(0.14), 5)]
    assert found["outcomes"]["replicates"] == 10
    assert found["outcomes"]["ended"] == 10


def test_what_is_not_separable_is_not_called_better(folder: StudyFolder) -> None:
    found = report(folder, compared(AHEAD, [0.11, 0.10, 0.14, 0.09, 0.12]))
    assert found["answer"].startswith(f"The study does not separate {NONE}, whose mean val/error of 0.108")
    assert "which includes 0)" in found["answer"]
    assert "ahead" not in found["answer"]


def test_a_confirmed_best_is_told_with_its_mean() -> None:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}}
    rows, studied = table(*(trial(number, "all", 0.1 + number / 100) for number in range(4))), spec(space=space)
    alone = answer(studied, rows, compare_arms(rows, studied.objective))
    assert alone.startswith("The best of 4 completed trials is gains-0000, with a val/error of 0.1. It was trained once")
    result = ObjectiveResult(metric="val/error", direction="minimize", at="final", value=0.1, seeds=5, mean=0.12, interval=(0.11, 0.13))
    provenance = {"study_id": "x", "run_id": "", "git_commit": "", "versions": {}, "date": "2026-01-01", "spec_hash": "a" * 64}
    config = BestConfig(name="gains", trial_id="gains-0000", arm="all", objective=result, trial=TrialSpec(), **provenance)
    told = answer(studied, rows, compare_arms(rows, studied.objective), config=config)
    assert told == f"{alone} Trained again on 5 fresh seeds, gains-0000 has a mean val/error of 0.12 (95% interval 0.11 to 0.13)."


def test_a_study_without_a_completed_trial_has_no_answer(folder: StudyFolder) -> None:
    for rows in ([], [trial(0, value=None, outcome="diverged", reason="nan")]):
        found = report(folder, rows)
        assert found["answer"] == "No trial trained to its end with a finite value, so the study has no answer."
        assert "has no answer" in Page(page(found, Figures("", ()))).text


def test_claims_are_part_of_the_answer(folder: StudyFolder) -> None:
    found = report(folder, compared(AHEAD, BEHIND), claims=[CLAIM, UNTESTABLE])
    assert found["answer"].endswith("Of 1 claim, 1 confirmed.")
    assert [claim["verdict"] for claim in found["claims"]["claims"]] == ["confirmed"]
    assert "pairing is not one-to-one" in found["claims"]["not_tested"][0]
    shown = Page(page(found, Figures("", ()))).text
    assert "Decaying no gains is better. none-is-better, arXiv:2205.07260 confirmed below 0 -0.032 -0.03755 to -0.02645 5" in shown
    assert "Not tested: claims.untestable" in shown


def test_failures_and_reasons_are_told(folder: StudyFolder) -> None:
    outcomes = report(folder, trials())["outcomes"]
    assert (outcomes["completed"], outcomes["diverged"], outcomes["failed"], outcomes["planned"]) == (8, 1, 1, 10)
    assert outcomes["reasons"] == [{"outcome": "diverged", "reason": "nan", "count": 1}]
    assert outcomes["failures"] == {"gains-0009": "ValueError: <b>bad</b> & worse"}


HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too'"


@pytest.fixture(scope="module")
def drawn(folder: StudyFolder) -> str:
    """A whole page: replicates, claims, figures, and a question that is code."""
    studied = spec(question=HOSTILE, claims=[{**CLAIM, "says": HOSTILE}])
    found = findings(folder, studied, table(*compared(AHEAD, BEHIND)), {}, "finished")
    return page(report_document(found), draw_figures(found))


def test_a_page_stands_alone_and_executes_nothing(drawn: str) -> None:
    parsed = Page(drawn)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "form"}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")], tag
        assert all((value or "").startswith(("#", "data:image/png;")) for name, value in attributes.items() if name in ("href", "xlink:href")), tag
    assert "@import" not in drawn and "url(" not in re.sub(r"url\(#[\w-]+\)", "", drawn)
    assert parsed.open == []
    assert len(drawn.encode()) < 1_500_000


def test_everything_of_the_spec_is_escaped(drawn: str) -> None:
    assert "<script" not in drawn
    assert "ValueError: &lt;b&gt;bad&lt;/b&gt; &amp; worse" in drawn
    assert Page(drawn).text.count(HOSTILE) == 4  # the question, the claim, and both in the spec


def test_ids_are_unique_and_what_refers_to_them_finds_them(drawn: str) -> None:
    parsed = Page(drawn)
    assert len(parsed.ids()) == len(set(parsed.ids()))
    links = [str(value) for _, attributes in parsed.tags for name, value in attributes.items() if name in ("href", "xlink:href")]
    targets = re.findall(r"url\(#([\w-]+)\)", drawn) + [link[1:] for link in links if link.startswith("#")]
    assert targets
    assert set(targets) <= set(parsed.ids())
    assert {str(value) for _, attributes in parsed.tags if (value := attributes.get("aria-labelledby"))} <= set(parsed.ids())


def test_a_page_is_accessible_and_in_order(drawn: str) -> None:
    parsed = Page(drawn)
    assert ("html", {"lang": "en"}) in parsed.tags
    tables = [tag for tag, _ in parsed.tags if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * (len(tables) // 2)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in parsed.tags if tag == "th")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", drawn)
    order = ["Best config", "Arms", "Learning rate and weight decay", "Effective learning rates", "Outcomes", "Claims", "Warnings", "Provenance"]
    assert headings == order
    assert "prefers-color-scheme: dark" in drawn and "width=device-width" in drawn


def test_figures_keep_their_text_and_lose_what_a_page_does_not_need(drawn: str) -> None:
    assert ">val/error</text>" in drawn
    assert ">conv</text>" in drawn
    assert "<metadata" not in drawn and "<?xml" not in drawn and "<!DOCTYPE svg" not in drawn
    assert not re.search(r' d="[^"]*\d\.\d{3}', drawn)


def test_layers_are_told_with_their_states(folder: StudyFolder) -> None:
    (layers,) = report(folder, trials())["layers"]
    assert (layers["arm"], layers["trial_id"], layers["verdict"]) == (
        NONE,
        "gains-0000",
        "1 of 1 scale-invariant layers in equilibrium; median rotation 1.01 of expected",
    )


def test_a_study_that_varies_neither_learning_rate_nor_decay_has_no_plane(folder: StudyFolder) -> None:
    studied = spec(space={"optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"}})
    assert draw_figures(findings(folder, studied, table(*trials()), {}, "finished")).plane == ""


def test_of_very_many_trials_an_even_selection_is_drawn_with_the_best_of_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_DOTS", 3)
    rows = table(*(trial(number, (NONE, ALL)[number % 2], 1 / (1 + number % 6)) for number in range(10)))
    assert list(pages._selected(rows, "minimize")["trial_id"]) == [f"gains-{number:04}" for number in (0, 4, 5, 8)]
    assert len(pages._selected(rows.head(3), "minimize")) == 3
