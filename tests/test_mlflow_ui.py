"""What a user sees of the quickstart in MLflow's own UI, opened in headless Chromium: trials below their study, curves of effective lr."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; on Debian: apt-get install chromium")

QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")

WITH_PIPES = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts Chromium with its two pipes where it looks for them: descriptor 3 for commands, 4 for answers."""

LAYERS = {"stem.conv", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.conv", "head"}

ROWS = """
[...document.querySelectorAll('[role=row][row-id]')]
    .map(row => ({row, link: row.querySelector('a')})).filter(({link}) => link)
    .map(({row, link}) => ({name: link.innerText, indent: link.getBoundingClientRect().left, order: Number(row.getAttribute('row-index'))}))
    .sort((one, other) => one.order - other.order)
"""
"""The runs in the table of an experiment's page, from top to bottom."""

CHARTS = """
[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.querySelector('.scatterlayer .js-line'))
    .map(plot => ({names: plot.data.map(trace => trace.metricKey ?? trace.name), points: plot.querySelectorAll('.scatterlayer .point').length,
        curve: plot.querySelector('.scatterlayer .js-line').getAttribute('d')}))
"""
"""The line charts that are drawn on a run's page."""


class Browser:
    """Headless Chromium with one tab, spoken to in its DevTools protocol through a pair of pipes."""

    def __init__(self, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._received, self._sent = b"", 0
        self._session: dict[str, str] = {}
        options = [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "--headless", "--no-sandbox", "--no-first-run"]
        options += [*(f"--disable-{what}" for what in QUIET), "--window-size=1600,2400", "about:blank"]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WITH_PIPES, str(commands), str(answers), str(CHROMIUM), *options],
                env={**os.environ, "TMPDIR": str(folder)},
                pass_fds=(commands, answers),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(commands)
        os.close(answers)

    def __enter__(self) -> "Browser":
        tab = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        return self

    def __exit__(self, *details: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def open(self, url: str) -> None:
        """Goes to a page."""
        self._ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 120) -> None:
        """Returns once a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < until, f"not seen within {seconds} s: {script}\non a page that says\n{self.run('document.body.innerText')}"
            time.sleep(0.2)

    def screenshot(self, file: Path) -> None:
        """Writes what the page looks like as a PNG."""
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **params: Any) -> Any:
        self._sent += 1
        os.write(self._commands, json.dumps({"id": self._sent, "method": method, "params": params, **self._session}).encode() + b"\0")
        while (answer := self._next()).get("id") != self._sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], 60)[0], "Chromium does not answer"
            part = os.read(self._answers, 65536)
            assert part, "Chromium ended"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def experiment(quickstart_home: Path, quickstart_server: str) -> str:
    """The address of the quickstart's page."""
    from mlflow.tracking import MlflowClient

    found = MlflowClient(tracking_uri=f"sqlite:///{quickstart_home}/mlflow.db").get_experiment_by_name("quickstart")
    return f"{quickstart_server}/#/experiments/{found.experiment_id}/runs"


def test_the_trials_stand_below_their_study(browser: Browser, experiment: str, tmp_path: Path) -> None:
    browser.open(experiment)
    browser.wait_for(f"({ROWS}).length")
    assert [row["name"] for row in browser.run(ROWS)] == ["quickstart"]
    browser.run("document.querySelector('[role=row][row-id] button').click()")
    browser.wait_for(f"({ROWS}).length > 27")
    browser.screenshot(tmp_path / "study.png")
    parent, *children = browser.run(ROWS)
    assert parent["name"] == "quickstart"
    names = [row["name"] for row in children]
    assert sorted(name for name in names if "-r" not in name) == [f"quickstart-{number:04d}" for number in range(27)]
    assert len(names) > 27 and all(name.rpartition("-r")[0] in names for name in names if "-r" in name), "replicates stand there, too"
    assert all(row["indent"] > parent["indent"] for row in children)


def test_a_trial_has_a_curve_of_the_effective_learning_rate_of_every_layer(
    browser: Browser, experiment: str, quickstart_home: Path, tmp_path: Path
) -> None:
    best = study.load_best("quickstart", home=quickstart_home)
    browser.open(f"{experiment}/{best.run_id}/model-metrics")
    browser.wait_for(f"({CHARTS}).filter(chart => chart.names.some(name => name.startsWith('effective_lr/'))).length > {len(LAYERS)}")
    browser.screenshot(tmp_path / "trial.png")
    drawn = {chart["names"][0]: chart for chart in browser.run(CHARTS)}
    assert {name for name in drawn if name.startswith("effective_lr/")} == {f"effective_lr/{layer}" for layer in LAYERS | {"median"}}
    for layer in LAYERS:
        chart = drawn[f"effective_lr/{layer}"]
        assert chart["points"] > 5 and "L" in chart["curve"]
    assert best.trial_id in browser.run("document.body.innerText")
