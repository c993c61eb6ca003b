"""Hosting: a study's trials under Ray Tune. What Tune runs for each trial, with which searcher, scheduler and callbacks, and on which Ray.

search ─> JournalSearcher ─┐
stopping ─> ArmScheduler ──┼── tune.run ── SoloTrainable, or FusedTrainable and a pool of engines ──> LedgerCallback ─> ledger
interrupt, budget ─> stop ─┘
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.budget import Meter
from study.errors import InputError
from study.measurement import History
from study.spec import ResourcesSpec, StudySpec
from study.tracking.outbox import RUNNING, Outbox
from study.trial import TrialSpec
from study.tuning.choice import Choice
from study.tuning.starting import inherited, on_ray, quiet_hosts
from study.tuning.status import meter_of

if TYPE_CHECKING:
    from study.tuning.failures import FirstFailures
    from study.tuning.handing import Plan
    from study.tuning.search import Proposal, Search


def device_of(resources: ResourcesSpec) -> str:
    """Where a trial's tensors lie."""
    return "cuda" if resources.gpus_per_trial else "cpu"


def tune_study(
    spec: StudySpec,
    folder: Path,
    search: "Search",
    outbox: Outbox,
    left: list[tuple["Proposal", History]],
    interrupt: threading.Event,
    choice: Choice,
) -> tuple[str, str]:
    """Lets Ray Tune run the trials of a search until none is left, the budget is spent, `interrupt` is set or all fail alike.

    Returns:
        The limit that ended the study, as `Meter.reached` names it, and what the first trials all failed with; empty where there is none.
    """
    from study.tuning.callbacks import history_of
    from study.tuning.population import Populations
    from study.tuning.searcher import JournalSearcher
    from study.tuning.stopping import Past, stopping

    going_on = {proposal.trial_id for proposal, _ in left}
    entries = outbox.entries()
    ended = [
        Past(entry.trial_id, entry.arm, int(entry.trial["schedule"]["epochs"]), history_of(outbox, entry.trial_id, spec.objective))
        for entry in entries
        if entry.trial_id not in going_on and entry.state != RUNNING and not entry.replicate_of
    ]
    meter = meter_of(spec, entries, outbox.ended())
    resumed = {proposal.trial_id: history for proposal, history in left}

    populations = spec.stopping.scheduler == "pbt"

    def searcher(settings: dict[str, Any], processes: int) -> JournalSearcher:
        return JournalSearcher(search, settings, left, _tags, meter, populations, processes)

    scheduler = Populations(spec) if populations else stopping(spec.stopping, spec.objective.direction, _longest(spec), ended, resumed)
    trials = search.unasked + len(left)
    # One more than there are, where the searcher has to say itself that it is at its end.
    return tune_trials(spec, folder, outbox, interrupt, choice, searcher, scheduler, meter, samples=trials + populations, at_once=trials)


def tune_replicates(spec: StudySpec, folder: Path, outbox: Outbox, plan: "Plan", interrupt: threading.Event, choice: Choice, samples: int) -> None:
    """Lets Ray Tune run replicates, as long as the plan wants some, the budget lasts and `interrupt` is not set; none is stopped early.

    Args:
        samples: More of them are never wanted.
    """
    from study.tuning.callbacks import history_of
    from study.tuning.handing import ReplicateSearcher

    def tags(trial: TrialSpec) -> dict[str, str]:
        return {**_tags(trial), "study.engine": choice.engine}

    def searcher(settings: dict[str, Any], processes: int) -> ReplicateSearcher:
        return ReplicateSearcher(plan, lambda trial_id: history_of(outbox, trial_id, spec.objective), settings, tags)

    meter = meter_of(spec, outbox.entries(), outbox.ended())
    tune_trials(spec, folder, outbox, interrupt, choice, searcher, None, meter, samples=samples, at_once=len(plan()))


def tune_trials(
    spec: StudySpec,
    folder: Path,
    outbox: Outbox,
    interrupt: threading.Event,
    choice: Choice,
    searcher: Callable[[dict[str, Any], int], Any],
    scheduler: Any,
    meter: Meter,
    *,
    samples: int,
    at_once: int,
) -> tuple[str, str]:
    """Lets Ray Tune run what a searcher proposes.

    Args:
        searcher: Makes the searcher from the settings that every trial has in its config, and the number of processes to start with.
        scheduler: Stops trials early; None stops none.
        meter: Says when the budget is spent.
        samples: How many the searcher may propose.
        at_once: How many of them before one has ended.

    Returns:
        The limit that ended it, as `Meter.reached` names it, and what the first trials all failed with; empty where there is none.
    """
    quiet_hosts()
    from ray import tune

    from study.tuning.callbacks import LedgerCallback
    from study.tuning.failures import FirstFailures, named

    settings, failures = settings_of(spec, folder), FirstFailures(spec.budget.same_failures)
    stopper, lives = _stopper(meter, interrupt, failures), spec.resources.max_failures
    with named(str(folder)), ExitStack() as stack:
        stack.enter_context(on_ray())()
        trainable, share, processes = stack.enter_context(_trained_by(choice, spec, settings, at_once))
        stack.enter_context(_starting(processes))
        tune.run(
            trainable,
            name="ray",
            storage_path=str(folder.resolve()),
            search_alg=searcher(settings, processes),
            scheduler=scheduler,
            stop=stopper,
            callbacks=[LedgerCallback(outbox, folder, spec.objective, failures, lives)],
            num_samples=samples,
            resources_per_trial=share,
            reuse_actors=True,
            max_failures=lives,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            trial_dirname_creator=_folder_name,
            raise_on_failed_trial=False,
            verbose=0,
        )
    return str(stopper.reached), failures.alike


def _folder_name(trial: Any) -> str:
    """Of what Tune keeps of a trial; ours lies elsewhere. Not a lambda, of which Tune would write the code down for every trial."""
    return str(trial.trial_id)


def settings_of(spec: StudySpec, folder: Path) -> dict[str, Any]:
    """What the config of every trial of a study holds."""
    return {
        "folder": str(folder.resolve()),
        "objective": spec.objective.model_dump_json(),
        "device": device_of(spec.resources),
        "keep_weights": spec.keep.weights,
        "patience": spec.stopping.patience,
        "grace": spec.stopping.grace,
        "test": False,
        "replicate_of": "",
    }


@contextmanager
def _trained_by(choice: Choice, spec: StudySpec, settings: dict[str, Any], wanted: int) -> Iterator[tuple[Any, dict[str, float], int]]:
    """What Tune runs for each trial, what each reserves, and how many processes to start with; engines for them while the block lasts.

    The settings of the trials are told how to find the engines.

    Args:
        wanted: Trials that can run at once, as far as the search goes.
    """
    import ray

    from study.tuning.actor import EngineActor
    from study.tuning.placement import pool, roll_call
    from study.tuning.trainables import FusedTrainable, SoloTrainable

    resources, is_fused = spec.resources, choice.engine == "fused"
    share: dict[str, float] = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
    if is_fused:
        cores = ray.cluster_resources()["CPU"] / choice.engines if choice.engines else 1.0  # type: ignore[no-untyped-call]
        share = {"cpu": 0.0, "gpu": share_of_a_proxy(choice)} if resources.gpus_per_trial else {"cpu": share_of_a_proxy(choice, cores)}
    processes = min(wanted, _room_for(share))
    if not is_fused:
        with roll_call(processes) as settings["roll"]:
            yield SoloTrainable, share, processes
        return
    arguments = {"folder": settings["folder"], "slots": choice.slots, "device": settings["device"], "arithmetic": choice.arithmetic}
    with pool(EngineActor, {**arguments, "keep": settings["keep_weights"]}, choice.engines_per_gpu, processes, choice.engines) as name:
        settings["pool"] = settings["roll"] = name
        yield FusedTrainable, share, processes


@contextmanager
def _starting(processes: int) -> Iterator[None]:
    """Lets Tune start so many processes at once, unless the user said how many; later, the searcher keeps few trials waiting."""
    from study.tuning.searcher import AHEAD

    name = "TUNE_MAX_PENDING_TRIALS_PG"
    with inherited({name: os.environ.get(name, str(max(AHEAD, processes)))}):
        yield


def _room_for(share: Mapping[str, float]) -> int:
    """How many trials that reserve so much the cluster has room for now."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return min(int(free.get(name.upper(), 0.0) / each) for name, each in share.items() if each)


def share_of_a_proxy(choice: Choice, cores: float = 1) -> float:
    """What the proxy of a trial reserves of its core or GPU, so that as many fit as the engines there have slots: in steps of Ray's, rounded down.

    Args:
        cores: Those that one engine has.
    """
    return max(1, int(10_000 * cores / (choice.slots * choice.engines_per_gpu))) / 10_000


def _tags(trial: TrialSpec) -> dict[str, str]:
    """More tags of a trial's MLflow run; none where its model cannot be built, which the trial itself will say."""
    from study.training.plans import plan_hash_of

    try:
        return {"study.plan_hash": plan_hash_of(trial)}
    except InputError:
        return {}


def _longest(spec: StudySpec) -> int:
    axis = spec.space.get("schedule.epochs")
    return spec.trial.schedule.epochs if axis is None else int(max(value for value in axis.endpoints() if isinstance(value, int | float)))


def _stopper(meter: Meter, interrupt: threading.Event, failures: "FirstFailures") -> Any:
    from ray.tune import Stopper

    from study.tuning.trainables import SECONDS

    class StudyStopper(Stopper):
        """Ends the whole study at Ctrl-C, when its budget is spent, and when its first trials all failed the same way."""

        def __init__(self) -> None:
            self.started = time.monotonic()
            self.reached = ""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            meter.seconds += result.get(SECONDS, 0.0)
            return False

        def stop_all(self) -> bool:
            self.reached = self.reached or meter.reached(time.monotonic() - self.started)
            return interrupt.is_set() or bool(self.reached) or bool(failures.alike)

        def __reduce__(self) -> tuple[object, ...]:
            return (dict, ())  # Tune pickles the stopper beside its own state, which nobody reads

    return StudyStopper()
