"""What one would write without this project: Ray Tune, its OptunaSearch and its MLflow callback around a bare training loop.

python -m tests.benchmarks.plain_tune FOLDER TRIALS EPOCHS [--reuse]
"""

import os
import sys
from pathlib import Path
from typing import Any


def main(folder: str, trials: int, epochs: int, reuse: bool) -> None:
    """Runs the trials and logs them."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_AIR_NEW_OUTPUT": "0"})
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            import torch

            from study.trial import TrialSpec
            from tests.benchmarks.solo import bare_loop

            torch.set_num_threads(1)
            trial = {"data": {"batch_size": 64, "label_noise": 0.1}, "model": {"width": 8, "blocks": [1, 1]}, "optimizer": config}
            self._epoch = bare_loop(TrialSpec.model_validate(trial))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            train_loss, loss, error = self._epoch()
            return {"train_loss": train_loss, "val_loss": loss, "val_error": error, "done": self.iteration + 1 == epochs}

    Path(folder).mkdir(parents=True)
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}})
    space = {"lr": tune.loguniform(1e-2, 1.0), "weight_decay": tune.loguniform(1e-4, 1e-1), "gamma": tune.choice(["none", "all"])}
    tune.run(
        Trainable,
        config=space,
        metric="val_error",
        mode="min",
        num_samples=trials,
        search_alg=OptunaSearch(),
        callbacks=[MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="plain")],
        reuse_actors=reuse,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        resources_per_trial={"cpu": 1},
        storage_path=str(Path(folder).resolve()),
        verbose=0,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "--reuse" in sys.argv)
