"""Chaos: a study whose processes are killed at seeded random moments, and what is left of it afterwards.

python -m tests.chaos --engine solo --engine fused --seeds 20        `make chaos`

    3-node Ray cluster, fake GPUs ──┐
    a real MLflow server ───────────┼── study run, started again whenever it dies ──> journal, ledger, MLflow: compared with each other
    kills: worker, engine, pool, ───┘                                                 and with the same trials trained one after the other
    node, driver (twice), server

Exits with 1 where a trial was lost, repeated, recorded twice or given another value. Costs about two minutes for each seed and engine.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from study.spec import StudySpec, check
from study.tracking.outbox import Outbox
from tests.conftest import ROOT, answers, own_environment

TRIALS, EPOCHS = 30, 12

KILLS = ("worker", "worker", "node", "driver", "driver", "server")
"""What is killed in every study, in a random order; where trials are fused, an engine and the pool of engines, too."""

PAUSES = {"solo": 0.25, "fused": 0.08}
"""Seconds that each epoch of a trial sleeps, so that kills hit trials: rows of a fused engine sleep one after the other."""

USERS_CODE = """
import sys
import time

assert "mlflow" not in sys.modules, "who trains never talks to MLflow"

def metric(logits, labels):
    time.sleep({pause})
    return 0.0
"""

LIMIT = 1200.0
"""Seconds after which a study counts as hanging."""


def chaos_spec(engine: str, seed: int, trials: int = TRIALS) -> StudySpec:
    """A study of small trials; float64, so that both engines come to the same values."""
    trial = {
        "precision": "float64",
        "data": {"batch_size": 64, "train_size": 320},
        "model": {"name": "mlp", "width": 16},
        "schedule": {"epochs": EPOCHS, "shape": "cosine"},
        "trace": {"every": 5},
        "metrics": ["import:slow_metric:metric"],
    }
    space = {"optimizer.lr": {"low": 1e-2, "high": 1.0, "log": True}, "optimizer.gamma": {"choices": ["none", "all"], "role": "scientific"}}
    resources = {"engine": engine, "gpus_per_trial": 1, "max_failures": 3, **({"slots": 3} if engine == "fused" else {})}
    search = {"sampler": "random", "trials": trials, "seed": seed}
    return check(
        {
            "name": f"chaos-{engine}",
            "trial": trial,
            "space": space,
            "search": search,
            "objective": {"metric": "val/loss", "at": "best"},
            "resources": resources,
        }
    )


@dataclass(slots=True)
class Report:
    """What was killed, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    lost: int = 0
    starts: int = 0
    seconds: float = 0.0


class Scene:
    """A cluster, a tracking server and a study, all of which may be killed."""

    def __init__(self, folder: Path, spec: StudySpec, engine: str) -> None:
        self.folder, self.spec = folder, spec
        self.code, self.home = folder / "code", folder / "home"
        self.code.mkdir()
        (self.code / "slow_metric.py").write_text(USERS_CODE.format(pause=PAUSES[engine]))
        (self.code / "spec.yaml").write_text(spec.to_yaml())
        self.port = _free_port()
        self.log, self.heard = (folder / "log.txt").open("ab"), 0
        self.server: subprocess.Popen[bytes] | None = None
        self.driver: subprocess.Popen[bytes] | None = None
        self.cluster: Any = None

    @property
    def store(self) -> str:
        """The address of the tracking server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def path(self) -> str:
        """Where processes find this tree and the user's code."""
        return os.pathsep.join((str(ROOT), str(self.code)))

    def start_server(self) -> None:
        """Starts the tracking server, on the port and the store that it had before."""
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        places = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", *command, *places],
            env={**os.environ, **quiet},
            cwd=self.folder,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait_for_server(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 120
        while not answers(f"127.0.0.1:{self.port}"):
            assert time.monotonic() < deadline, "the tracking server does not start"
            time.sleep(0.2)

    def start_cluster(self) -> None:
        """Three nodes, a fake GPU on each; this process never connects to them."""
        from ray.cluster_utils import Cluster

        os.environ.update({"PYTHONPATH": self.path, "OMP_NUM_THREADS": "1"})
        self.cluster = Cluster(initialize_head=True, head_node_args={**_node(), "include_dashboard": False})
        for _ in range(2):
            self.add_node()

    def add_node(self) -> None:
        """Another node; Ray gives one half a minute to start, which a machine busy with the study may not hold (ray 2.60)."""
        for attempt in range(5):
            try:
                self.cluster.add_node(wait=False, **_node())
                return
            except Exception:  # Ray's own word for it
                if attempt == 4:
                    raise

    def start_driver(self) -> None:
        """`study run` in a process of its own."""
        self.heard = (self.folder / "log.txt").stat().st_size
        environment = {**own_environment(), "PYTHONPATH": self.path, "RAY_ADDRESS": self.cluster.address}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos", "--drive", "spec.yaml", "--home", str(self.home), "--tracking-uri", self.store],
            cwd=self.code,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def said(self) -> str:
        """What was said since the driver's last start."""
        return (self.folder / "log.txt").read_bytes()[self.heard :].decode(errors="replace")

    def progress(self) -> int:
        """Epochs that the study knows of."""
        if not (self.home / self.spec.name / "outbox.sqlite").exists():
            return 0
        outbox = Outbox(self.home / self.spec.name)
        try:
            return sum(entry.epoch for entry in outbox.entries())
        finally:
            outbox.close()

    def callers(self) -> dict[str, int]:
        """How often each thread called MLflow while Tune ran, in the driver's last start."""
        left = self.code / "calls.json"
        return json.loads(left.read_text()) if left.exists() else {}

    def kill(self, kind: str, rng: Random) -> bool:
        """Kills one thing; False where there is none of its kind now."""
        if kind in ("driver", "server"):
            process = self.driver if kind == "driver" else self.server
            assert process is not None
            if process.poll() is not None:
                return False
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        if kind == "node":
            node = rng.choice([one for one in self.cluster.list_all_nodes() if one is not self.cluster.head_node])
            self.cluster.remove_node(node, allow_graceful=False)
            return True
        titles = {"worker": ("ray::SoloTrainable", "ray::FusedTrainable"), "engine": ("ray::EngineActor",), "pool": ("ray::Pool",)}
        found = sorted(self._workers(titles[kind]))
        if not found:
            return False
        try:
            os.kill(rng.choice(found), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _workers(self, titles: tuple[str, ...]) -> list[int]:
        """Ray's processes of this cluster whose title begins so."""
        raylets = {info.process.pid for node in self.cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])}
        return [process for process, (parent, title) in _processes().items() if title.startswith(titles) and parent in raylets]

    def close(self) -> None:
        """Ends everything that was started here."""
        for process in (self.driver, self.server):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self.cluster is not None:
            self.cluster.shutdown()
        self.log.close()


@contextmanager
def scene(spec: StudySpec, engine: str, keep: Path | None = None) -> Iterator[Scene]:
    """A scene with everything started; its folder is kept under *keep*, where that is given."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    found = Scene(folder, spec, engine)
    try:
        found.start_server()
        found.start_cluster()
        found.wait_for_server()
        yield found
    finally:
        found.close()
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("artifacts", "ray"))
        shutil.rmtree(folder, ignore_errors=True)


def disturbed(engine: str, seed: int, trials: int = TRIALS, kills: tuple[str, ...] | None = None, keep: Path | None = None) -> Report:
    """Runs a study, kills what the seed says when it says so, and compares what is left."""
    rng, spec, report = Random(seed), chaos_spec(engine, seed, trials), Report()
    kinds = list(kills or (KILLS if engine == "solo" else (*KILLS, "engine", "pool")))
    rng.shuffle(kinds)
    moments = sorted(rng.uniform(0.0, 0.85) * trials * EPOCHS for _ in kinds)
    began = time.monotonic()
    with scene(spec, engine, keep) as stage:
        stage.start_driver()
        report.starts = 1
        _run(stage, list(zip(moments, kinds, strict=True)), rng, report)
        report.seconds = time.monotonic() - began
        violations, report.lost = compared(stage, engine)
        report.violations += violations
    return report


def _run(stage: Scene, plan: list[tuple[float, str]], rng: Random, report: Report) -> None:
    """Until the study has ended by itself: kills at their moments, starts again what was killed."""
    deadline = time.monotonic() + LIMIT
    due: list[tuple[float, str]] = []
    while True:
        now = time.monotonic()
        if now > deadline:
            report.violations.append(f"the study hangs: {stage.progress()} epochs")
            return
        for one in [one for one in due if one[0] <= now]:
            due.remove(one)
            {"server": stage.start_server, "node": stage.add_node, "driver": stage.start_driver}[one[1]]()
            report.starts += one[1] == "driver"
        if plan and stage.progress() >= plan[0][0]:
            time.sleep(rng.uniform(0.0, 1.0))
            kind = plan[0][1]
            if stage.kill(kind, rng):
                print(f"  killed {kind} after {stage.progress()} epochs", flush=True)
                report.kills[kind] += 1
                plan.pop(0)
                if kind in ("server", "node", "driver"):
                    due.append((time.monotonic() + rng.uniform(0.5, 4.0), kind))
        assert stage.driver is not None
        code = stage.driver.poll()
        if code is not None and not any(kind == "driver" for _, kind in due):
            if code == 0:
                report.violations += [f"the study ended before the {kind} was killed" for _, kind in plan]
                return
            # What a driver says that is started before the server is back, however soon that answers then.
            if code != 2 or f"the tracking store {stage.store} does not answer" not in stage.said():
                report.violations.append(f"the driver ended by itself with {code}: {_tail(stage)}")
            if len(report.violations) > 5:
                return
            stage.start_driver()
            report.starts += 1
        time.sleep(0.1)


def compared(stage: Scene, engine: str) -> tuple[list[str], int]:
    """What differs between journal, ledger, MLflow and the same trials trained undisturbed; and how many trials are lost."""
    from study.tuning.search import Search

    spec, folder = stage.spec, stage.home / stage.spec.name
    outbox, search = Outbox(folder), Search(spec, folder / "journal.log")
    records = {record.trial_id: record for record in outbox.records()}
    told, expected = search.told(), undisturbed(spec, PAUSES[engine])
    runs = _mlflow_runs(stage)
    found = [f"{trial_id} is still running in the ledger" for trial_id in outbox.orphans()]
    found += [f"{proposal.trial_id} is still running in the journal" for proposal in search.running()]
    found += [f"{trial_id} was never planned" for trial_id in {*records, *told, *runs} - expected.keys()]
    if undelivered := outbox.progress()["undelivered"]:
        found.append(f"{undelivered} events are undelivered")
    lost = 0
    for trial_id, value in expected.items():
        own = [*_of_trial(trial_id, records.get(trial_id), told.get(trial_id), runs.get(trial_id, []), value)]
        own += [
            f"{trial_id} measured the epochs {seen}" for seen in [[one.epoch for one in outbox.history(trial_id)]] if seen != [*range(1, EPOCHS + 1)]
        ]
        lost += bool(own)
        found += own
    if (callers := stage.callers().keys()) - {"recorder"}:
        found.append(f"MLflow was called by the threads {', '.join(callers)}")
    found += [f"left behind: {path}" for path in folder.glob("trials/*/snapshot*")]
    return found, lost


def _of_trial(trial_id: str, record: Any, told: Any, runs: list[Any], value: float) -> Iterator[str]:
    """What is wrong with one trial."""
    if record is None or told is None or len(runs) != 1:
        yield f"{trial_id}: ledger {record and record.outcome}, journal {told and told[0].outcome}, {len(runs)} runs in MLflow"
        return
    ((run, steps),) = runs
    if not (record.outcome == told[0].outcome == run.data.tags.get("study.outcome") == "completed" and run.info.status == "FINISHED"):
        outcomes = record.outcome, record.reason, told[0].outcome, run.data.tags.get("study.outcome"), run.info.status
        yield f"{trial_id}: ledger, its reason, journal, tag, status: {', '.join(map(str, outcomes))}"
        return
    values = record.value, told[1], float(run.data.tags["study.value"]), run.data.metrics["best/val/loss"]
    if any(abs(one - value) > 1e-9 * abs(value) for one in values):
        yield f"{trial_id}: expected {value}; ledger, journal, tag, metric: {values}"
    for metric, seen in steps.items():
        if len(seen) != len(set(seen)):
            yield f"{trial_id}: {metric} has repeated steps"
    if len(steps["val/loss"]) != EPOCHS:
        yield f"{trial_id}: val/loss has {len(steps['val/loss'])} points"


def _mlflow_runs(stage: Scene) -> dict[str, list[Any]]:
    """Every run of the study's experiment by trial, with the steps of its metrics."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{stage.folder}/mlflow.db")
    experiment = client.get_experiment_by_name(stage.spec.name)
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        if trial_id := run.data.tags.get("study.trial_id"):
            steps = {name: [point.step for point in client.get_metric_history(run.info.run_id, name)] for name in ("val/loss", "rotation/median")}
            found.setdefault(trial_id, []).append((run, steps))
    return found


def undisturbed(spec: StudySpec, pause: float) -> Mapping[str, float]:
    """The value of every trial when nobody disturbs it: one after the other, in this process, by the engine that defines a trial."""
    from study.engines.solo import SoloEngine
    from study.tuning.search import Search

    values = {}
    with tempfile.TemporaryDirectory() as scratch:
        search = Search(spec, Path(scratch) / "journal.log")
        while (proposal := search.ask()) is not None:
            engine, history = SoloEngine(), []
            engine.admit(proposal.trial_id, proposal.trial.model_copy(update={"metrics": ()}))
            for _ in range(EPOCHS):
                (progress,) = engine.advance()
                history.append(progress.measurement.values[spec.objective.metric])
            values[proposal.trial_id] = spec.objective.value(history)
    return values


def drive(arguments: list[str]) -> int:
    """`study run`, for a cluster whose GPUs are fake: trials that reserve one train on the CPU.

    Who calls MLflow while Tune runs, by thread, is left in `calls.json`.
    """
    from study.cli import main
    from study.tracking.store import Store
    from study.tuning import driver, hosting

    hosting.device_of = lambda resources: "cpu"
    calls, asking, tune_study = Counter[str](), Store._asking, driver.tune_study
    tuning = threading.Event()

    def counted(store: Store) -> Any:
        if tuning.is_set():
            calls[threading.current_thread().name] += 1
        return asking(store)

    def tuned(*given: Any) -> str:
        tuning.set()
        try:
            return tune_study(*given)
        finally:
            tuning.clear()
            Path("calls.json").write_text(json.dumps(calls))

    Store._asking, driver.tune_study = counted, tuned
    return main(["run", *arguments, "--debug"])


def _node() -> dict[str, Any]:
    return {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100_000_000}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes() -> dict[int, tuple[int, str]]:
    """Every process of this machine: its parent and its command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(process.name)] = parent, (process / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
    return found


def _tail(stage: Scene) -> str:
    stage.log.flush()
    return (stage.folder / "log.txt").read_text(errors="replace")[-1500:]


def main() -> int:
    """Runs the studies that the command line asks for, and prints kills survived and trials lost, by kind."""
    if sys.argv[1:2] == ["--drive"]:
        return drive(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=("solo", "fused"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for what is left of studies that went wrong")
    given = parser.parse_args()
    survived: Counter[str] = Counter()
    lost = wrong = studies = 0
    for seed in range(given.first, given.first + given.seeds):
        for engine in given.engine or ("solo", "fused"):
            print(f"{engine}, seed {seed}", flush=True)
            report = disturbed(engine, seed, keep=given.keep and given.keep / f"{engine}-{seed}")
            studies, lost, wrong = studies + 1, lost + report.lost, wrong + bool(report.violations)
            survived.update({f"{engine} {kind}": number for kind, number in report.kills.items()})
            verdict = "as undisturbed" if not report.violations else "WRONG"
            print(f"  {verdict}: {sum(report.kills.values())} kills, {report.starts} starts, {report.seconds:.0f} s", flush=True)
            for violation in report.violations[:20]:
                print(f"    {violation}", flush=True)
    for kind, number in sorted(survived.items()):
        print(f"{kind:<16}{number:>4} kills")
    print(f"{studies} studies of {TRIALS} trials, {sum(survived.values())} kills, {lost} trials lost, {wrong} studies wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
