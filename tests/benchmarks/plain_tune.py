"""What one would write without this project: Ray Tune, its OptunaSearch and its MLflow callback around a bare training loop.

Prints what `study_run` says of a process, as JSON.

python -m tests.benchmarks.plain_tune FOLDER NETWORK [--mlflow] [--reuse]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.study_run import DECAY, EPOCHS, GAMMAS, GRACE, LR, REDUCTION, ROOT, TRIALS, assignments, check, trial_of


def main(folder: str, network: str, mlflow: bool, reuse: bool) -> None:
    """Runs the trials, and logs them."""
    # Inherited by the workers, so that they need no environment of their own and Ray's first ones are taken.
    inherited = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ.update({**inherited, "PYTHONPATH": str(ROOT)})
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch

    from tests.benchmarks.stopwatch import Stopwatch

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            import torch

            from study.trial import TrialSpec
            from tests.benchmarks.solo import bare_loop

            torch.set_num_threads(1)
            self._epoch = bare_loop(TrialSpec.model_validate({**trial_of(network), "optimizer": config}))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            train_loss, loss, error = self._epoch()
            return {"train_loss": train_loss, "val_loss": loss, "val_error": error, "done": self.iteration + 1 == EPOCHS}

    watch = Stopwatch()
    Path(folder).mkdir(parents=True)
    ray.init(include_dashboard=False, log_to_driver=False)
    found = tune.run(
        Trainable,
        config={"lr": tune.loguniform(*LR), "weight_decay": tune.loguniform(*DECAY), "gamma": tune.choice(GAMMAS)},
        metric="val_error",
        mode="min",
        num_samples=TRIALS[network],
        search_alg=OptunaSearch(points_to_evaluate=assignments(network)),
        scheduler=AsyncHyperBandScheduler(max_t=EPOCHS, grace_period=GRACE, reduction_factor=REDUCTION),
        callbacks=[MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="plain")] if mlflow else [],
        reuse_actors=reuse,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        resources_per_trial={"cpu": 1},
        storage_path=str(Path(folder).resolve()),
        verbose=0,
    )
    ray.shutdown()
    times = watch.times()
    check(network, [trial.config for trial in found.trials])
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--mlflow" in sys.argv, "--reuse" in sys.argv)
