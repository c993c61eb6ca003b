"""Starting: the Ray that a study runs on. That takes seconds, which a study uses for what it has to do before it needs one.

on_ray ──> a thread starts Ray            meanwhile: models are examined, MLflow is opened
   └─────> yields wait() ──> it is up, or ClusterLost
"""

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from study.errors import ClusterLost

log = logging.getLogger(__name__)

WORKERS = {
    "OMP_NUM_THREADS": "1",
    # Tensors of some megabytes come and go with every step: memory that is freed is kept, as fetching it anew costs up to a tenth of the time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
"""Environment of the processes that train."""


def quiet_hosts() -> None:
    """Tune's own loggers, tables and Ctrl-C handling are replaced by ours; nothing phones home."""
    defaults = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class _Start:
    """A Ray that starts in a thread of its own: one of our own, or the cluster that `RAY_ADDRESS` names.

    Without an address, Ray would join a cluster that somebody started on this machine, and end with it (ray 2.60). Outside of the main
    thread it leaves this process's handler of SIGTERM alone: its own would end the process with its trials running.
    """

    under_way: "_Start | None" = None
    """The one whose block this process is in."""

    def __init__(self) -> None:
        self._address = os.environ.get("RAY_ADDRESS")
        self._error: Exception | SystemExit | None = None
        self._environment = ExitStack()
        variables = {**WORKERS, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))}
        arguments: dict[str, Any] = {"address": self._address, "runtime_env": {"env_vars": variables}}
        if not self._address:
            arguments = {"address": "local", "include_dashboard": False, "object_store_memory": 200_000_000}
            # Inherited rather than a runtime environment: the workers that Ray starts beforehand have none, and only then can be used.
            self._environment.enter_context(inherited(variables))
        self._is_up, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, args=(arguments,), name="Ray's parent", daemon=True)
        self._thread.start()

    def _live(self, arguments: dict[str, Any]) -> None:
        """Starts Ray, and stays until it is over: the processes of Ray (2.60) are killed by Linux once the thread that started them ends."""
        import ray

        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
        except (Exception, SystemExit) as error:  # Ray raises plain ones; whoever waits for it raises it again
            self._error = error
        self._is_up.set()
        self._is_over.wait()

    def wait(self) -> None:
        """Returns once Ray is up.

        Raises:
            ClusterLost: if it did not start.
        """
        self._is_up.wait()
        self._environment.close()
        if self._error is None:
            return
        said = " ".join(str(self._error).split())[:200]
        remedy = (
            "is the cluster up, and is the address right?"
            if self._address
            else "on a machine that is very busy it takes too long: the same command tries again"
        )
        raise ClusterLost(f"Ray did not start ({said})", where=self._address or "this machine", remedy=remedy) from self._error

    def end(self) -> None:
        """Ends what was started."""
        import ray

        if not self._is_up.is_set():
            log.warning("stopping, once Ray has started and can be ended: some seconds")
        self._is_up.wait()
        self._environment.close()
        with _no_garbage():
            ray.shutdown()
        self._is_over.set()
        self._thread.join()


def is_alone() -> bool:
    """Whether a study would start a Ray of its own, on this machine only, rather than run on one that is there."""
    import ray

    return not (os.environ.get("RAY_ADDRESS") or _Start.under_way or ray.is_initialized())


@contextmanager
def on_ray() -> Iterator[Callable[[], None]]:
    """A Ray for the block, which starts while the block goes on; what is yielded waits until it is up.

    A Ray that runs in this process already, or is starting in a block around this one, is used and left alone.
    """
    quiet_hosts()
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if _Start.under_way is not None:
        yield _Start.under_way.wait
    elif ray.is_initialized():
        yield lambda: None
    else:
        _Start.under_way = start = _Start()
        try:
            yield start.wait
        finally:
            _Start.under_way = None
            start.end()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collects garbage beforehand, and none while the block lasts.

    Tune leaves references to objects of Ray behind, which garbage collection may find in any thread: where that happens while Ray (2.60)
    shuts down, Ray ends this process at once, with the study's results not yet written.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, and so of those that it starts, while the block lasts."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
