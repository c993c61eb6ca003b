"""What one sampler for all does to the arms of a study, beside what this project does: the table of docs/searching.md.

python docs/arms.py

60 trials over three gamma policies and a learning rate, on a synthetic objective: (log10 lr - optimum)^2, plus what the policy costs, plus
noise. In the first case the policies differ; in the second all cost the same, and only the noise tells them apart.
"""

import math
import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna

from study.measurement import Ending, Outcome
from study.spec import StudySpec, check
from study.tuning.search import Search

ARMS = ("none", "last", "all")
TRIALS, SEEDS, NOISE = 60, 20, 0.05
CASES = {"0, 0.1, 0.2": (0.0, 0.1, 0.2), "0, 0, 0": (0.0, 0.0, 0.0)}
"""What each policy adds to the objective."""


def objective(lr: float, cost: float, noise: random.Random) -> float:
    """A valley in log lr, an arm's cost, and noise."""
    return (math.log10(lr) + 1) ** 2 + cost + noise.gauss(0, NOISE)


def alone(costs: tuple[float, ...], seed: int) -> Counter[str]:
    """Trials of each arm where Optuna's TPE draws the policy like any other value."""
    noise = random.Random(seed)

    def ask(trial: optuna.Trial) -> float:
        arm = trial.suggest_categorical("optimizer.gamma", ARMS)
        return objective(trial.suggest_float("optimizer.lr", 1e-3, 1.0, log=True), costs[ARMS.index(arm)], noise)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(ask, n_trials=TRIALS)
    return Counter(trial.params["optimizer.gamma"] for trial in study.trials)


def ours(costs: tuple[float, ...], seed: int) -> Counter[str]:
    """Trials of each arm where the policy is a scientific axis."""
    noise, found = random.Random(seed), Counter[str]()
    with TemporaryDirectory() as folder:
        search = Search(spec(seed), Path(folder) / "journal.log")
        while (proposal := search.ask()) is not None:
            optimizer = proposal.trial.optimizer
            found[optimizer.gamma] += 1
            search.tell(proposal.trial_id, Ending(Outcome.COMPLETED), objective(optimizer.lr, costs[ARMS.index(optimizer.gamma)], noise))
    return found


def spec(seed: int) -> StudySpec:
    """The study of the second row."""
    space = {"optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True}, "optimizer.gamma": {"choices": list(ARMS), "role": "scientific"}}
    return check({"name": "arms", "space": space, "search": {"sampler": "tpe", "trials": TRIALS, "seed": seed}})


def row(name: str, cost: str, counts: list[Counter[str]]) -> str:
    """One line of the table: the first seed, and over all seeds the smallest arm's median and minimum."""
    smallest = sorted(min(count[arm] for arm in ARMS) for count in counts)
    largest = sorted(max(count[arm] for arm in ARMS) for count in counts)
    first = " / ".join(str(counts[0][arm]) for arm in ARMS)
    return f"| {name} | {cost} | {first} | {smallest[len(smallest) // 2]} ({smallest[0]}) | {largest[len(largest) // 2]} ({largest[-1]}) |"


def main() -> None:
    """Prints the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print("| sampler | the arms cost | trials of each arm, seed 0 | smallest arm, median (least) | largest arm, median (most) |")
    print("|---|---|---|---|---|")
    for cost, costs in CASES.items():
        print(row("TPE left alone", cost, [alone(costs, seed) for seed in range(SEEDS)]))
        print(row("TPE in each arm", cost, [ours(costs, seed) for seed in range(2)]))


if __name__ == "__main__":
    main()
