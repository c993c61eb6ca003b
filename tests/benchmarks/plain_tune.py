"""What one would write without this project: Ray Tune, its OptunaSearch and its MLflow callback around a bare training loop.

python -m tests.benchmarks.plain_tune FOLDER NETWORK [--mlflow] [--reuse]
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.study_run import EPOCHS, GRACE, NETWORKS, REDUCTION, TRIALS


def main(folder: str, network: str, mlflow: bool, reuse: bool) -> None:
    """Runs the trials, logs them, and prints how long it took in all, and after the first result, and CPU seconds of all processes."""
    start = time.time()
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_AIR_NEW_OUTPUT": "0"})
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            import torch

            from study.trial import TrialSpec
            from tests.benchmarks.solo import bare_loop

            torch.set_num_threads(1)
            self._epoch = bare_loop(TrialSpec.model_validate({**NETWORKS[network], "optimizer": config}))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            train_loss, loss, error = self._epoch()
            return {"train_loss": train_loss, "val_loss": loss, "val_error": error, "done": self.iteration + 1 == EPOCHS[network]}

    class FirstResult(tune.Callback):
        when = 0.0

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            FirstResult.when = FirstResult.when or time.time()

    from tests.benchmarks.processes import total, watched

    Path(folder).mkdir(parents=True)
    processes = watched()
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}})
    space = {"lr": tune.loguniform(1e-2, 1.0), "weight_decay": tune.loguniform(1e-4, 1e-1), "gamma": tune.choice(["none", "all"])}
    logger = [MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="plain")] if mlflow else []
    tune.run(
        Trainable,
        config=space,
        metric="val_error",
        mode="min",
        num_samples=TRIALS,
        search_alg=OptunaSearch(),
        scheduler=AsyncHyperBandScheduler(max_t=EPOCHS[network], grace_period=GRACE, reduction_factor=REDUCTION),
        callbacks=[FirstResult(), *logger],
        reuse_actors=reuse,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        resources_per_trial={"cpu": 1},
        storage_path=str(Path(folder).resolve()),
        verbose=0,
    )
    ray.shutdown()
    print(json.dumps({"all": time.time() - start, "warm": time.time() - FirstResult.when, "cpu": total(processes)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--mlflow" in sys.argv, "--reuse" in sys.argv)
