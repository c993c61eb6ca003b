"""Benchmarks, as ratios within one run: what the service costs over doing the same by hand.

python -m tests.benchmarks.run               all of them, on a machine that has nothing else to do
python -m tests.benchmarks.run solo          one of them
python -m tests.benchmarks.run --quick       fewer rounds and studies: half as long, and noisier

name      ratio                                                                          target                         minutes
solo      a trial on the solo engine, traced, over a bare PyTorch loop of the same       at most 1.05                   1/2
trace     the same bare loop with EffectiveLR attached over the loop without; memory     at most 1.02; 1.20 every step  1
fused     many trials in one step over one trial in each process, on all cores           from 1.4 to 2.5, by network    3
study     plain Ray Tune, with its OptunaSearch and MLflow callback, over a whole study  from 1.5 to 10, by part        14
same      fused trials and solo ones draw their errors from one distribution             p above 0.01                   1
search    trials that tpe on (intrinsic_lr, lr) needs over those on (lr, weight_decay)   at most 0.7 on ridges, 1 else  1
outage    a study whose tracking server is away for two minutes over the same undisturbed  at most 1.05                   6
"""

import statistics
import sys

from tests.benchmarks import fused, outage, same, search, solo, study_run, trace

BENCHMARKS = {
    "solo": solo.measure,
    "trace": trace.measure,
    "fused": fused.measure,
    "study": study_run.measure,
    "same": same.measure,
    "search": search.measure,
    "outage": outage.measure,
}


def main(arguments: list[str]) -> int:
    """Runs the named benchmarks and prints one line for each ratio: its median and its range over the pairs."""
    names = [argument for argument in arguments if argument != "--quick"]
    if len(names) < len(arguments):
        solo.ROUNDS, fused.ROUNDS = solo.QUICK_ROUNDS, fused.QUICK_ROUNDS
        study_run.TURNS = study_run.QUICK_TURNS
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    print(f"{'ratio':<72}{'median':>8}{'lowest':>8}{'highest':>9}{'pairs':>7}   target")
    for name in names or BENCHMARKS:
        for title, ratios, target in BENCHMARKS[name]():
            print(f"{title:<72}{statistics.median(ratios):>8.3f}{min(ratios):>8.3f}{max(ratios):>9.3f}{len(ratios):>7}   {target}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
