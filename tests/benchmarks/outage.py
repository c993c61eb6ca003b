"""Outage: the tracking server stops in the middle of a study and comes back two minutes later. What does the study notice?

python -m tests.benchmarks.outage [--away 120]

Two studies of trials that sleep, so that the machine's load does not count: one undisturbed, one whose server is killed after a third of
its epochs. Both are timed from their first epoch to their last one. Who calls MLflow
while Tune runs is counted by thread, and whatever MLflow lacks afterwards is said.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from random import Random
from typing import Any

from study.tracking.outbox import Outbox
from tests import chaos

TRIALS, AWAY = 30, 120.0
PAUSE = 1.0
"""Seconds that an epoch sleeps: three trials of twelve epochs at a time take the study past two minutes."""


def measure(away: float = AWAY) -> Iterator[tuple[str, list[float], str]]:
    """The time with an outage over the time without."""
    plain, with_outage = _timed(0.0), _timed(away)
    name = f"study whose tracking server is away for {away:.0f} s / the same study undisturbed"
    yield name, [with_outage["seconds"] / plain["seconds"]], "<= 1.05"
    print(f"calls of MLflow while Tune ran, by thread: {json.dumps(with_outage['calls'])}; points missing: {with_outage['missing']}", file=sys.stderr)


def _timed(away: float) -> dict[str, Any]:
    chaos.PAUSES["solo"] = PAUSE
    spec = chaos.chaos_spec("solo", 0, TRIALS)
    with chaos.scene(spec, "solo") as stage:
        stage.start_driver()
        back = 0.0
        while stage.driver is not None and (code := stage.driver.poll()) is None:
            now = time.monotonic()
            if away and not back and stage.progress() > TRIALS * chaos.EPOCHS / 3:
                stage.kill("server", Random(0))
                back = now + away
            elif back and back <= now:
                stage.start_server()
                back = float("inf")
            time.sleep(0.5)
        assert code == 0, f"the driver ended with {code}"
        violations, _ = chaos.compared(stage, "solo")
        outbox = Outbox(stage.home / spec.name)
        times = [stamped for entry in outbox.entries() for _, stamped in outbox.measured(entry.trial_id, before=sys.maxsize)]
        return {"seconds": (max(times) - min(times)) / 1000, "calls": stage.callers(), "missing": violations}


def main() -> None:
    """Prints one ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--away", type=float, default=AWAY)
    for name, (ratio,), target in measure(parser.parse_args().away):
        print(f"{name}: {ratio:.3f} (target {target})")


if __name__ == "__main__":
    main()
