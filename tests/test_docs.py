"""What docs/ says is so: its Python runs as it stands and prints what the page shows below it, and its files are there."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT, own_environment

PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"\s*[^`]*?\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")

EXAMPLES = {
    f"{page}, block {number}": (found[1], shown[1] if (shown := SHOWN.match(text, found.end())) else "")
    for page, text in PAGES.items()
    for number, found in enumerate(PYTHON.finditer(text), 1)
}
"""Each Python block of each page, and what the page says that it prints."""

CLOSE = 0.5
"""Relative difference allowed between a printed number and the page's: platforms differ in last digits, and training amplifies these."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_block_runs_and_prints_what_the_page_shows(example: str, tmp_path: Path) -> None:
    block, shown = EXAMPLES[example]
    _require("transformers", "accelerate")
    (tmp_path / "block.py").write_text(block, "utf-8")
    environment = {**own_environment(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    expected = shown.splitlines()
    printed = done.stdout.splitlines()[-len(expected) :]
    assert expected and [_words(line) for line in printed] == [_words(line) for line in expected]
    for ours, theirs in zip(printed, expected, strict=True):
        assert _numbers(ours) == pytest.approx(_numbers(theirs), rel=CLOSE, abs=0.01)
        assert not (found := re.search(r"ratio ([\d.]+)", ours)) or float(found[1]) == pytest.approx(1, abs=0.05)


def _require(*libraries: str) -> None:
    if missing := [library for library in libraries if find_spec(library) is None]:
        pytest.skip(f"not installed: pip install {' '.join(missing)}")


def _words(line: str) -> list[str]:
    """A line without its numbers and spaces."""
    return NUMBER.sub("", line).split()


def _numbers(line: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_points_to_is_there(page: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


def test_tracing_has_an_example_of_a_plain_loop_and_one_of_a_trainer() -> None:
    blocks = [block for example, (block, _) in EXAMPLES.items() if example.startswith("tracing.md")]
    assert [("optimizer.step()" in block, "Trainer(" in block) for block in blocks] == [(True, False), (False, True)]
