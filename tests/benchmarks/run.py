"""Benchmarks, as ratios within one run: what the service costs over doing the same by hand.

python -m tests.benchmarks.run               all of them
python -m tests.benchmarks.run solo         one of them

name      ratio                                                                          target
solo      a trial on the solo engine, traced, over a bare PyTorch loop of the same       at most 1.05
trace     the same bare loop with EffectiveLR attached over the loop without; memory     at most 1.02; 1.20 every step
fused     many trials in one step over one trial in each process, on all cores           from 1.4 to 2.5, by network
study     a whole study over plain Ray Tune with its OptunaSearch and MLflow callback  from 1.5 to 10, by network
search    trials that tpe on (intrinsic_lr, lr) needs over those on (lr, weight_decay)   at most 0.7 on ridges, 1 anywhere
"""

import statistics
import sys

from tests.benchmarks import fused, search, solo, study_run, trace

BENCHMARKS = {"solo": solo.measure, "trace": trace.measure, "fused": fused.measure, "study": study_run.measure, "search": search.measure}


def main(names: list[str]) -> int:
    """Runs the named benchmarks and prints one line for each ratio: its median and its range over the pairs."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    print(f"{'ratio':<66}{'median':>8}{'lowest':>8}{'highest':>9}{'pairs':>7}   target")
    for name in names or BENCHMARKS:
        for title, ratios, target in BENCHMARKS[name]():
            print(f"{title:<66}{statistics.median(ratios):>8.3f}{min(ratios):>8.3f}{max(ratios):>9.3f}{len(ratios):>7}   {target}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
