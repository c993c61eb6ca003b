"""Prints what docs/equilibrium.md shows, from real studies:

study run search_spaces/equilibrium_sgd.yaml
study run search_spaces/equilibrium_adamw.yaml
python docs/equilibrium.py equilibrium-sgd equilibrium-adamw

Values of a layer are over the last 30% of its samples: root mean squares of rotations, means of the others. Theory speaks of the
mean square of the angle, as the direction of one step is noisy.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from study.errors import StudyError
from study.home import StudyFolder, home_path

TAIL = 0.3
"""The share of a trial's last samples that its values are taken over."""

MEDIAN_BAND = 0.05
"""How far the median layer of a trial may be from its expected rotation."""

LAYER_BANDS = {"sgd": 0.05, "adamw": 0.10}
"""How far every layer may be from it."""

HEAD = (
    "| optimizer | lr | weight decay | lr x wd | expected rotation | rotation, median layer (min to max) | median / expected "
    "| median norm | median effective lr | median unit gradient |\n" + "|---" * 10 + "|"
)


def layers_at_the_end(trace: pd.DataFrame) -> pd.DataFrame:
    """One row for each scale-invariant layer of a trace, with `ratio`, its measured over its expected rotation."""
    steps = sorted(set(trace["step"]))
    end = trace[trace["scale_invariant"] & (trace["step"] >= steps[-math.ceil(TAIL * len(steps))])]
    end = end.assign(square=end["rotation"] ** 2, unit_gradient=end["weight_norm"] * end["grad_norm"])
    means = {name: (name, "mean") for name in ("rotation_expected", "weight_norm", "effective_lr", "unit_gradient")}
    layers = end.groupby("layer", sort=False).agg(rotation=("square", "mean"), equilibrated=("equilibrated", "all"), **means)
    layers["rotation"] **= 0.5
    return layers.assign(ratio=layers["rotation"] / layers["rotation_expected"])


def outside(layers: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The layers that are farther from their expected rotation than they may be; a layer without a ratio is one of them."""
    return layers[~((layers["ratio"] - 1).abs() <= LAYER_BANDS[rule])]


def finished_trials(folder: StudyFolder) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every completed trial with its layers, by lr x weight decay.

    Raises:
        SystemExit: if a trial did not complete, as a table without it would say too much.
    """
    if not folder.table.exists():
        raise SystemExit(f"{folder.path.name}: not finished")
    table = pd.read_parquet(folder.table).sort_values(["optimizer.intrinsic_lr", "optimizer.lr"], kind="stable")
    missing = table.loc[table["outcome"] != "completed", "trial_id"]
    if len(missing):
        raise SystemExit(f"{folder.path.name}: not completed: {', '.join(missing)}")
    for trial in table.to_dict("records"):
        yield trial, layers_at_the_end(pd.read_parquet(folder.path / "trials" / trial["trial_id"] / "trace.parquet"))


def name(trial: dict[str, Any]) -> str:
    """`sgd, momentum 0.9` or `adamw`."""
    rule = trial["optimizer.rule"]
    return f"{rule}, momentum {trial['optimizer.momentum']:g}" if rule == "sgd" else str(rule)


def row(trial: dict[str, Any], layers: pd.DataFrame) -> str:
    """A trial as a row of the table."""
    median, rotation = layers.median(numeric_only=True), layers["rotation"]
    cells = [
        name(trial),
        *(f"{trial[f'optimizer.{field}']:.3g}" for field in ("lr", "weight_decay", "intrinsic_lr")),
        f"{median['rotation_expected']:.5f}",
        f"{median['rotation']:.5f} ({rotation.min():.5f} to {rotation.max():.5f})",
        f"{median['ratio']:.3f}",
        *(f"{median[column]:.3g}" for column in ("weight_norm", "effective_lr", "unit_gradient")),
    ]
    return f"| {' | '.join(cells)} |"


def verdicts(trials: Sequence[tuple[dict[str, Any], pd.DataFrame]]) -> Iterator[str]:
    """How many medians and layers are where theory expects them, and each one that is not."""
    medians = [(trial, layers["ratio"].median()) for trial, layers in trials]
    off = [(trial, ratio) for trial, ratio in medians if not abs(ratio - 1) <= MEDIAN_BAND]
    yield f"- The median layer is within {MEDIAN_BAND:.0%} of its expected rotation in {len(trials) - len(off)} of {len(trials)} trials."
    yield from (f"  - Outside: {where(trial)}: {ratio:.3f}" for trial, ratio in off)
    for rule, band in LAYER_BANDS.items():
        mine = {where(trial): layers for trial, layers in trials if trial["optimizer.rule"] == rule}
        if mine:
            layers = pd.concat(mine, names=["trial"]).reset_index()
            wrong = outside(layers, rule)
            settled, inside = layers["equilibrated"].sum(), len(layers) - len(wrong)
            yield f"- {rule}: {settled} of {len(layers)} layers had five relaxation times before; {inside} of {len(layers)} are within {band:.0%}."
            yield from (f"  - Outside: {layer.trial}, {layer.layer}: {layer.ratio:.3f}" for layer in wrong.itertuples())


def where(trial: dict[str, Any]) -> str:
    """`adamw, lr 0.01, weight decay 0.1`."""
    return f"{name(trial)}, lr {trial['optimizer.lr']:.3g}, weight decay {trial['optimizer.weight_decay']:.3g}"


def main() -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(description="Print measured and expected rotations of finished studies as Markdown.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a finished study of sgd or adamw at a constant learning rate")
    parser.add_argument("--home", type=Path, help="folder of all studies (default: $STUDY_HOME, else ./studies)")
    options = parser.parse_args()
    try:
        folders = [StudyFolder.find(home_path(options.home), study) for study in options.names]
    except StudyError as error:
        parser.exit(2, f"{error}\n")
    trials = [trial for folder in folders for trial in finished_trials(folder)]
    print(HEAD, *(row(trial, layers) for trial, layers in trials), "", *verdicts(trials), sep="\n")


if __name__ == "__main__":
    main()
