"""Draws the README's picture from a real study:

study run search_spaces/readme.yaml
python docs/figures.py
"""

import argparse
from pathlib import Path

import pandas as pd

from study.errors import StudyError
from study.home import StudyFolder, home_path
from study.results.plots import comparison_figure, save

STUDY = "readme"
"""The study that is drawn, of search_spaces/readme.yaml."""


def best_of_arms(folder: StudyFolder) -> dict[str, pd.DataFrame]:
    """The trace of the best completed trial of each arm, in the order of the spec."""
    direction = folder.load_spec().objective.direction
    table = pd.read_parquet(folder.table)
    completed = table[table["outcome"] == "completed"].sort_values("value", ascending=direction == "minimize", kind="stable")
    best = completed.groupby("arm", sort=False).first().sort_values("trial_id")
    return {arm: pd.read_parquet(folder.path / "trials" / row["trial_id"] / "trace.parquet") for arm, row in best.iterrows()}


def title(arm: str) -> str:
    """`weight decay 0.002` for the arm `optimizer.weight_decay=0.002`."""
    pairs = (part.partition("=") for part in arm.split(","))
    return ", ".join(f"{path.rpartition('.')[2]} {value}".replace("_", " ") for path, _, value in pairs)


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description="Draw the README's picture from a finished study.")
    parser.add_argument("--home", type=Path, help="folder of all studies (default: $STUDY_HOME, else ./studies)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("effective_lr.svg"), help="file to write")
    options = parser.parse_args()
    try:
        traces = best_of_arms(StudyFolder.find(home_path(options.home), STUDY))
    except StudyError as error:
        parser.exit(2, f"{error}\n")
    save(comparison_figure({title(arm): trace for arm, trace in traces.items()}), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
