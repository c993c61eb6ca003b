"""Where a trial's files lie in its study's folder. Whoever imports this module imports neither Ray Tune nor torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def folder_of(study: Path, trial_id: str) -> Path:
    """Where a trial's files lie."""
    return study / "trials" / trial_id


def snapshot_path(study: Path, trial_id: str) -> Path:
    """Where a trial's latest snapshot lies while it runs."""
    return folder_of(study, trial_id) / "snapshot.pt"


def keep_weights(study: Path, trial_id: str, keep: str, weights: "Callable[[str], Mapping[str, Tensor]]") -> None:
    """Writes the weights of a trial that completed, as `keep.weights` says: `best`, `all` or `none`."""
    if keep == "none":
        return
    from safetensors.torch import save_file

    own = folder_of(study, trial_id)
    folder = own / "artifacts" if keep == "all" else own
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights(trial_id)), folder / "model.safetensors")
